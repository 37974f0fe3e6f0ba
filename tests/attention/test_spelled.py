"""Every spelling is recognised with the right fields, computes what it did when it is fused, or says why it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.views.attention import Attention, NotAttention, attentions, mask_kind
from fxopt.passes.base import Context
from fxopt.passes.fuse_attention_heads import FuseAttentionHeads
from fxopt.passes.manager import PassManager
from fxopt.testing import PLAIN_CPU, assert_no_worse
from tests.attention.captured import ENTRIES, captured
from tests.attention.computed import computed
from tests.attention.entries import Entry, Expected


def check(graph: Graph, entry: Entry, inputs: list[torch.Tensor]) -> None:
    """What is found is what is expected, and each view computes its node."""
    found = list(attentions(graph))
    described = [said(graph, view) if isinstance(view, Attention) else str(view.reason) for view in found]
    assert len(found) == len(entry.expected), described
    values: dict[fx.Node, Any] = {}
    graph.run(inputs, observer=values.__setitem__)
    for view, expected in zip(found, entry.expected, strict=True):
        if isinstance(expected, str):
            assert isinstance(view, NotAttention), f"{said(graph, view)}, expected the reason {expected!r}"
            assert str(view.reason).startswith(expected)
            continue
        assert isinstance(view, Attention), view
        assert said(graph, view) == wanted(expected)
        made = values[view.node]
        tolerance = 2e-3 if made.dtype == torch.float16 else 2e-6
        torch.testing.assert_close(computed(graph, view, values), made, atol=tolerance, rtol=1e-5, equal_nan=True)


def said(graph: Graph, view: Attention) -> dict[str, Any]:
    return {
        "mask": mask_kind(graph, view),
        "scale": view.scale if view.scale is None else pytest.approx(view.scale, rel=1e-6),
        "groups": view.groups,
        "softcap": pytest.approx(view.softcap, rel=1e-6),
        "sink": view.sink is not None,
        "rotary": tuple(0 if turn is None else turn.width for turn in view.rotary),
        "zero rows": view.empty_rows_are_zero,
    }


def wanted(expected: Expected) -> dict[str, Any]:
    return {
        "mask": expected.mask,
        "scale": expected.scale,
        "groups": expected.groups,
        "softcap": expected.softcap,
        "sink": expected.sink,
        "rotary": expected.rotary,
        "zero rows": expected.zero_rows,
    }


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "torch" in entry.only])
def test_recognised(name: str) -> None:
    entry = ENTRIES[name]
    check(captured(name), entry, list(entry.sample()))


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if "torch" in entry.only])
def test_fused(name: str) -> None:
    entry = ENTRIES[name]
    before = captured(name)
    after, ctx = before.copy(), Context(PLAIN_CPU)
    changes = PassManager([FuseAttentionHeads()]).run(after, ctx)
    views = [expected for expected in entry.expected if isinstance(expected, Expected)]
    assert changes == sum(expected.fused for expected in views)
    reasons = [verdict.reason for verdict in ctx.ledger.select(outcome="refused")]
    for expected in entry.expected:
        reason = expected if isinstance(expected, str) else expected.reason
        assert not reason or any(reason in text for text in (*reasons, *no_match(ctx))), reasons
    if changes:
        left = {str(node.target) for node in after.calls()}
        assert not any("softmax" in target or "bmm" in target or "einsum" in target for target in left)
        assert_no_worse(before, after, [entry.sample()])


def no_match(ctx: Context) -> list[str]:
    return [verdict.reason for verdict in ctx.ledger.select(outcome="no-match")]
