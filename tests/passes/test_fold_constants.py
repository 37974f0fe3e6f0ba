"""fold-constants: what is folded, what stays and why, names, sizes, and numbers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import fx

from fxopt.ir.graph import Graph, provenance
from fxopt.ir.onnx.export import to_model
from fxopt.passes.fold_constants import FoldConstants
from tests.passes.helpers import (
    applied,
    aten,
    constants,
    context,
    fx_graph,
    onnx_graph,
    operators,
    refusals,
    samples_of,
    torch_graph,
)

PASS = FoldConstants()


def check(graph: Graph, wanted: list[str], count: int, reasons: str = "", **sizes: int) -> Graph:
    """What is left, how many values were folded, and what the ledger says."""
    ctx = context()
    after, found = applied(PASS, graph, samples_of(graph, **sizes), ctx)
    assert operators(after) == wanted
    assert found == count
    assert re.fullmatch(reasons, "; ".join(refusals(ctx))), refusals(ctx)
    return after


WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_a_chain_becomes_one_constant_with_the_name_of_its_value() -> None:
    graph = onnx_graph("g (float[3, 2] x) => (float[3, 3] y) { a = Neg(w) b = Exp(a) y = MatMul(x, b) }", w=WEIGHT)
    after = check(graph, ["MatMul"], 1)
    assert constants(after) == ["b"]
    node = after.result_nodes[0].args[1]
    assert provenance(node) == ("n_b", "fold-constants")
    assert torch.equal(after.constant(node), torch.exp(-torch.from_numpy(WEIGHT)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_low_precision_is_kept(dtype: torch.dtype) -> None:
    kind = {torch.float32: "float", torch.float16: "float16", torch.float64: "double"}[dtype]
    text = (
        f"g ({kind}[2, 5] x) => ({kind}[2, 3] y) {{ a = Sigmoid(w) b = Transpose(a) c = Mul(b, s) y = MatMul(x, c) }}"
    )
    graph = onnx_graph(text, w=torch.randn(3, 5).to(dtype), s=torch.tensor(0.3).to(dtype))
    after = check(graph, ["MatMul"], 1)
    assert after.constant(after.result_nodes[0].args[1]).dtype == dtype


def test_a_value_that_is_used_twice_and_inside_a_longer_chain() -> None:
    text = "g (float[2, 3] x) => (float[2, 3] y) { a = Neg(w) b = Exp(a) c = Add(x, a) y = Mul(c, b) }"
    after = check(onnx_graph(text, w=WEIGHT), ["Add", "Mul"], 2)
    assert constants(after) == ["a", "b"]


def test_constants_that_others_use_stay() -> None:
    after = check(
        onnx_graph("g (float[2, 3] x) => (float[2, 3] y) { a = Neg(w) b = Add(x, a) y = Mul(b, w) }", w=WEIGHT),
        ["Add", "Mul"],
        1,
    )
    assert constants(after) == ["a", "w"]


def test_outputs_may_be_constants() -> None:
    graph = onnx_graph("g (float[2] x) => (float[2] y, float[2, 3] z) { y = Relu(x) z = Neg(w) }", w=WEIGHT)
    after = check(graph, ["Relu"], 1)
    assert constants(after) == ["z"]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32])
def test_an_output_of_few_integers(dtype: Any) -> None:
    """As a constant it is in the host lane, where the operator before it was not."""
    kind = {np.int64: "int64", np.int32: "int32", np.float32: "float"}[dtype]
    graph = onnx_graph(f"g () => ({kind}[2, 3] y) {{ y = Abs(c) }}", c=np.arange(-3, 3).astype(dtype).reshape(2, 3))
    after = check(graph, [], 1)
    (y,) = after.run([])
    assert np.array_equal(np.asarray(y), np.abs(np.arange(-3, 3)).reshape(2, 3))


def test_several_outputs() -> None:
    text = "g (float[2, 1] x) => (float[2, 1] y) { a, b = Split<axis = 1, num_outputs = 2>(w) c = Add(x, a) y = Mul(c, b) }"
    after = check(onnx_graph(text, w=WEIGHT[:, :2]), ["Add", "Mul"], 2)
    assert constants(after) == ["a", "b"]


def test_operators_without_inputs_and_shape_constants() -> None:
    text = "g (float[2, 3] x) => (float[2, 3] y) { s = Constant<value_ints = [2, 3]>() z = ConstantOfShape(s) e = Exp(z) y = Add(x, e) }"
    check(onnx_graph(text), ["Add"], 1)
    graph = torch_graph(lambda x: x + torch.arange(3) * torch.ones(2, 3), torch.randn(2, 3))
    check(graph, ["add"], 1)


def test_random_operators_stay() -> None:
    text = "g (float[2] x) => (float[2] y) { r = RandomNormal<shape = [2]>() e = Exp(r) y = Add(x, e) }"
    graph, ctx = onnx_graph(text), context()
    assert PASS.run(graph, ctx) == 0 and operators(graph) == ["RandomNormal", "Exp", "Add"]
    torch_born = torch_graph(lambda x: x + torch.rand(2), torch.randn(2))
    assert PASS.run(torch_born, ctx) == 0 and operators(torch_born) == ["rand", "add"]
    uninitialised = fx_graph(
        lambda g, x: g.call_function(aten.add.Tensor, (x, g.call_function(aten.empty.memory_format, ([2],)))), (2,)
    )
    assert PASS.run(uninitialised, ctx) == 0
    assert not refusals(ctx)


def test_dropout_in_training_stays() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Dropout(w, r, t) y = Add(x, a) }"
    graph = onnx_graph(text, w=np.float32([1, 2]), r=np.float32(0.5), t=np.bool_(True))
    assert PASS.run(graph, context()) == 0


def test_quantized_weights_stay_quantized() -> None:
    text = "g (float[2, 2] x) => (float[2, 3] y) { d = DequantizeLinear(q, s) y = MatMul(x, d) }"
    graph = onnx_graph(text, q=np.arange(6, dtype=np.int8).reshape(2, 3), s=np.float32(0.1))
    check(graph, ["DequantizeLinear", "MatMul"], 0, "a quantized constant stays quantized")


def test_operators_without_a_reference_stay() -> None:
    text = "g (float[2] x) => (float[2] y) { a = com.example.Secret(w) y = Add(x, a) }"
    graph, ctx = onnx_graph(text, check=False, w=np.float32([1, 2])), context()
    assert PASS.run(graph, ctx) == 0
    assert not refusals(ctx)  # nobody knows that it is a function of its input


def test_sub_graphs_and_strings_stay() -> None:
    text = """g (float[2] x) => (float[2] y) {
        c = Constant<value = bool {1}>()
        a = If (c) <then_branch = t () => (float[2] p) { p = Neg(w) }, else_branch = e () => (float[2] q) { q = Exp(w) }>
        y = Add(x, a) }"""
    after, count = applied(PASS, onnx_graph(text, w=np.float32([1, 2])))
    assert count == 0 and operators(after) == ["If", "Add"]


def test_a_captured_value_keeps_its_name() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
        a = Neg(w)
        y = If (c) <then_branch = t () => (float[2] p) { p = Add(x, a) }, else_branch = e () => (float[2] q) { q = Sub(x, a) }>
    }"""
    graph = onnx_graph(text, w=np.float32([1, 2]))
    after, count = applied(PASS, graph)
    assert count == 1 and constants(after) == ["a"]
    assert [node.op_type for node in to_model(after).graph.node] == ["If"]


def test_a_failing_operator_stays_with_the_reason() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Reshape(w, s) y = Add(x, a) }"
    graph, ctx = onnx_graph(text, check=False, w=np.float32([1, 2]), s=np.int64([5])), context()
    assert PASS.run(graph, ctx) == 0
    assert re.match("the size of its result depends on data|evaluating it fails: RuntimeError: shape", refusals(ctx)[0])


def test_excluded_operators_stay() -> None:
    graph = onnx_graph("g (float[2, 3] x) => (float[2, 3] y) { a = Neg(w) y = Add(x, a) }", w=WEIGHT)
    ctx = context(exclude=re.compile("n_a"))
    assert applied(PASS, graph, (), ctx)[1] == 0
    assert refusals(ctx) == ["excluded by --exclude n_a"]


# ---- sizes


def test_the_model_does_not_grow() -> None:
    text = "g (float[1000, 1000] x) => (float[1000, 1000] y) { a = Expand(w, s) y = Add(x, a) }"
    graph = onnx_graph(text, w=np.float32(1), s=np.int64([1000, 1000]))
    ctx = context()
    assert applied(PASS, graph, (), ctx)[1] == 0
    assert refusals(ctx) == ["4000000 bytes exceed max_bytes=1048576 and the 20 bytes that become unnecessary"]
    assert applied(FoldConstants(max_bytes=4_000_000), graph)[1] == 1


def test_a_large_weight_may_be_transposed_when_nobody_else_needs_it() -> None:
    weight = np.random.default_rng(0).standard_normal((512, 600)).astype(np.float32)
    text = "g (float[2, 600] x) => (float[2, 512] y) { t = Transpose(w) y = MatMul(x, t) }"
    assert applied(PASS, onnx_graph(text, w=weight))[1] == 1
    tied = "g (float[2, 600] x) => (float[2, 600] y) { t = Transpose(w) a = MatMul(x, t) y = MatMul(a, w) }"
    ctx = context()
    assert applied(PASS, onnx_graph(tied, w=weight), (), ctx)[1] == 0
    assert refusals(ctx) == ["1228800 bytes exceed max_bytes=1048576 and the 0 bytes that become unnecessary"]


def test_a_large_cast_to_a_wider_type_stays() -> None:
    weight = np.zeros((600, 600), np.float16)
    text = "g (float[2, 600] x) => (float[2, 600] y) { a = Cast<to = 1>(w) y = MatMul(x, a) }"
    assert applied(PASS, onnx_graph(text, w=weight))[1] == 0
    narrower = "g (float16[2, 600] x) => (float16[2, 600] y) { a = Cast<to = 10>(w) y = MatMul(x, a) }"
    assert applied(PASS, onnx_graph(narrower, w=weight.astype(np.float32)))[1] == 1


def test_what_depends_on_data_is_folded_when_its_size_is_bounded() -> None:
    text = "g (int64[1, 2] x) => (int64[1, 2] y) { a = NonZero(w) y = Add(x, a) }"
    check(onnx_graph(text, w=np.float32([0, 1, 0, 1])), ["Add"], 1)


def test_huge_results_are_not_even_computed() -> None:
    text = "g (float[1] x) => (float[] y) { a = ConstantOfShape(s) b = ReduceSum<keepdims = 0>(a) y = Add(x, b) }"
    graph, ctx = onnx_graph(text, check=False, s=np.int64([10**6, 10**6])), context()
    graph.result_nodes[0].args[1].args[0].meta.pop("val")  # as if the type could not be derived
    assert PASS.run(graph, ctx) == 0
    assert "4000000000000 bytes exceed" in refusals(ctx)[0]


# ---- shapes


def test_fixed_sizes_are_constants() -> None:
    text = """g (float[batch, 4, 6] x) => (float[batch, 24] y) {
        s = Shape(x) b = Gather(s, zero) c = Gather(s, one) d = Gather(s, two) m = Mul(c, d)
        ub = Unsqueeze(b, ax) um = Unsqueeze(m, ax) t = Concat<axis = 0>(ub, um) y = Reshape(x, t) }"""
    scalars = {"zero": np.int64(0), "one": np.int64(1), "two": np.int64(2), "ax": np.int64([0])}
    graph = onnx_graph(text, **scalars)
    after = check(graph, ["Shape", "Gather", "Unsqueeze", "Concat", "Reshape"], 1, batch=5)
    assert constants(after) == ["ax", "um", "zero"]


@pytest.mark.parametrize("sizes", [None, {"batch": 16}])
@pytest.mark.parametrize("operator", ["Max", "Min", "Div"])
def test_what_two_sizes_have_in_common_by_chance_is_not_folded(operator: str, sizes: dict[str, int] | None) -> None:
    bound = {"Max": 64, "Min": 1, "Div": 64}[operator]
    text = f"g (float[batch] x) => (int64[1] y) {{ s = Shape(x) a = {operator}(s, k) y = Add(a, o) }}"
    graph = onnx_graph(text, sizes=sizes, k=np.int64([bound]), o=np.int64([1]))
    check(graph, ["Shape", operator, "Add"], 0, batch=100)


def test_a_choice_by_a_comparison_of_sizes_is_not_folded() -> None:
    text = """g (float[batch] x) => (int64[1] y) {
        s = Shape(x) e = Less(s, k) w = Where(e, k, o) y = Neg(w) }"""
    check(onnx_graph(text, k=np.int64([50]), o=np.int64([7])), ["Shape", "Less", "Where", "Neg"], 0, batch=100)


def test_an_output_that_is_a_shape() -> None:
    graph = onnx_graph("g (float[4, 6] x) => (int64[2] y) { y = Shape(x) }")
    after = check(graph, [], 1)
    assert constants(after) == ["y"]


# ---- torch


def test_torch_graphs() -> None:
    graph = torch_graph(lambda x, w: torch.nn.functional.linear(x, (w * 2).t()), torch.randn(4, 2), w=torch.randn(2, 3))
    after = check(graph, ["linear"], 1)
    assert provenance(after.result_nodes[0].args[1])[-1] == "fold-constants"


def test_a_result_is_not_the_models_own_constant() -> None:
    graph = torch_graph(lambda x: (x + 1, torch.zeros(3), torch.ones(4)[None]), torch.randn(2))
    after = check(graph, operators(graph), 0)
    assert after.run([torch.randn(2)])[1].tolist() == [0, 0, 0]


def test_a_large_view_is_left_alone() -> None:
    weight = torch.randn(600, 600)
    graph = torch_graph(lambda x, w: x @ w.t(), torch.randn(4, 600), w=weight)
    assert applied(PASS, graph)[1] == 0
    assert applied(PASS, torch_graph(lambda x, w: x @ w.t(), torch.randn(4, 6), w=weight[:6, :6].clone()))[1] == 1


def test_constants_without_data_are_not_touched() -> None:
    def build(g: fx.Graph, x: fx.Node, c: fx.Node) -> fx.Node:
        return g.call_function(aten.add.Tensor, (x, g.call_function(aten.neg.default, (c,))))

    graph = fx_graph(build, (2,), c=torch.randn(2))
    graph.root.register_buffer("c", torch.empty(2, device="meta"))
    assert PASS.run(graph, context()) == 0


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21])
def test_every_opset(opset: int) -> None:
    text = """g (float[6, 2] x) => (float[6, 2] y) {
        a = Transpose(w) b = Reshape(a, s) c = Concat<axis = 1>(b, b) d = Mul(c, k) y = Add(x, d) }"""
    check(onnx_graph(text, opset, w=WEIGHT, s=np.int64([6, 1]), k=np.float32([2, 3])), ["Add"], 1)


def test_an_untouched_model_is_unchanged() -> None:
    graph = onnx_graph("g (float[2, 3] x) => (float[2, 3] y) { a = Add(x, w) y = Relu(a) }", w=WEIGHT)
    before = to_model(graph).SerializeToString()
    assert PASS.run(graph, context()) == 0
    assert to_model(graph).SerializeToString() == before


def test_value_info_of_a_folded_value_may_stay() -> None:
    model = to_model(onnx_graph("g (float[2, 3] x) => (float[2, 3] y) { a = Neg(w) y = Add(x, a) }", w=WEIGHT))
    inferred = onnx.shape_inference.infer_shapes(model)
    from fxopt.frontends.onnx import load
    from fxopt.ir.shapes import infer

    graph: Any = load(inferred)
    infer(graph)
    check(graph, ["Add"], 1)
