"""Operations and bytes per node, exact where there is an exact answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from fxopt.cost_model.work import node_cost
from fxopt.cost_model.work.products import einsum, matmul
from fxopt.ir.op import declaration
from fxopt.ir.ops.linear_w8a8 import linear_w8a8_dynamic
from fxopt.ir.target import Cost, Zeros
from tests.cost_model.helpers import costs, linears, one, onnx_graph, torch_graph, zeros

UINT8, INT8 = TensorProto.UINT8, TensorProto.INT8


# ---- products


def test_linear_is_exact() -> None:
    cost = costs(linears(128, [384, 1536]))["MatMul"]
    exact = Cost(2.0 * 128 * 384 * 1536, 4 * (128 * 384 + 384 * 1536 + 128 * 1536), "float32", "linear", 1)
    every = tuple((f"{outputs}x1", 1.0) for outputs in (4, 8, 16))
    assert cost == replace(exact, zeros=Zeros(every, 128))  # its weight is all zeros


@pytest.mark.parametrize(
    ("op", "inputs", "constants", "attributes", "flops", "kind"),
    [
        ("Gemm", {"x": [8, 32]}, {"w": zeros(16, 32), "b": zeros(16)}, {"transB": 1}, 2 * 8 * 32 * 16, "linear"),
        ("Gemm", {"x": [32, 8]}, {"w": zeros(32, 16)}, {"transA": 1}, 2 * 8 * 32 * 16, "linear"),
        ("MatMul", {"a": [2, 3, 4, 5], "b": [3, 5, 6]}, {}, {}, 2 * 2 * 3 * 4 * 5 * 6, "attention"),
        ("MatMul", {"x": [7, 5]}, {"w": zeros(5)}, {}, 2 * 7 * 5, "linear"),
        ("Conv", {"x": [2, 8, 16, 16]}, {"w": zeros(4, 8, 3, 3)}, {"pads": [1] * 4}, 2 * 2 * 4 * 256 * 72, "conv"),
        ("Conv", {"x": [1, 8, 9]}, {"w": zeros(4, 8, 8)}, {"strides": [1]}, 2 * 4 * 2 * 64, "conv"),
        ("Conv", {"x": [1, 8, 5, 5]}, {"w": zeros(8, 1, 3, 3)}, {"group": 8}, 2 * 8 * 9 * 9, "conv.narrow"),
        ("ConvTranspose", {"x": [1, 4, 5, 5]}, {"w": zeros(4, 2, 3, 3)}, {}, 2 * 4 * 25 * 18, "conv"),
        ("Einsum", {"a": [2, 3, 4], "b": [2, 4, 5]}, {}, {"equation": "bij,bjk->bik"}, 2 * 2 * 3 * 4 * 5, "attention"),
    ],
)
def test_products(op: str, inputs: Any, constants: Any, attributes: Any, flops: float, kind: str) -> None:
    cost = one(op, inputs, constants, **attributes)
    assert (cost.flops, cost.kind, cost.dtype) == (flops, kind, "float32")


@pytest.mark.parametrize("shapes", [((2, 12, 64, 32),) * 3, ((2, 64, 12 * 32),) * 3])
def test_attention_is_exact(shapes: Any) -> None:
    heads = {} if len(shapes[0]) == 4 else {"q_num_heads": 12, "kv_num_heads": 12}
    cost = one("Attention", dict(zip("qkv", shapes, strict=True)), {}, **heads)
    assert cost.flops == 4 * 2 * 12 * 64 * 64 * 32
    assert cost.kind == "attention"
    assert cost.bytes == 4 * 4 * 2 * 12 * 64 * 32


def test_attention_with_grouped_heads_and_other_lengths() -> None:
    inputs = {"q": [1, 8, 10, 16], "k": [1, 2, 20, 16], "v": [1, 2, 20, 24]}
    assert one("Attention", inputs, {}).flops == 2 * 8 * 10 * 20 * (16 + 24)


def test_multi_head_attention_of_onnx_runtime() -> None:
    shapes = {name: [2, 16, 48] for name in "qkv"}
    cost = one("MultiHeadAttention", shapes, {}, num_heads=4, domain="com.microsoft")
    assert (cost.flops, cost.kind) == (4 * 2 * 4 * 16 * 16 * 12, "attention")


@pytest.mark.parametrize(("a", "b", "dtype"), [("u", "s", "int8"), ("u", "u", "uint8"), ("s", "s", "s8s8")])
def test_signs_of_integer_products(a: str, b: str, dtype: str) -> None:
    types = {"u": (UINT8, np.uint8), "s": (INT8, np.int8)}
    graph = onnx_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        {"x": [4, 8]},
        {"w": zeros(8, 2, dtype=types[b][1])},
        types={"x": types[a][0], "y": TensorProto.INT32},
    )
    assert costs(graph)["MatMulInteger"] == Cost(2.0 * 4 * 8 * 2, 32 + 16 + 32, dtype, "linear", 1)


def test_helpers_of_products() -> None:
    assert matmul((5,), (5,)) == 10
    assert matmul((), (5,)) == 0
    assert einsum("...ij,jk->...ik", [(7, 2, 3), (3, 4)]) == 2 * 7 * 2 * 3 * 4


# ---- everything else


def test_dynamic_dimensions_count_with_the_asked_size() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    for batch in (1, 64):
        graph = onnx_graph([node], {"x": ["batch", 32]}, {"w": zeros(32, 16)}, sizes={"batch": batch})
        assert costs(graph)["MatMul"].flops == 2 * batch * 32 * 16


def test_unknown_shapes_count_the_launch_only() -> None:
    graph = onnx_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [4, 8]}, {"w": zeros(8, 2)})
    for node in graph.nodes:
        node.meta.pop("val", None)
    assert costs(graph)["MatMul"] == Cost(0.0, 0.0, "float32", "linear", 1)


def test_shape_arithmetic_and_views_are_nearly_free() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "minus"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["r"]),
        helper.make_node("Identity", ["r"], ["y"]),
    ]
    constants = {"zero": np.array([0]), "minus": np.array([-1])}
    fixed = costs(onnx_graph(nodes, {"x": [6, 4]}, constants))
    dynamic = costs(onnx_graph(nodes, {"x": ["n", 4]}, constants))
    assert all(cost.flops == cost.bytes == 0 for cost in (*fixed.values(), *dynamic.values()))
    assert [cost.launches for cost in fixed.values()] == [0, 0, 0, 1, 0]  # folded, and one view
    assert [cost.launches for cost in dynamic.values()] == [1, 1, 1, 1, 0]


def test_what_is_computed_from_constants_is_folded() -> None:
    nodes = [helper.make_node("Transpose", ["w"], ["t"]), helper.make_node("MatMul", ["x", "t"], ["y"])]
    found = costs(onnx_graph(nodes, {"x": [4, 8]}, {"w": zeros(2, 8)}))
    assert found["Transpose"].launches == 0
    assert found["MatMul"].kind == "linear"


def test_data_movement_counts_what_is_written() -> None:
    cost = one("Gather", {}, {"table": zeros(1000, 16), "indices": np.array([3])})
    assert cost.launches == 0
    table = onnx_graph(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        {"i": [5]},
        {"table": zeros(1000, 16)},
        types={"i": TensorProto.INT64},
    )
    assert costs(table)["Gather"] == Cost(0.0, 2 * 5 * 16 * 4, "float32", "shape", 1)


@pytest.mark.parametrize(("op", "per_element"), [("Relu", 1), ("Erf", 18), ("Gelu", 24), ("Exp", 9), ("Log", 60)])
def test_elementwise(op: str, per_element: float) -> None:
    cost = one(op, {"x": [3, 5]}, {})
    assert (cost.flops, cost.bytes, cost.kind) == (per_element * 15, 2 * 15 * 4, "elementwise")


def test_square_is_cheaper_than_a_power() -> None:
    square = one("Pow", {"x": [8]}, {"e": np.float32(2)})
    assert square.flops < one("Pow", {"x": [8]}, {"e": np.float32(1.7)}).flops


@pytest.mark.parametrize(
    ("op", "attributes", "kind"),
    [
        ("Softmax", {}, "norm"),
        ("ReduceMean", {}, "norm"),
        ("DynamicQuantizeLinear", {}, "quantize"),
        ("MaxPool", {"kernel_shape": [2, 2]}, "other"),
        ("Transpose", {}, "shape"),
    ],
)
def test_kinds(op: str, attributes: Any, kind: str) -> None:
    outputs = ["y", "s", "z"] if op == "DynamicQuantizeLinear" else ["y"]
    graph = onnx_graph([helper.make_node(op, ["x"], outputs, **attributes)], {"x": [1, 2, 4, 4]}, {})
    assert costs(graph)[op].kind == kind


# ---- fxopt operators and aten


def test_fxopt_operators_are_priced_by_their_declaration() -> None:
    graph = onnx_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [4, 8]}, {"w": zeros(8, 2)})
    (product,) = graph.calls()
    arguments = (
        product.args[0],
        graph.add_constant(torch.zeros(2, 8, dtype=torch.int8), "codes"),
        graph.add_constant(torch.ones(2), "scales"),
        None,
    )
    node = graph.call(linear_w8a8_dynamic.target, arguments, before=product, made_by="test")
    unknown = node_cost(graph, node)
    assert (unknown.flops, unknown.launches) == (0, 1)
    from fxopt.ir.shapes import infer

    graph.replace(product, node)
    infer(graph)
    declared = declaration(node.target)
    assert declared is not None
    expected = declared.cost_of(torch.empty(4, 8), torch.zeros(2, 8, dtype=torch.int8), torch.ones(2), None)
    assert node_cost(graph, node) == expected


class Small(torch.nn.Module):
    """Convolution, linear, attention, normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(8, 16, 3, padding=1)
        self.linear = torch.nn.Linear(16, 24)
        self.norm = torch.nn.LayerNorm(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).relu().flatten(2).transpose(1, 2)
        y = self.norm(self.linear(y)).unsqueeze(1)
        return torch.nn.functional.scaled_dot_product_attention(y, y, y).sigmoid() * 2


def test_aten_operators() -> None:
    found = costs(torch_graph(Small(), torch.zeros(2, 8, 4, 4)))
    assert found["aten.conv2d"].flops == 2 * 2 * 16 * 16 * 72
    assert found["aten.linear"].flops == 2 * 2 * 16 * 16 * 24
    assert found["aten.linear"].bytes == 4 * (2 * 16 * 16 + 16 * 24 + 24 + 2 * 16 * 24)
    assert found["aten.scaled_dot_product_attention"].flops == 4 * 2 * 16 * 16 * 24
    assert found["aten.layer_norm"].kind == "norm"
    views = [cost for name, cost in found.items() if name.startswith(("aten.transpose", "aten.unsqueeze"))]
    assert views and all(cost.launches == 0 == cost.bytes for cost in views)
    assert found["aten.sigmoid"].launches == 1
    assert found["aten.mul.Tensor"].launches == 0  # fused behind the sigmoid


def test_half_precision_halves_the_bytes() -> None:
    single = costs(torch_graph(torch.nn.Linear(64, 32), torch.zeros(4, 64)))["aten.linear"]
    half = costs(torch_graph(torch.nn.Linear(64, 32).half(), torch.zeros(4, 64).half()))["aten.linear"]
    assert (half.flops, half.bytes, half.dtype) == (single.flops, single.bytes / 2, "float16")


def test_a_cast_is_no_view() -> None:
    class Cast(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float16)

    (cost,) = costs(torch_graph(Cast(), torch.zeros(64))).values()
    assert (cost.bytes, cost.launches) == (64 * 6, 1)


@pytest.mark.parametrize(("kind", "gates"), [(torch.nn.LSTM, 4), (torch.nn.GRU, 3), (torch.nn.RNN, 1)])
def test_recurrent_layers_of_torch(kind: Any, gates: int) -> None:
    graph = torch_graph(kind(6, 8, 2, batch_first=True), torch.zeros(3, 5, 6))
    (cost,) = (node_cost(graph, node) for node in graph.calls() if kind.__name__.lower() in str(node.target))
    assert cost.macs is None and cost.flops == 2 * 3 * 5 * gates * 8 * (6 + 8 + 8 + 8)

