"""Shapes of inputs given from outside, and types of values that the file does not declare."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fxopt.errors import InvalidInput, InvalidOption
from fxopt.frontends.input_shapes import MOST, elements, override, parse
from fxopt.frontends.onnx import load
from fxopt.ir import shapes
from fxopt.ir.onnx.export import to_model


def model(x: list[Any] | None, y: list[Any] | None = None) -> onnx.ModelProto:
    """z = relu(x + y) of x and y."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "y"], ["s"]), helper.make_node("Relu", ["s"], ["z"])],
        "sum",
        [info("x", TensorProto.FLOAT, x), info("y", TensorProto.FLOAT, x if y is None else y)],
        [info("z", TensorProto.FLOAT, x)],
        value_info=[info("s", TensorProto.FLOAT, x)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def dims(value: onnx.ValueInfoProto) -> list[Any]:
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in value.type.tensor_type.shape.dim]


def test_a_size_holds_for_every_place_of_its_name() -> None:
    graph = load(model(["n", 3, "k"]), input_shapes={"x": (2, 3, None)})
    assert [spec.shape for spec in (*graph.inputs, *graph.outputs)] == [(2, 3, "k")] * 3
    written = to_model(graph)
    body = written.graph
    assert [dims(value) for value in (*body.input, *body.value_info, *body.output)] == [[2, 3, "k"]] * 4
    onnx.checker.check_model(written, full_check=True)
    shapes.infer(graph)
    (relu,) = [node for node in graph.calls() if node.target.op_type == "Relu"]  # type: ignore[union-attr]
    assert shapes.dims_of(graph, relu) == (2, 3, "k")


def test_names_are_given_and_joined() -> None:
    graph = load(model(["n", None], ["m", None]), input_shapes={"x": ("rows", "width"), "y": ("rows", 7)})
    assert [spec.shape for spec in graph.inputs] == [("rows", "width"), ("rows", 7)]


def test_unknown_rank_is_given() -> None:
    graph = load(model(None), check=False, input_shapes={"x": (2, "k"), "y": (2, "k")})
    assert [dims(value) for value in to_model(graph).graph.input] == [[2, "k"], [2, "k"]]


def test_types_that_were_inferred_are_dropped() -> None:
    graph = load(model(["n", 3]))
    shapes.infer(graph)
    override(graph, {"x": (5, 3)})
    shapes.infer(graph)
    assert {tuple(node.meta["val"].shape) for node in graph.calls()} == {(5, 3)}


def test_without_shapes_nothing_changes() -> None:
    source = model(["n", 3])
    assert to_model(load(source, input_shapes={"x": (None, 3)})) == source


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"X": (1, 3)}, r"unknown input 'X'. Known: x, y"),
        ({"x": (1, 3, 4)}, r"'x': the given shape \[1, 3, 4\] has 3 dimensions, the model's has 2"),
        ({"x": (1, 4)}, r"'x': .* contradicts the model, whose dimension 1 is fixed at 3"),
        ({"x": (1, "k")}, r"'x': .* contradicts the model, whose dimension 1 is fixed at 3"),
        ({"x": (0, 3)}, r"'x': dimension 0 of the given shape is 0; expected a positive integer"),
        ({"x": (1.5, 3)}, r"'x': dimension 0 of the given shape is 1.5; expected a positive integer"),
        ({"x": (True, 3)}, r"'x': dimension 0 of the given shape is True; expected a positive integer"),
        ({"x": ("a b", 3)}, r"'x': dimension 0 of the given shape is 'a b'; expected a positive integer, a name"),
        ({"x": (1, 3), "y": (2, 3)}, r"'y': dimension 0 is 'n', which another given shape makes 1, not 2"),
    ],
)
def test_refuses(given_: dict[str, Any], message: str) -> None:
    source = model(["n", 3])
    graph = load(source)
    with pytest.raises(InvalidInput, match=message):
        override(graph, given_)
    assert to_model(graph) == source


def test_parse() -> None:
    texts = ["x:1,3,224,224", "ids:[batch, 128]", "a:b:?,n", "scalar:"]
    assert parse(texts) == {"x": (1, 3, 224, 224), "ids": ("batch", 128), "a:b": (None, "n"), "scalar": ()}


@pytest.mark.parametrize("text", ["x", ":1", "x:1,-2", "x:1.5", "x:1,,2", "x:0", "x:1,2;3", "x:²"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(InvalidOption, match="--input-shape"):
        parse([text])


def test_parse_refuses_an_input_twice() -> None:
    with pytest.raises(InvalidOption, match="'x' is given twice"):
        parse(["x:1", "x:2"])


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from([1, 7, 384, 10**9]), st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True), st.none())))
def test_parse_reads_what_is_written(shape: list[Any]) -> None:
    text = "x:" + ",".join("?" if dim is None else str(dim) for dim in shape)
    if elements(shape) <= MOST:
        assert parse([text]) == {"x": tuple(shape)}
    else:
        with pytest.raises(InvalidOption, match="elements; expected at most"):
            parse([text])


def test_types_behind_strings() -> None:
    """Fake tensors hold no strings; ONNX's inference knows what a split of them gives."""
    info = helper.make_tensor_value_info
    nodes = [
        helper.make_node("StringSplit", ["x"], ["parts", "counts"], delimiter=" "),
        helper.make_node("Cast", ["counts"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["real", "y"], ["z"]),
    ]
    graph_proto = helper.make_graph(
        nodes,
        "split",
        [info("x", TensorProto.STRING, ["n", 3]), info("y", TensorProto.FLOAT, ["n", 3])],
        [info("z", TensorProto.FLOAT, ["n", None])],
    )
    source = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    graph = load(source)
    assert to_model(graph) == source
    shapes.infer(graph)
    (total,) = [node for node in graph.calls() if node.target.op_type == "Add"]  # type: ignore[union-attr]
    assert total.meta["val"].dtype == torch.float32
    assert shapes.dims_of(graph, total) == ("n", 3)
