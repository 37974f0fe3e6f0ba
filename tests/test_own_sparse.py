"""Linears on codes with zero blocks: which ones are rewritten and why, the same numbers, and how codes lie between them."""

from __future__ import annotations

import re
from typing import Any

import onnx
import pytest
import torch
from torch import fx

from fxopt import own_sparse
from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.cost_model.targets import get_target
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.export import to_model
from fxopt.ir.ops.linear_u8s8 import linear_u8s8, quantize_u8
from fxopt.ir.ops.sparse_linear_u8s8 import block_density, sparse_linear_u8s8
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.fuse_int8 import FuseInt8
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.stats import collect
from tests.test_custom_ops import network, samples

TARGET = get_target("x86-avx512-vnni")


def fused(zeros: float, batch: int = 2) -> Graph:
    """The network of `test_custom_ops` with its linears on codes, costs for `batch` times 32 rows."""
    graph = load(network(zeros))
    infer(graph, {"n": 2})
    step = QuantizeLinear(activations="static", smooth="off")
    found = [each for each in step.candidates(graph, Context(TARGET)) if each.refusal is None]
    given = [[torch.from_numpy(feed["x"])] for feed in samples()[:2]]
    stats = collect(graph, given, {node for each in found for node in step.observed(graph, each)})
    for candidate in found:
        step.apply(graph, candidate, stats)
    graph.prune()
    FuseInt8().run(graph, Context(TARGET))
    infer(graph, {"n": batch})
    return graph


def rewritten(graph: Graph, names: set[str]) -> Graph:
    made = graph.copy()
    infer(made, graph.sizes)
    for place in own_sparse.places(made, Context(TARGET)):
        if place.name in names:
            own_sparse.without_zeros(made, place)
    made.prune()
    return made


def test_the_same_numbers() -> None:
    graph = fused(0.7)
    found = own_sparse.places(graph, Context(TARGET))
    assert [place.name for place in found] == ["up", "down"]
    assert all(place.density == block_density(graph.constant(place.node.args[1])) for place in found)  # type: ignore[arg-type]
    made = rewritten(graph, {"up", "down"})
    targets = [node.target for node in made.calls()]
    assert targets.count(sparse_linear_u8s8.target) == 2 and linear_u8s8.target not in targets
    x = torch.from_numpy(samples()[3]["x"])
    assert torch.equal(made.run([x])[0], graph.run([x])[0])


@pytest.mark.parametrize(("zeros", "batch", "inner"), [(0.05, 2, (64, 256)), (0.3, 1, (64, 256))])
def test_too_few_zeros(zeros: float, batch: int, inner: tuple[int, int]) -> None:
    """Half a panel of rows needs more of them."""
    ctx = Context(TARGET)
    assert own_sparse.places(fused(zeros, batch), ctx) == []
    rows = list(ctx.ledger.select(pass_name=own_sparse.NAME, outcome="refused"))
    assert [row.node for row in rows] == ["up", "down"]
    for row, inputs in zip(rows, inner, strict=True):
        text = rf"\d+ % of the 4x1 blocks are zero: below the break-even of \d+ % for {inputs} inputs and {32 * batch} rows"
        assert re.fullmatch(text, row.reason)


def test_excluded() -> None:
    ctx = Context(TARGET, exclude=re.compile("up"))
    assert [place.name for place in own_sparse.places(fused(0.7), ctx)] == ["down"]
    (row,) = ctx.ledger.select(pass_name=own_sparse.NAME)
    assert (row.node, row.outcome) == ("up", "refused")


def layouts(graph: Graph) -> list[tuple[int, int] | None]:
    """Of each linear in the file, how x and its codes lie: (x_panels, codes_panels); None of a dense one."""
    found: list[tuple[int, int] | None] = []
    for node in to_model(graph, FORMS).graph.node:
        if node.op_type in ("SparseLinearInt8", "FusedLinearInt8"):
            values: dict[str, Any] = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            found.append((values["x_panels"], values["codes_panels"]) if "x_panels" in values else None)
    return found


def test_layouts() -> None:
    graph = fused(0.7)
    assert layouts(rewritten(graph, {"up", "down"})) == [(0, 1), (1, 0)]
    assert layouts(rewritten(graph, {"up"})) == [(0, 0), None]
    assert layouts(rewritten(graph, {"down"})) == [None, (0, 0)]


@pytest.mark.parametrize("other", ["dense", "rounded anew"])
def test_a_second_taker(other: str) -> None:
    """A dense one takes rows, so both do; what a sparse linear does not round itself is rows, too."""
    graph = rewritten(fused(0.7), {"up", "down"})
    down = next(node for node in reversed(list(graph.calls())) if node.target is sparse_linear_u8s8.target)
    codes, *rest = down.args
    assert isinstance(codes, fx.Node)
    with graph.fx.inserting_before(down):
        if other == "dense":
            operands: Any = (codes, *rest[:4], "none", None, None, None, 0.0)
            second = graph.fx.call_function(linear_u8s8.target, operands)
        else:
            anew = graph.fx.call_function(quantize_u8.target, (*codes.args[:2], 7))
            operands = (anew, *rest[:4], "none", None, None, None, 0.0, rest[-1])
            second = graph.fx.call_function(sparse_linear_u8s8.target, operands)
    down.args = (codes, *rest[:5], second, *rest[6:])  # as the residual
    infer(graph, graph.sizes)
    assert layouts(graph) == ([(0, 0), None, (0, 0)] if other == "dense" else [(0, 1), (0, 0), (1, 0)])
