"""For authors of passes: run one pass on one graph, and say what must hold.

graph = fxopt.capture("model.onnx")
assert_neutral(MyPass(bits=None), graph, [(x,)])
assert_refuses(MyPass(group=128), graph, "not a multiple of group 128")
assert_no_worse(graph, rewritten(MyExactPass(), graph), [(x,)])
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph
from fxopt.ir.shapes import infer
from fxopt.ir.target import Target
from fxopt.passes.base import Candidate, Context, ConvertingPass, ExactPass, LossyPass, Pass
from fxopt.passes.stats import collect

__all__ = ["PLAIN_CPU", "assert_neutral", "assert_no_worse", "assert_refuses", "candidates", "rewritten"]

Samples = Sequence[Sequence[Any]]  # flat inputs per sample, batch axis included

PLAIN_CPU = Target(
    name="plain-cpu",
    kind="cpu",
    arch="x86-64",
    backend="eager",
    source="invented, for tests",
    error="never measured",
    interval=1.0,
    peak={"float32": 1e11, "float16": 1e11, "bfloat16": 1e11, "int8": 4e11},
    bandwidth=2e10,
    launch_seconds=1e-6,
    features=frozenset({"avx2", "avx512f", "avx512_vnni"}),
)


def candidates(lossy: LossyPass, graph: Graph, ctx: Context | None = None) -> list[Candidate]:
    """What the pass offers and refuses on a graph, with shapes derived anew; the graph keeps its nodes."""
    infer(graph)
    return list(lossy.candidates(graph, ctx or Context(PLAIN_CPU)))


def rewritten(step: Pass, graph: Graph, samples: Samples = (), ctx: Context | None = None) -> Graph:
    """A copy of the graph after the pass; of a lossy pass every candidate is applied, the last one offered per node.

    Raises:
        Unsupported: the pass is none of exact, converting and lossy.
    """
    ctx = ctx or Context(PLAIN_CPU)
    changed = graph.copy()
    infer(changed)
    if isinstance(step, (ExactPass, ConvertingPass)):
        count = step.run(changed, ctx)
        assert isinstance(count, int), f"{step}: run returned {count!r}, expected the number of changes"
    elif isinstance(step, LossyPass):
        chosen = {offer.node: offer for offer in step.candidates(changed, ctx) if offer.refusal is None}
        wanted = [node for offer in chosen.values() for node in step.observed(changed, offer)]
        stats = collect(changed, samples, wanted)
        for offer in chosen.values():
            step.apply(changed, offer, stats)
    else:
        raise Unsupported(f"{step} is a {type(step).__name__}; expected an ExactPass, a ConvertingPass or a LossyPass")
    changed.fx.lint()
    return changed


def assert_no_worse(before: Graph, after: Graph, samples: Samples, *, factor: float = 2.0) -> None:
    """Every output of `after` is at most `factor` times as far from float64 as that of `before`, or its rounding.

    The oracle is `before` in float64; outputs that are not floating point must be equal.
    """
    assert samples, "no samples given"
    for number, sample in enumerate(samples):
        oracle, old, new = before.run(sample, widen=True), before.run(sample), after.run(sample)
        assert len(old) == len(new), f"{len(new)} outputs, before {len(old)}"
        for spec, exact, was, now in zip(before.outputs, oracle, old, new, strict=True):
            where = f"sample {number}, output {spec.name!r}"
            assert was.dtype == now.dtype and was.shape == now.shape, (
                f"{where}: {now.dtype}{list(now.shape)}, before {was.dtype}{list(was.shape)}"
            )
            if not now.is_floating_point():
                assert torch.equal(was, now), f"{where}: the integers differ"
                continue
            allowed = factor * max(_distance(was, exact), torch.finfo(now.dtype).eps * _largest(exact))
            found = _distance(now, exact)
            assert found <= allowed, f"{where}: error {found:.3g} against float64, allowed {allowed:.3g}"


def assert_neutral(step: Pass, graph: Graph, samples: Samples, ctx: Context | None = None) -> None:
    """The pass, with the options that mean 'change nothing', leaves every output bit for bit."""
    assert samples, "no samples given"
    after = rewritten(step, graph, samples, ctx)
    for number, sample in enumerate(samples):
        for spec, was, now in zip(graph.outputs, graph.run(sample), after.run(sample), strict=True):
            same = was.dtype == now.dtype and torch.equal(was, now)
            assert same, f"{step} is not neutral: output {spec.name!r} of sample {number} differs"


def assert_refuses(step: LossyPass, graph: Graph, reason: str, ctx: Context | None = None) -> None:
    """The pass offers nothing, and at least one refusal matches the regular expression `reason`."""
    found = candidates(step, graph, ctx)
    offered = [offer.anchor for offer in found if offer.refusal is None]
    assert not offered, f"{step} offers to change {', '.join(offered)}"
    reasons = [str(offer.refusal) for offer in found]
    assert any(re.search(reason, text) for text in reasons), f"no refusal matches {reason!r}; there are: {reasons}"


def _distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    wide, exact = value.double(), exact.double()
    apart = torch.where((wide == exact) | (wide.isnan() & exact.isnan()), torch.zeros_like(exact), (wide - exact).abs())
    worst = _largest(apart)
    return worst if worst == worst else float("inf")


def _largest(value: torch.Tensor) -> float:
    return float(value.double().abs().max()) if value.numel() else 0.0
