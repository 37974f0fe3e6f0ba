"""merge-common-subexpressions: equal values once; what looks equal and is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.onnx.export import to_model
from fxopt.passes.merge_common_subexpressions import MergeCommonSubexpressions
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
    torch_graph,
)

PASS = MergeCommonSubexpressions()


def check(graph: Graph, wanted: list[str], count: int, step: MergeCommonSubexpressions = PASS, **sizes: int) -> Graph:
    """What is left and how many went; not a bit of the outputs changes."""
    samples = samples_of(graph, **sizes)
    after, found = applied(step, graph, samples)
    assert (operators(after), found) == (wanted, count)
    assert_same_bits(graph, after, samples)
    return after


def test_a_chain_twice() -> None:
    text = "g (float[3] x) => (float[3] y) { a = Relu(x) b = Exp(a) c = Relu(x) d = Exp(c) y = Add(b, d) }"
    after = check(onnx_graph(text), ["Relu", "Exp", "Add"], 2)
    assert [node.name for node in to_model(after).graph.node] == ["n_a", "n_b", "n_y"]


def test_torch() -> None:
    graph = torch_graph(lambda x: torch.relu(x.t() * 2) + torch.relu(x.t() * 2), torch.randn(2, 3))
    check(graph, ["t", "mul", "relu", "add"], 3)


def test_constants_of_equal_content() -> None:
    text = "g (float[3] x) => (float[3] y) { a = Mul(x, u) b = Mul(x, v) y = Add(a, b) }"
    after = check(onnx_graph(text, u=np.float32([1, 2, 3]), v=np.float32([1, 2, 3])), ["Mul", "Add"], 1)
    assert constants(after) == ["u"]
    check(onnx_graph(text, u=np.float32([1, 2, 3]), v=np.float32([1, 2, 4])), ["Mul", "Mul", "Add"], 0)
    assert PASS.run(onnx_graph(text, u=np.float32([[1, 2, 3]]), v=np.float32([1, 2, 3]), check=False), context()) == 0
    check(onnx_graph(text, u=np.float32([0.0]), v=np.float32([-0.0])), ["Mul", "Mul", "Add"], 0)


def test_constants_of_any_strides() -> None:
    """One element may have any stride: what folding expands to one element has 0."""
    graph = onnx_graph(
        "g (int64[3] x) => (int64[3] y) { a = Add(x, c) b = Add(x, d) y = Mul(a, b) }", c=np.int64([2]), d=np.int64([2])
    )
    for node in graph.nodes:
        if node.op == "get_attr":
            setattr(graph.root, str(node.target), torch.tensor([2]).as_strided((1,), (0,)))
    assert PASS.run(graph, context()) == 1 and operators(graph) == ["Add", "Mul"]


def test_large_constants_that_differ_in_one_element() -> None:
    first = np.zeros(5000, np.float32)
    second = first.copy()
    second[4321] = 1
    text = (
        "g (float[5000] x) => (float[5000] y) { a = Mul(x, u) b = Mul(x, v) c = Mul(x, w) d = Add(a, b) y = Add(c, d) }"
    )
    check(onnx_graph(text, u=first, v=second, w=first.copy()), ["Mul", "Mul", "Add", "Add"], 2)


def test_large_equal_constants_are_stored_once_and_small_ones_stay() -> None:
    text = "g (float[N] x) => (float[N] y) { a = Mul(x, u) y = Add(a, v) }"
    large = np.arange(400, dtype=np.float32)
    after = check(onnx_graph(text.replace("N", "400"), u=large, v=large.copy()), ["Mul", "Add"], 1)
    assert constants(after) == ["u"]
    check(onnx_graph(text.replace("N", "4"), u=large[:4], v=large[:4].copy()), ["Mul", "Add"], 0)
    small = onnx_graph(text.replace("N", "4"), u=large[:4], v=large[:4].copy())
    check(small, ["Mul", "Add"], 1, MergeCommonSubexpressions(constant_bytes=0))


NOT_EQUAL = {
    "attributes": "a = Transpose<perm = [0, 1]>(x) b = Transpose<perm = [1, 0]>(x) y = Add(a, b)",
    "types of attributes": "a = LeakyRelu<alpha = 1.0>(x) b = Elu<alpha = 1.0>(x) y = Add(a, b)",
    "order of operands": "a = Sub(x, z) b = Sub(z, x) y = Add(a, b)",
    "random": "a = RandomNormalLike(x) b = RandomNormalLike(x) y = Add(a, b)",
    "random with a seed": "a = RandomUniformLike<seed = 1.0>(x) b = RandomUniformLike<seed = 1.0>(x) y = Add(a, b)",
    "unknown domains": "a = com.example.Next(x) b = com.example.Next(x) y = Add(a, b)",
    "sub-graphs": (
        "a = If(c) <then_branch = t () => (float[3, 3] p) { p = RandomNormalLike(x) },"
        " else_branch = e () => (float[3, 3] q) { q = Neg(x) }>"
        "b = If(c) <then_branch = t () => (float[3, 3] p) { p = RandomNormalLike(x) },"
        " else_branch = e () => (float[3, 3] q) { q = Neg(x) }> y = Add(a, b)"
    ),
}


@pytest.mark.parametrize("name", NOT_EQUAL)
def test_what_looks_equal_stays(name: str) -> None:
    graph = onnx_graph(
        f"g (float[3, 3] x, float[3, 3] z, bool c) => (float[3, 3] y) {{ {NOT_EQUAL[name]} }}", check=False
    )
    before = operators(graph)
    assert PASS.run(graph, context()) == 0 and operators(graph) == before


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0), (float("nan"), 1.0)])
def test_numbers_of_other_types_differ(one: Any, other: Any) -> None:
    def build(g: fx.Graph, x: fx.Node) -> fx.Node:
        a, b = (g.call_function(aten.mul.Tensor, (x, value)) for value in (one, other))
        return g.call_function(aten.add.Tensor, (a, b))

    check(fx_graph(build, (3,)), ["mul", "mul", "add"], 0)


def test_random_operators_of_torch_stay() -> None:
    graph = torch_graph(lambda x: x + torch.rand(3) + torch.rand(3), torch.randn(3))
    assert PASS.run(graph, context()) == 0
    empty = fx_graph(
        lambda g, x: tuple(
            g.call_function(aten.add.Tensor, (x, g.call_function(aten.empty.memory_format, ([3],)))) for _ in "ab"
        ),
        (3,),
    )
    assert PASS.run(empty, context()) == 0


def test_two_outputs() -> None:
    graph = onnx_graph("g (float[3] x) => (float[3] y, float[3] z) { y = Relu(x) z = Relu(x) }")
    after = check(graph, ["Relu"], 1)
    assert [(node.op_type, list(node.output)) for node in to_model(after).graph.node] == [
        ("Relu", ["y"]),
        ("Identity", ["z"]),
    ]


def test_two_results_of_torch_stay_two_tensors() -> None:
    def build(g: fx.Graph, x: fx.Node) -> Any:
        return g.call_function(aten.relu.default, (x,)), g.call_function(aten.relu.default, (x,))

    check(fx_graph(build, (3,)), ["relu", "relu"], 0)

    def views(g: fx.Graph, x: fx.Node) -> Any:
        first = g.call_function(aten.relu.default, (x,))
        return g.call_function(aten.t.default, (first,)), g.call_function(aten.relu.default, (x,))

    check(fx_graph(views, (3, 2)), ["relu", "t", "relu"], 0)


def test_several_outputs() -> None:
    text = "g (float[4] x) => (float[2] y) { a, b = Split<num_outputs = 2>(x) c, d = Split<num_outputs = 2>(x) y = Add(b, d) }"
    check(onnx_graph(text), ["Split", "Add"], 2 + 1)


def test_an_output_that_one_node_omits_and_another_names() -> None:
    text = """g (float[2, 3] x) => (float[2, 3] y) {
        t, u = LayerNormalization(x, s) v, j = LayerNormalization(x, s) y = Add(t, j) }"""
    graph = onnx_graph(text, s=np.float32([1, 2, 3]))
    node = graph.find("n_t")
    assert node is not None
    record = node.meta["onnx"]
    record.outputs = ("t", "")
    record.proto.output[1] = ""
    check(graph, ["LayerNormalization", "LayerNormalization", "Add"], 0)


def test_captured_values_keep_their_names() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
        a = Relu(x) b = Relu(x)
        y = If (c) <then_branch = t () => (float[2] p) { p = Add(a, b) }, else_branch = e () => (float[2] q) { q = Neg(b) }>
    }"""
    after, count = applied(PASS, onnx_graph(text))
    assert count == 1 and operators(after) == ["Relu", "If"]


def test_dead_operators_do_not_matter() -> None:
    text = "g (float[3] x) => (float[3] y) { a = Relu(x) b = Relu(x) y = Exp(b) }"
    check(onnx_graph(text), ["Relu", "Exp"], 1)


def test_the_order_of_constants_in_the_file_does_not_matter() -> None:
    text = "g (float[400] x) => (float[400] y) { a = Mul(x, v) b = Mul(x, u) c = Mul(a, w) y = Add(c, b) }"
    same = np.arange(400, dtype=np.float32)
    after = check(onnx_graph(text, u=same, v=same.copy(), w=same.copy()), ["Mul", "Mul", "Add"], 3)
    assert constants(after) == ["u"]
