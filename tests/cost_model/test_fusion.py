"""What ONNX Runtime fuses costs nothing of its own."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper

from fxopt.ir.graph import Graph
from tests.cost_model.helpers import costs, linears, onnx_graph, zeros


def conv(*behind: NodeProto, residual: bool = False) -> Graph:
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4), *behind]
    inputs = {"x": [1, 16, 8, 8]} | ({"r": [1, 16, 8, 8]} if residual else {})
    return onnx_graph(nodes, inputs, {"w": zeros(16, 16, 3, 3), "b": zeros(16, 1, 1)})


@pytest.mark.parametrize("op", ["Relu", "LeakyRelu", "Sigmoid"])
def test_an_activation_behind_a_convolution_is_fused(op: str) -> None:
    cost = costs(conv(helper.make_node(op, ["c"], ["y"])))[op]
    assert (cost.bytes, cost.launches) == (0, 0)


def test_a_residual_behind_a_convolution_is_only_read() -> None:
    graph = conv(helper.make_node("Add", ["c", "r"], ["a"]), helper.make_node("Relu", ["a"], ["y"]), residual=True)
    found = costs(graph)
    assert (found["Add"].bytes, found["Add"].launches) == (16 * 64 * 4, 0)
    assert found["Relu"].launches == 0


def test_a_value_that_is_used_twice_is_not_fused_away() -> None:
    graph = conv(helper.make_node("Relu", ["c"], ["a"]), helper.make_node("Add", ["a", "c"], ["y"]))
    assert costs(graph)["Relu"].launches == 1


def test_bias_and_scale_behind_a_product() -> None:
    assert costs(linears(4, [8, 8]))["Add"].launches == 0
    nodes = [helper.make_node("MatMul", ["x", "z"], ["m"]), helper.make_node("Mul", ["m", "c"], ["y"])]
    shapes = {"x": [4, 8], "z": [8, 8]}
    assert costs(onnx_graph(nodes, shapes, {"c": np.float32(0.1)}))["Mul"].launches == 0
    assert costs(onnx_graph(nodes, shapes, {"c": zeros(8)}))["Mul"].launches == 1


def test_the_dynamically_quantised_linear_has_two_kernels() -> None:
    found = costs(linears(16, [64, 32], int8=True))
    assert {name for name, cost in found.items() if cost.launches} == {"DynamicQuantizeLinear", "MatMulInteger"}
    assert found["MatMulInteger"].dtype == "int8"


def quantised_conv(with_quantize: bool) -> Graph:
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
    ]
    if with_quantize:
        nodes.append(helper.make_node("QuantizeLinear", ["r", "s", "z"], ["y"]))
    else:
        nodes[-1].output[0] = "y"
    constants = {
        "s": np.float32(0.1),
        "z": np.uint8(0),
        "w": zeros(16, 16, 3, 3, dtype=np.int8),
        "ws": zeros(16),
        "wz": zeros(16, dtype=np.int8),
    }
    types = {"x": TensorProto.UINT8, "y": TensorProto.UINT8 if with_quantize else TensorProto.FLOAT}
    return onnx_graph(nodes, {"x": [1, 16, 8, 8]}, constants, types=types)


def test_a_convolution_between_dequantize_and_quantize_computes_in_integers() -> None:
    found = costs(quantised_conv(True))
    assert found["Conv"].dtype == "int8"
    assert found["Conv"].bytes == 1024 + 16 * 16 * 9 + 1024
    assert [name for name, cost in found.items() if cost.launches] == ["Conv"]


def test_without_quantize_behind_it_the_convolution_stays_in_floats() -> None:
    found = costs(quantised_conv(False))
    assert found["Conv"].dtype == "float32"
    assert found["DequantizeLinear"].launches == 1


@pytest.mark.parametrize(("op", "kind"), [("Add", "norm.skip"), ("Sum", "norm")])
def test_an_addition_before_a_layer_norm_becomes_one_kernel(op: str, kind: str) -> None:
    nodes = [
        helper.make_node(op, ["a", "b"], ["s"]),
        helper.make_node("LayerNormalization", ["s", "g"], ["y"]),
    ]
    found = costs(onnx_graph(nodes, {"a": [1, 4, 8], "b": [1, 4, 8]}, {"g": zeros(8)}))
    assert found["LayerNormalization"].kind == kind
    assert found[op].launches == (0 if op == "Add" else 1)
