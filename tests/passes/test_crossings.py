"""Where values are converted, for any choice of the layers that are computed in 8 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fxopt.frontends.onnx import load
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.crossings import _BYTES, _POOLED, Crossings, crossings
from fxopt.passes.quantize_linear import QuantizeLinear
from tests.passes.test_quantize_linear import VNNI

SMALL, LARGE = 1 * 4 * 4 * 4, 1 * 4 * 8 * 8


def network() -> onnx.ModelProto:
    """x -> a -> Relu -> MaxPool -> (b -> Add <- c) -> Relu -> d -> y: convolutions of four channels."""
    random = np.random.default_rng(0)
    weights = {f"w{name}": random.normal(size=(4, 4, 1, 1)).astype(np.float32) for name in "abcd"}
    nodes = [
        helper.make_node("Conv", ["x", "wa"], ["a0"], name="a"),
        helper.make_node("Relu", ["a0"], ["a1"]),
        helper.make_node("MaxPool", ["a1"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["p", "wb"], ["b0"], name="b"),
        helper.make_node("Conv", ["p", "wc"], ["c0"], name="c"),
        helper.make_node("Add", ["b0", "c0"], ["s"], name="add"),
        helper.make_node("Relu", ["s"], ["s1"]),
        helper.make_node("Conv", ["s1", "wd"], ["y"], name="d"),
    ]
    body = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def found() -> tuple[Crossings, dict[str, str]]:
    """The conversions, with seconds that are bytes, and the nodes of the layers."""
    graph = load(network())
    infer(graph, {})
    step = QuantizeLinear()
    offered = [item for item in step.candidates(graph, Context(VNNI)) if item.refusal is None]
    levels: dict[str, Any] = {item.node: step.fixed_levels(graph, item) for item in offered}
    made = crossings(graph, levels, lambda cost: cost.bytes)
    assert made is not None and len(offered) == 4
    return made, {item.anchor: item.node for item in offered}


@pytest.mark.parametrize(
    ("taken", "elements", "pooled"),
    [
        ("", 0, 0),
        ("abcd", LARGE + SMALL, 0),  # the input and the output
        ("bcd", SMALL + SMALL, LARGE),  # behind the pooling, which then works on codes
        ("bd", 4 * SMALL, 0),  # the pooled value and what b gives; the sum, and the output
        ("d", 2 * SMALL, 0),
        ("a", LARGE + SMALL, 0),  # the pooling works on codes
    ],
)
def test_values_that_cross_are_counted(
    found: tuple[Crossings, dict[str, str]], taken: str, elements: int, pooled: int
) -> None:
    conversions, names = found
    seconds, lone = conversions.of([names[layer] for layer in taken])
    assert seconds == _BYTES * elements + _POOLED * pooled and not lone


def test_a_convolution_between_levels_is_quantised_anyway(found: tuple[Crossings, dict[str, str]]) -> None:
    conversions, names = found
    graph = load(chain())
    infer(graph, {})
    step = QuantizeLinear()
    offered = [item for item in step.candidates(graph, Context(VNNI)) if item.refusal is None]
    levels: dict[str, Any] = {item.node: step.fixed_levels(graph, item) for item in offered}
    made = crossings(graph, levels, lambda cost: cost.bytes)
    assert made is not None
    one, two, three = (item.node for item in offered)
    assert made.of([one, three]) == (made.of([one, two, three])[0], {two})
    assert made.of([one]) == (_BYTES * 2 * SMALL, frozenset())
    assert set(made.neighbours()) == {(one, two), (two, three)} and made.order == [one, two, three]
    assert (names["b"], names["c"]) in conversions.neighbours() or (names["c"], names["b"]) in conversions.neighbours()


def chain() -> onnx.ModelProto:
    """Three convolutions one behind the other."""
    weight = np.ones((4, 4, 1, 1), np.float32)
    nodes = [helper.make_node("Conv", [f"v{index}", "w"], [f"v{index + 1}"], name=f"conv{index}") for index in range(3)]
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes,
        "chain",
        [info("v0", TensorProto.FLOAT, [1, 4, 4, 4])],
        [info("v3", TensorProto.FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_a_graph_without_fixed_levels_has_none() -> None:
    assert crossings(load(network()), {}, lambda cost: 0.0) is None
