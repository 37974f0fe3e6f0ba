"""eliminate-dead-code."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from fxopt.passes.eliminate_dead_code import EliminateDeadCode
from tests.passes.helpers import (
    applied,
    assert_same_bits,
    aten,
    constants,
    context,
    fx_graph,
    onnx_graph,
    operators,
    samples_of,
)

PASS = EliminateDeadCode()


def test_dead_operators_and_their_constants_go() -> None:
    text = "g (float[2] x, float[2] unused) => (float[2] y) { a = Neg(x) b = Add(a, w) c, m = Dropout(b) y = Relu(x) }"
    graph = onnx_graph(text, w=np.float32([1, 2]), v=np.float32([3]))
    after, count = applied(PASS, graph, samples_of(graph))
    assert operators(after) == ["Relu"] and constants(after) == []
    assert count == 7  # Neg, Add, Dropout and its two results, w and v
    assert len(after.placeholders) == 2
    assert not list(after.root.named_buffers())
    assert_same_bits(graph, after, samples_of(graph))


def test_what_sub_graphs_use_stays() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
        a = Relu(x) d = Exp(x)
        y = If (c) <then_branch = t () => (float[2] p) { p = Neg(a) }, else_branch = e () => (float[2] q) { q = Neg(x) }>
    }"""
    after, count = applied(PASS, onnx_graph(text))
    assert count == 1 and operators(after) == ["Relu", "If"]


def test_effects_stay() -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        g.call_function(aten.neg.default, (x,))
        check = g.call_function(aten.gt.Scalar, (x, 0))
        g.call_function(aten._assert_async.msg, (check, "positive"))
        return g.call_function(aten.relu.default, (x,))

    graph = fx_graph(build, (1,))
    after = graph.copy()
    assert PASS.run(after, context()) == 1
    assert operators(after) == ["gt", "_assert_async", "relu"]


def test_weights_of_torch_modules_that_nobody_uses_go() -> None:
    graph = fx_graph(lambda g, x, w: g.call_function(aten.relu.default, (x,)), (2,), w=torch.ones(3))
    after, count = applied(PASS, graph, samples_of(graph))
    assert count == 1 and not list(after.root.named_buffers())
