"""Neutral operators: what the builder makes is read back, computes the right thing, and is a valid file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx
import pytest
import torch
from torch import fx

from fxopt.errors import Unsupported
from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph
from fxopt.ir.neutral import names_of, operators, parameters, read
from fxopt.ir.onnx.export import to_model
from fxopt.ir.shapes import infer
from tests.passes.helpers import aten, fx_graph, onnx_graph, run_file, torch_graph

INF = 2**63 - 1


@dataclass(frozen=True)
class Case:
    """`make` gets a builder and inputs x, y (float[2, 3, 4]); `wanted` is the same on tensors."""

    name: str
    make: Callable[[Builder, fx.Node, fx.Node], fx.Node]
    wanted: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    arguments: Callable[[fx.Node, fx.Node], tuple[Any, ...]] | None = None  # what is read; None: made of others


def unary(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    return Case(name, lambda b, x, y: getattr(b, name)(x), lambda x, y: function(x), lambda x, y: (x,))


def binary(name: str, function: Callable[..., torch.Tensor]) -> Case:
    return Case(name, lambda b, x, y: getattr(b, name)(x, y), function, lambda x, y: (x, y))


CASES = [
    *(unary(name, getattr(torch, name)) for name in ("relu", "sigmoid", "tanh", "exp", "neg", "abs", "sin", "cos")),
    unary("erf", torch.erf),
    unary("log", torch.log),
    unary("sqrt", torch.sqrt),
    unary("reciprocal", torch.reciprocal),
    unary("identity", lambda x: x),
    Case("rsqrt", lambda b, x, y: b.rsqrt(x), lambda x, y: torch.rsqrt(x)),
    *(binary(name, getattr(torch, name)) for name in ("add", "sub", "mul", "div", "pow", "maximum", "minimum")),
    Case("add", lambda b, x, y: b.add(x, 2.0), lambda x, y: x + 2),
    Case("sub", lambda b, x, y: b.sub(1.0, x), lambda x, y: 1 - x),
    Case("div", lambda b, x, y: b.div(1.0, x), lambda x, y: 1 / x),
    Case("pow", lambda b, x, y: b.pow(x, 2.0), lambda x, y: x**2),
    Case("maximum", lambda b, x, y: b.maximum(x, 0.5), lambda x, y: x.clamp(min=0.5)),
    Case("minimum", lambda b, x, y: b.minimum(x, 0.5), lambda x, y: x.clamp(max=0.5)),
    Case("cast", lambda b, x, y: b.cast(x, torch.float16), lambda x, y: x.half(), lambda x, y: (x, torch.float16)),
    Case("reshape", lambda b, x, y: b.reshape(x, (6, -1)), lambda x, y: x.reshape(6, 4), lambda x, y: (x, (6, -1))),
    Case(
        "transpose", lambda b, x, y: b.transpose(x, (2, 0, 1)), lambda x, y: x.permute(2, 0, 1),
        lambda x, y: (x, (2, 0, 1)),
    ),
    Case("expand", lambda b, x, y: b.expand(x, (5, 2, 3, 4)), lambda x, y: x.expand(5, 2, 3, 4)),
    Case("expand", lambda b, x, y: b.expand(x, (-1, 3, -1)), lambda x, y: x),
    Case("unsqueeze", lambda b, x, y: b.unsqueeze(x, (1,)), lambda x, y: x[:, None], lambda x, y: (x, (1,))),
    Case("squeeze", lambda b, x, y: b.squeeze(b.unsqueeze(x, (0,)), (0,)), lambda x, y: x),
    Case(
        "slice", lambda b, x, y: b.slice(x, (1,), (INF,), (2,), (2,)), lambda x, y: x[:, :, 1::2],
        lambda x, y: (x, (1,), (INF,), (2,), (2,)),
    ),
    Case("concat", lambda b, x, y: b.concat([x, y], 1), lambda x, y: torch.cat([x, y], 1), lambda x, y: ((x, y), 1)),
    Case("matmul", lambda b, x, y: b.matmul(x, b.transpose(y, (0, 2, 1))), lambda x, y: x @ y.mT),
    Case("softmax", lambda b, x, y: b.softmax(x, -1), lambda x, y: x.softmax(-1), lambda x, y: (x, 2)),
    Case("mean", lambda b, x, y: b.mean(x, (-1, 0)), lambda x, y: x.mean((2, 0)), lambda x, y: (x, (0, 2), False)),
    Case("sum", lambda b, x, y: b.sum(x, (1,)), lambda x, y: x.sum(1), lambda x, y: (x, (1,), False)),
    Case("amax", lambda b, x, y: b.amax(x, (1,), True), lambda x, y: x.amax(1, True), lambda x, y: (x, (1,), True)),
]  # fmt: skip
INPUTS = [torch.rand(2, 3, 4) + 0.5, torch.rand(2, 3, 4) + 0.5]


def two_inputs(origin: str, opset: int) -> tuple[Graph, fx.Node, fx.Node]:
    if origin == "onnx":
        graph = onnx_graph("g (float[2, 3, 4] x, float[2, 3, 4] y) => (float[] z) { z = Relu(x) }", opset, check=False)
    else:
        graph = fx_graph(lambda g, x, y: g.call_function(aten.relu.default, (x,)), (2, 3, 4), (2, 3, 4))
    x, y = graph.placeholders
    return graph, x, y


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("origin", "opset"), [("torch", 0), ("onnx", 11), ("onnx", 13), ("onnx", 18), ("onnx", 22)])
def test_what_the_builder_makes(case: Case, origin: str, opset: int) -> None:
    graph, x, y = two_inputs(origin, opset)
    old = graph.result_nodes[0]
    builder = Builder(graph, old, "a-test")
    made = case.make(builder, x, y)
    graph.replace(old, made)
    graph.fx.lint()
    infer(graph)
    wanted = case.wanted(*INPUTS)
    value = made.meta["val"]
    assert value.shape == wanted.shape and value.dtype == wanted.dtype
    assert builder.dtype(made) == wanted.dtype
    assert torch.allclose(graph.run(INPUTS)[0], wanted, rtol=1e-5 if wanted.dtype == torch.float32 else 1e-2)
    if case.arguments is not None:
        assert case.name in names_of(made)
        assert read(graph, made, case.name) == case.arguments(x, y)
    if origin == "onnx":
        assert graph.model is not None
        kind = 10 if wanted.dtype == torch.float16 else 1
        result = onnx.helper.make_tensor_value_info("z", kind, list(wanted.shape))
        graph.model.proto.graph.output[0].CopyFrom(result)
        file = to_model(graph)
        onnx.checker.check_model(file, full_check=True)
        found = run_file(file, INPUTS)
        assert found is None or torch.allclose(torch.from_numpy(found[0].copy()), wanted, rtol=1e-3)


def test_every_operator_has_a_signature_and_readers_give_as_many_arguments() -> None:
    for name in operators():
        signature = parameters(name)
        assert signature.parameters, name
        method = getattr(Builder, name, None)
        if method is not None:
            assert list(inspect.signature(method).parameters)[1:] == list(signature.parameters)
            assert method.__doc__
    made = {name for name, value in vars(Builder).items() if callable(value) and not name.startswith("_")}
    helpers = {"call", "onnx", "const", "ints", "discard", "dtype", "shape", "linear", "with_weight"}
    assert made - helpers <= operators()


ONNX_SPELLINGS = [
    ("y = Transpose(x)", "transpose", ("x", (2, 1, 0))),
    ("s = Constant<value_ints = [0, -1]>() y = Reshape(x, s)", "reshape", ("x", (2, -1))),
    ("y = Flatten(x)", "reshape", ("x", (2, 12))),
    ("y = Flatten<axis = 0>(x)", "reshape", ("x", (1, 24))),
    ("y = Softmax(x)", "softmax", ("x", 2)),
    ("y = ReduceMean(x)", "mean", ("x", (0, 1, 2), True)),
    ("y = Concat<axis = -1>(x, x)", "concat", (("x", "x"), 2)),
    ("y = Dropout(x)", "identity", ("x",)),
    ("y = Sum(x)", "identity", ("x",)),
    ("y = Cast<to = 10>(x)", "cast", ("x", torch.float16)),
    ("y = Cast<to = 10, saturate = 0>(x)", "cast", None),
    ("y = my.domain.Relu(x)", "relu", None),
    ("y = Max(x, x, x)", "maximum", None),
    ("a = Constant<value_ints = [1]>() y = Squeeze(x, a)", "squeeze", ("x", (1,))),
    ("a = Constant<value_ints = [-1]>() y = Unsqueeze(x, a)", "unsqueeze", ("x", (3,))),
    (
        "s = Constant<value_ints = [0]>() e = Constant<value_ints = [2]>() y = Slice(x, s, e)", "slice",
        ("x", (0,), (2,), (0,), (1,)),
    ),
    ("p = Constant<value_ints = [0, 0, 1, 0, 0, 2]>() y = Pad(x, p)", "pad", ("x", (0, 0, 1, 0, 0, 2))),
    ("y = ReduceMean<noop_with_empty_axes = 1>(x)", "mean", None),
]  # fmt: skip


@pytest.mark.parametrize(("body", "name", "wanted"), ONNX_SPELLINGS, ids=lambda value: str(value)[:30])
def test_onnx_spellings(body: str, name: str, wanted: Any) -> None:
    graph = onnx_graph(f"g (float[2, 3, 4] x) => (float[] y) {{ {body} }}", check=False)
    found = read(graph, graph.result_nodes[0], name)
    assert (found if found is None else named(found)) == wanted


TORCH_SPELLINGS: list[tuple[Callable[..., Any], str, Any]] = [
    (lambda x: x.transpose(1, -1), "transpose", ("inputs_0", (0, 2, 1))),
    (lambda x: x.permute(-1, 0, 1), "transpose", ("inputs_0", (2, 0, 1))),
    (lambda x: x[0].t(), "transpose", ("select", (1, 0))),
    (lambda x: x.reshape(6, 4), "reshape", ("inputs_0", (6, 4))),
    (lambda x: 1 - x, "sub", (1, "inputs_0")),
    (lambda x: torch.add(x, x, alpha=2), "add", None),
    (lambda x: x.sum(), "sum", ("inputs_0", (0, 1, 2), False)),
    (lambda x: x.mean((0, -1), dtype=torch.float64), "mean", None),
    (lambda x: x.double(), "cast", ("inputs_0", torch.float64)),
    (lambda x: torch.softmax(x, 1, dtype=torch.float64), "softmax", None),
    (lambda x: torch.nn.functional.pad(x, (1, 2)), "pad", ("inputs_0", (0, 0, 1, 0, 0, 2))),
    (lambda x: x[:, 1:], "slice", ("inputs_0", (1,), (INF,), (1,), (1,))),
    (lambda x: x.div(x, rounding_mode="floor"), "div", None),
    (lambda x: x.unsqueeze(-1), "unsqueeze", ("inputs_0", (3,))),
]


@pytest.mark.parametrize("index", range(len(TORCH_SPELLINGS)))
def test_torch_spellings(index: int) -> None:
    function, name, wanted = TORCH_SPELLINGS[index]
    graph = torch_graph(function, torch.rand(2, 3, 4))
    found = read(graph, graph.result_nodes[0], name)
    assert (found if found is None else named(found)) == wanted


def named(value: Any) -> Any:
    """Nodes by name."""
    if isinstance(value, (tuple, list)):
        return tuple(named(item) for item in value)
    return value.name if isinstance(value, fx.Node) else value


def test_integers_are_not_divided_as_floats_are() -> None:
    graph = onnx_graph("g (int64[2] x) => (int64[2] y) { y = Div(x, x) }")
    assert read(graph, graph.result_nodes[0], "div") is None


def test_dynamic_sizes_are_inferred() -> None:
    graph = onnx_graph(
        "g (float[batch, 3] x) => (float[batch, 1, 3] y) { y = Reshape(x, s) }", s=torch.tensor([0, 1, 3])
    )
    assert named(read(graph, graph.result_nodes[0], "reshape")) == ("x", (-1, 1, 3))
    two = onnx_graph(
        "g (float[a, b, 3] x) => (float[a, b, 1, 3] y) { y = Reshape(x, s) }", s=torch.tensor([0, 0, 1, 3])
    )
    assert named(read(two, two.result_nodes[0], "reshape")) == ("x", "c_s")


def test_what_an_opset_lacks_is_said() -> None:
    graph, x, _ = two_inputs("onnx", 6)
    builder = Builder(graph, graph.result_nodes[0], "a-test")
    with pytest.raises(Unsupported, match="Add of opset 6; opset 7 or later is needed"):
        builder.add(x, x)
    with pytest.raises(Unsupported, match="has no operator Erf"):
        builder.erf(x)
    graph, x, _ = two_inputs("onnx", 13)
    with pytest.raises(Unsupported, match="size 0, which Reshape knows since opset 14"):
        Builder(graph, graph.result_nodes[0], "a-test").reshape(x, (0, 4))


def test_a_number_takes_the_element_type_of_the_other_operand() -> None:
    graph = onnx_graph("g (float16[2] x) => (float16[2] y) { y = Relu(x) }")
    made = Builder(graph, graph.result_nodes[0], "a-test").mul(graph.placeholders[0], 3)
    assert graph.constant(made.args[1]) == torch.tensor(3, dtype=torch.float16)


@pytest.mark.parametrize("origin", ["torch", "onnx"])
@pytest.mark.parametrize("rank", [2, 3])
def test_linear(origin: str, rank: int) -> None:
    shape = (5, 4) if rank == 2 else (2, 5, 4)
    if origin == "onnx":
        graph = onnx_graph(f"g (float[{', '.join(map(str, shape))}] x) => (float[] y) {{ y = Relu(x) }}", check=False)
    else:
        graph = fx_graph(lambda g, x: g.call_function(aten.relu.default, (x,)), shape)
    weight, bias, x = torch.randn(3, 4), torch.randn(3), torch.randn(shape)
    old = graph.result_nodes[0]
    made = Builder(graph, old, "a-test").linear(graph.placeholders[0], weight, bias, "fc")
    graph.replace(old, made)
    graph.fx.lint()
    assert torch.allclose(graph.run([x])[0], torch.nn.functional.linear(x, weight, bias), atol=1e-6)


def test_discard_leaves_nothing() -> None:
    graph, x, _ = two_inputs("onnx", 20)
    count = len(graph.fx.nodes)
    builder = Builder(graph, graph.result_nodes[0], "a-test")
    builder.reshape(builder.add(x, 1.0), (24,))
    builder.discard()
    assert len(graph.fx.nodes) == count
