"""remove-identities: each rule fires, does not fire with its reason, and changes no bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxopt.ir.graph import Graph
from fxopt.ir.matching import why_not
from fxopt.ir.onnx.export import to_model
from fxopt.ir.structural_hash import first_difference
from fxopt.passes.remove_identities import RemoveIdentities
from fxopt.passes.rules.drop_identity import DropIdentity
from fxopt.passes.rules.drop_positive_zero import DropPositiveZero
from fxopt.passes.rules.drop_same_cast import DropSameCast
from fxopt.passes.rules.drop_same_shape import DropSameShape
from tests.passes.helpers import (
    applied,
    assert_same_bits,
    aten,
    context,
    fx_graph,
    onnx_graph,
    operators,
    refusals,
    samples_of,
    torch_graph,
)

PASS = RemoveIdentities()
I32, INT_MAX = 2**31 - 1, 2**63 - 1


def check(graph: Graph, wanted: list[str], step: RemoveIdentities = PASS, **sizes: int) -> Graph:
    """The operators that are left; not a bit of the outputs changes."""
    samples = samples_of(graph, **sizes)
    after, count = applied(step, graph, samples)
    assert operators(after) == wanted
    assert count == 0 or len(operators(graph)) > len(wanted) or operators(graph) != wanted
    assert_same_bits(graph, after, samples)
    return after


# ---- ONNX: body, constants, what is left

TWO = np.float32(2)
FIRES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "identity": ("a = Identity(x) y = Relu(a)", {}, ["Relu"]),
    "identity at the end": ("a = Relu(x) y = Identity(a)", {}, ["Relu"]),
    "identity chain": ("a = Identity(x) b = Identity(a) c = Identity(b) y = Relu(c)", {}, ["Relu"]),
    "dropout": ("a = Dropout(x) y = Relu(a)", {}, ["Relu"]),
    "dropout with a mask that nobody uses": ("a, m = Dropout(x) y = Relu(a)", {}, ["Relu"]),
    "dropout that says that it does not train": (
        "a = Dropout(x, r, t) y = Relu(a)", {"r": np.float32(0.5), "t": np.bool_(False)}, ["Relu"],
    ),
    "concat of one": ("a = Concat<axis = 0>(x) y = Relu(a)", {}, ["Relu"]),
    "sum of one": ("a = Sum(x) b = Max(a) y = Relu(b)", {}, ["Relu"]),
    "cast": ("a = Cast<to = 1>(x) y = Relu(a)", {}, ["Relu"]),
    "casts there and back": ("a = Cast<to = 11>(x) b = Cast<to = 1>(a) y = Relu(b)", {}, ["Relu"]),
    "casts further": (
        "h = Cast<to = 10>(x) a = Cast<to = 1>(h) b = Cast<to = 11>(a) c = Relu(b) y = Cast<to = 1>(c)", {},
        ["Cast", "Cast", "Relu", "Cast"],
    ),
    "times one": ("a = Mul(x, c) b = Mul(c, a) y = Relu(b)", {"c": np.ones((2, 3), np.float32)}, ["Relu"]),
    "divided by one": ("a = Div(x, c) y = Relu(a)", {"c": np.float32(1)}, ["Relu"]),
    "to the first power": ("a = Pow(x, c) y = Relu(a)", {"c": np.int64(1)}, ["Relu"]),
    "minus zero": ("a = Sub(x, c) y = Relu(a)", {"c": np.float32([0])}, ["Relu"]),
    "plus minus zero": ("a = Add(c, x) y = Relu(a)", {"c": np.float32(-0.0)}, ["Relu"]),
    "transposes that cancel": ("a = Transpose(x) b = Transpose(a) y = Relu(b)", {}, ["Relu"]),
    "transpose of nothing": ("a = Transpose<perm = [0, 1]>(x) y = Relu(a)", {}, ["Relu"]),
    "reshapes": (
        "a = Reshape(x, s) b = Reshape(a, t) c = Reshape(b, u) y = Relu(c)",
        {"s": np.int64([6]), "t": np.int64([3, -1]), "u": np.int64([2, 3])}, ["Relu"],
    ),
    "reshape to the same": ("a = Reshape(x, s) y = Relu(a)", {"s": np.int64([0, -1])}, ["Relu"]),
    "expand to the same": ("a = Expand(x, s) y = Relu(a)", {"s": np.int64([1, 3])}, ["Relu"]),
    "unsqueeze and squeeze": ("a = Unsqueeze(x, d) b = Squeeze(a, d) y = Relu(b)", {"d": np.int64([0, 2])}, ["Relu"]),
    "slice of all": (
        "a = Slice(x, s, e) y = Relu(a)", {"s": np.int64([0, 0]), "e": np.int64([2, 99])}, ["Relu"],
    ),
    "pad by nothing": ("a = Pad(x, p) y = Relu(a)", {"p": np.int64([0, 0, 0, 0])}, ["Relu"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRES)
def test_fires_in_onnx(name: str) -> None:
    body, constants, wanted = FIRES[name]
    check(onnx_graph(f"g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}", **constants), wanted)


STAYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dropout in training": (
        "a, m = Dropout(x, r, t) y = Relu(a)", {"r": np.float32(0.0), "t": np.bool_(True)}, "",
    ),
    "another cast": ("h = Cast<to = 10>(x) y = Cast<to = 1>(h)", {}, ""),
    "times two": ("y = Mul(x, c)", {"c": np.float32(2)}, ""),
    "times ones that broadcast": (
        "r = ReduceSum<keepdims = 1>(x, d) y = Mul(r, c)", {"c": np.ones((2, 3), np.float32), "d": np.int64([0])},
        r"n_y changes float32\[1, 3\] to float32\[2, 3\]",
    ),
    "plus zero": ("y = Add(x, c)", {"c": np.float32(0)}, r"x \+ 0.0 turns -0.0 into 0.0"),
    "minus minus zero": ("y = Sub(x, c)", {"c": np.float32(-0.0)}, r"x \+ 0.0 turns -0.0 into 0.0"),
    "zero minus": ("y = Sub(c, x)", {"c": np.float32(0)}, ""),
    "one divided by": ("y = Div(c, x)", {"c": np.float32(1)}, ""),
    "reversed slice": (
        "y = Slice(x, s, e, d, t)",
        {"s": np.int64([-1]), "e": np.int64([-99]), "d": np.int64([1]), "t": np.int64([-1])}, "",
    ),
    "shifting pad": ("y = Pad(x, p)", {"p": np.int64([0, 1, 0, -1])}, ""),
    "a single transpose": ("a = Transpose(x) b = Relu(a) y = Transpose(b)", {}, ""),
    "a reshape by a shape that copies": (
        "f = Cast<to = 7>(x) k = ReduceMin<keepdims = 0>(f) o = Mul(k, z) n = Add(o, s) "
        "a = Reshape(x, u) y = Reshape(a, n)",
        {"z": np.int64(0), "s": np.int64([2, 3]), "u": np.int64([3, 2])}, "the shape .* is computed at run time",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_stays_in_onnx(name: str) -> None:
    body, constants, reason = STAYS[name]
    graph, ctx = onnx_graph(f"g (float[2, 3] x) => (float[2, 3] y) {{ {body} }}", **constants), context()
    after, count = applied(PASS, graph, (), ctx)
    assert count == 0 and first_difference(graph, after) == ""
    assert bool(reason) == bool(refusals(ctx))
    assert not reason or any(re.match(reason, text) for text in refusals(ctx)), refusals(ctx)


# ---- torch


TORCH_FIRES: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "dropout": (lambda x: torch.relu(nn.functional.dropout(x, 0.5, False)), ["relu"]),
    "clone": (lambda x: torch.relu(x.clone()), ["relu"]),
    "detach": (lambda x: torch.relu(x.detach()), ["relu"]),
    "concat of one": (lambda x: torch.relu(torch.cat([x])), ["relu"]),
    "same cast": (lambda x: torch.relu(x.to(torch.float32)), ["relu"]),
    "casts there and back": (lambda x: torch.relu(x.double().float()), ["relu"]),
    "times one": (lambda x: torch.relu((1 * x * 1.0) / 1), ["relu"]),
    "minus zero": (lambda x: torch.relu(x - 0), ["relu"]),
    "to the first power": (lambda x: torch.relu(x**1), ["relu"]),
    "transposes": (lambda x: torch.relu(x.t().transpose(0, 1)), ["relu"]),
    "permutes": (
        lambda x: torch.relu(x.unsqueeze(0).permute(1, 2, 0).permute(1, 2, 0)),
        ["unsqueeze", "permute", "relu"],
    ),
    "views": (lambda x: torch.relu(x.view(6).view(3, 2).view(2, 3)), ["relu"]),
    "expand": (lambda x: torch.relu(x.expand(-1, 3)), ["relu"]),
    "unsqueeze": (lambda x: torch.relu(x.unsqueeze(1).squeeze(1)), ["relu"]),
    "slice": (lambda x: torch.relu(x[:, :]), ["relu"]),
    "pad": (lambda x: torch.relu(nn.functional.pad(x, (0, 0, 0, 0))), ["relu"]),
    "a copy that makes a result": (lambda x: torch.relu(x).clone(), ["relu"]),
}


@pytest.mark.parametrize("name", TORCH_FIRES)
def test_fires_in_torch(name: str) -> None:
    function, wanted = TORCH_FIRES[name]
    check(torch_graph(function, torch.randn(2, 3)), wanted)


@pytest.mark.parametrize("name", ["times one", "minus zero", "to the first power"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fires_in_low_precision(name: str, dtype: torch.dtype) -> None:
    function, wanted = TORCH_FIRES[name]
    check(torch_graph(function, torch.randn(2, 3, dtype=dtype)), wanted)


TORCH_STAYS: dict[str, tuple[Callable[..., Any], str]] = {
    "plus zero": (lambda x: torch.relu(x + 0), "turns -0.0 into 0.0"),
    "a copy that makes contiguous": (
        lambda x: torch.relu(x.t().contiguous()),
        r"changes the strides from \(1, 3\) to \(2, 1\)",
    ),
    "a copy of an input": (lambda x: x.clone(), "the result would share the memory of inputs_0"),
    "an input times one, viewed": (lambda x: (x * 1).view(6), "the result would share the memory of inputs_0"),
    "an integer to a float": (lambda x: torch.relu(x.int() / 1), "changes int32"),
}


@pytest.mark.parametrize("name", TORCH_STAYS)
def test_stays_in_torch(name: str) -> None:
    function, reason = TORCH_STAYS[name]
    graph, ctx = torch_graph(function, torch.randn(2, 3)), context()
    step = RemoveIdentities()
    after = graph.copy()
    step.run(after, ctx)
    assert not reason or any(re.search(reason, text) for text in refusals(ctx)), refusals(ctx)
    kept = operators(graph)[-1]
    assert kept in operators(after)


def test_a_result_does_not_become_a_view_of_an_input() -> None:
    def build(g: fx.Graph, x: fx.Node) -> Any:
        return g.call_function(aten.clone.default, (g.call_function(aten.t.default, (x,)),))

    graph, ctx = fx_graph(build, (2, 3)), context()
    assert applied(PASS, graph, samples_of(graph), ctx)[1] == 0
    assert refusals(ctx) == ["the result would share the memory of x0"]


def test_promotion_stays() -> None:
    graph, ctx = (
        torch_graph(lambda x, c: torch.relu(x * c), torch.randn(2), c=torch.ones(1, dtype=torch.float64)),
        context(),
    )
    assert applied(PASS, graph, samples_of(graph), ctx)[1] == 0
    assert refusals(ctx) == ["mul changes float32[2] to float64[2]"]


def test_two_results_do_not_become_one_tensor() -> None:
    def build(g: fx.Graph, x: fx.Node) -> Any:
        r = g.call_function(aten.relu.default, (x,))
        return r, g.call_function(aten.mul.Tensor, (r, 1))

    graph, ctx = fx_graph(build, (2, 3)), context()
    applied(PASS, graph, samples_of(graph), ctx)
    assert refusals(ctx) == ["two results would share the memory of relu_default"]


def test_strides_that_a_view_needs_stay() -> None:
    graph = torch_graph(lambda x: (x.expand(4, 3).clone()).view(12), torch.randn(1, 3))
    check(graph, operators(graph))


def test_signed_zeros_may_be_given_up() -> None:
    graph = onnx_graph("g (float[2] x) => (float[2] y) { a = Add(x, z) y = Relu(a) }", z=np.float32(0))
    after, count = applied(RemoveIdentities(signed_zeros=False), graph, samples_of(graph))
    assert count == 1 and operators(after) == ["Relu"]
    integers = onnx_graph("g (int64[2] x) => (int64[2] y) { a = Add(x, z) y = Neg(a) }", z=np.int64(0))
    check(integers, ["Neg"])


def test_minus_zero_and_nan_survive() -> None:
    graph = onnx_graph(
        "g (float[4] x) => (float[4] y) { a = Sub(x, z) b = Mul(a, o) c = Add(b, n) y = Reciprocal(c) }",
        z=np.float32(0), o=np.float32(1), n=np.float32(-0.0),
    )  # fmt: skip
    after, count = applied(PASS, graph)
    assert count == 3
    assert_same_bits(graph, after, [[torch.tensor([-0.0, 0.0, float("nan"), float("inf")])]])


# ---- names, captured values, dynamic sizes


def test_names_of_outputs_and_of_untouched_nodes_stay() -> None:
    graph = onnx_graph("g (float[2] x) => (float[2] y, float[2] z) { a = Relu(x) y = Identity(a) z = Neg(y) }")
    after, count = applied(PASS, graph, samples_of(graph))
    file = to_model(after)
    assert count == 1
    assert [(node.name, list(node.input), list(node.output)) for node in file.graph.node] == [
        ("n_a", ["x"], ["y"]), ("n_z", ["y"], ["z"]),
    ]  # fmt: skip


RENAMED: dict[str, tuple[str, list[str], str]] = {
    "an input": ("y = Identity(x) a = Identity(x) z = Identity(a)", ["Identity", "Identity"], "a result that is x needs"),
    "a constant": ("y = Relu(x) z = Identity(c)", ["Relu", "Identity"], "a result that is c needs an operator"),
    "a result": ("y = Relu(x) z = Identity(y)", ["Relu", "Identity"], "n_y is a result already"),
}


@pytest.mark.parametrize("name", RENAMED)
def test_a_result_that_is_another_value_needs_its_identity(name: str) -> None:
    """Without it the file would get another one in its place, without what this one says."""
    body, wanted, reason = RENAMED[name]
    text, ctx = f"g (float[2] x) => (float[2] y, float[2] z) {{ {body} }}", context()
    graph = onnx_graph(text, c=np.float32([1, 2]))
    model = to_model(graph)
    after, count = applied(PASS, graph, samples_of(graph), ctx)
    assert operators(after) == wanted and count == (1 if name == "an input" else 0)
    assert any(text.startswith(reason) for text in refusals(ctx)), refusals(ctx)
    kept = list(to_model(after).graph.node)
    assert kept[0] == model.graph.node[0] and len(kept) == 2


def test_an_input_may_become_an_output() -> None:
    """A Slice of all is an Identity then."""
    graph = onnx_graph("g (float[2] x) => (float[2] y) { y = Slice(x, s, e) }", s=np.int64([0]), e=np.int64([I32]))
    after, count = applied(PASS, graph, samples_of(graph))
    assert count == 1 and operators(after) == []
    assert [node.op_type for node in to_model(after).graph.node] == ["Identity"]


def test_captured_values_keep_their_names() -> None:
    text = """g (float[2] x, bool c) => (float[2] y) {
        a = Identity(x) b = Relu(a) d = Identity(b)
        y = If (c) <then_branch = t () => (float[2] p) { p = Add(d, a) },
                    else_branch = e () => (float[2] q) { q = Neg(d) }>
    }"""
    graph = onnx_graph(text)
    after, count = applied(PASS, graph, [])
    assert count == 2 and operators(after) == ["Relu", "If"]


@pytest.mark.parametrize(
    "body",
    [
        'a = Identity("") y = Relu(x)',
        "p = Constant<value_ints = [0]>() a = Pad(x, p) y = Relu(a)",
        "s = Constant<value_ints = [0]>() e = Constant<value_ints = [9, 9]>() y = Slice(x, s, e)",
        "s = Constant<value_ints = [0, 0]>() e = Constant<value_ints = [9, 9]>() d = Constant<value_ints = [0]>() "
        "y = Slice(x, s, e, d)",
    ],
)
def test_operators_that_nobody_may_write_are_left_alone(body: str) -> None:
    graph = onnx_graph(f"g (float[2, 3] x) => (float[2, 3] y) <float[4, 5] a> {{ {body} }}", check=False)
    before = operators(graph)
    assert PASS.run(graph, context()) == 0 and operators(graph) == before


def test_a_transpose_without_axes_is_left_alone() -> None:
    graph = onnx_graph("g (float[2, 3] x) => (float[3, 2] y) { y = Transpose(x) }", check=False)
    (node,) = graph.calls()
    node.update_kwarg("perm", ())
    assert PASS.run(graph, context()) == 0 and operators(graph) == ["Transpose"]


def test_a_dropout_mask_in_use_keeps_the_dropout() -> None:
    graph = onnx_graph("g (float[2] x) => (float[2] y, bool[2] m) { a, m = Dropout(x) y = Relu(a) }")
    after, count = applied(PASS, graph, samples_of(graph))
    assert count == 1 and operators(after) == ["Dropout", "Relu"]


def test_reshapes_by_the_size_of_a_dynamic_axis() -> None:
    text = """g (float[batch, 3] x) => (float[batch, 3] y) {
        s = Shape<start = 0, end = 1>(x) t = Concat<axis = 0>(s, k) a = Reshape(x, t) y = Relu(a) }"""
    check(onnx_graph(text, k=np.int64([3])), ["Relu"], batch=5)


@pytest.mark.parametrize("sizes", [None, {"batch": 4}])
def test_a_slice_that_happens_to_take_all_stays(sizes: dict[str, int] | None) -> None:
    text = "g (float[batch, 3] x) => (float[k, 3] y) { y = Slice(x, s, e) }"
    graph = onnx_graph(text, s=np.int64([0]), e=np.int64([9]), sizes=sizes)
    check(graph, ["Slice"], batch=12)
    open_end = onnx_graph(text, s=np.int64([0]), e=np.int64([I32]), sizes=sizes)
    check(open_end, [], batch=12)
    by_size = """g (float[batch, 3] x) => (float[k, 3] y) {
        e = Shape<end = 1>(x) m = Min(e, nine) y = Slice(x, s, m) }"""
    graph = onnx_graph(by_size, s=np.int64([0]), nine=np.int64([9]), sizes=sizes)
    check(graph, ["Shape", "Min", "Slice"], batch=12)
    check(
        onnx_graph(by_size.replace("m = Min(e, nine)", "m = Identity(e)"), s=np.int64([0]), sizes=sizes), [], batch=12
    )


def test_an_expand_by_a_computed_shape_stays() -> None:
    text = """g (float[batch, 3] x, int64[2] s) => (float[k, 3] y) { y = Expand(x, s) }"""
    graph = onnx_graph(text)
    after, count = applied(PASS, graph)
    assert count == 0 and operators(after) == ["Expand"]
    assert why_not(graph, DropSameShape(), graph.result_nodes[0]) is not None


def test_dynamic_sizes_in_torch() -> None:
    graph = torch_graph(
        lambda x: torch.relu(x.view(x.shape[0], 3)[:, :].expand(x.shape[0], 3)),
        torch.randn(5, 3),
        dynamic={"inputs": ({0: "batch"},)},
    )
    check(graph, ["relu"], batch=7)
    cut = torch_graph(lambda x: torch.relu(x[:9]), torch.randn(5, 3), dynamic={"inputs": ({0: "batch"},)})
    check(cut, ["relu"], batch=7)  # the capture limited the batch to 8


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 21])
def test_every_opset(opset: int) -> None:
    text = """g (float[2, 3] x) => (float[3, 2] y) {
        a = Identity(x) b = Transpose(a) c = Transpose(b) d = Reshape(c, s) e = Reshape(d, t) f = Dropout(e) y = Relu(f) }"""
    graph = onnx_graph(text, opset, s=np.int64([6]), t=np.int64([3, 2]))
    check(graph, ["Reshape", "Relu"])


def test_why_not() -> None:
    graph = onnx_graph("g (float[2] x) => (float[2] y) { y = Add(x, z) }", z=np.float32(0))
    root = graph.result_nodes[0]
    assert "turns -0.0" in str(why_not(graph, DropPositiveZero(), root))
    assert str(why_not(graph, DropIdentity(), root)) == "expected identity, found n_y (Add)"
    cast = onnx_graph("g (float[2] x) => (float16[2] y) { y = Cast<to = 10>(x) }")
    assert str(why_not(cast, DropSameCast(), cast.result_nodes[0])) == "x is cast from torch.float32 to torch.float16"
