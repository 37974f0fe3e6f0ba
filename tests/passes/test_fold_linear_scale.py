"""Factors per feature behind 8-bit linears go into their scales and biases, through attention too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxopt.cost_model.targets import get_target
from fxopt.frontends.onnx import load
from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.ops.linear_w8a8 import linear_w8a8_dynamic
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.fold_linear_scale import FoldLinearScale
from tests.backends.test_onnxruntime import model


def scaled(attends: bool, heads: tuple[int, int] = (2, 2), shares: bool = False) -> tuple[Graph, fx.Node]:
    """x -> 8-bit linear (-> attention with x as query and key) -> * c -> y, and the linear."""
    graph = load(model([("Identity", ["x"], "y", {})], {"x": ["n", 3, 8]}, {"y": ["n", 3, 8]}))
    identity = graph.find("y")
    assert identity is not None
    x = identity.args[0]
    generator = torch.Generator().manual_seed(0)
    constants = (
        torch.randint(-63, 64, (8, 8), generator=generator, dtype=torch.int8),
        torch.rand(8, generator=generator) * 0.01 + 0.01,
        torch.randn(8, generator=generator),
    )
    operands = [graph.add_constant(value, f"operand_{index}") for index, value in enumerate(constants)]
    linear = graph.call(linear_w8a8_dynamic.target, (x, *operands), before=identity, made_by="test")
    value: Any = linear
    if attends:
        options = {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
        value = graph.call(OnnxOp("", "Attention", 23), (x, x, linear), options, before=identity, made_by="test")
    b = Builder(graph, identity, "test")
    result = b.mul(value, b.const(torch.rand(8, generator=generator) + 0.5, "c"))
    if shares:
        result = b.add(result, linear)
    graph.replace(identity, result)
    infer(graph, {"n": 2})
    return graph, linear


@pytest.mark.parametrize("attends", [False, True])
def test_the_factor_is_folded(attends: bool) -> None:
    graph, _ = scaled(attends)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    before = graph.run([x])[0]
    assert FoldLinearScale().run(graph, Context(get_target("x86-avx2"))) == 1
    assert not any(isinstance(node.target, OnnxOp) and node.target.op_type == "Mul" for node in graph.calls())
    torch.testing.assert_close(graph.run([x])[0], before, rtol=1e-5, atol=1e-6)
    assert FoldLinearScale().run(graph, Context(get_target("x86-avx2"))) == 0


def test_a_value_that_others_take_is_left_alone() -> None:
    graph, _ = scaled(attends=True, shares=True)
    assert FoldLinearScale().run(graph, Context(get_target("x86-avx2"))) == 0
