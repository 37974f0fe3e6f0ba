"""How element-wise operators, matrix products and casts are read."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.neutral.readers import Arguments, Readers, aten, is_floating
from fxopt.ir.onnx.dtypes import TO_TORCH

readers = Readers()
reads = readers.reads


def _declare_unary(name: str, target: Any, op_type: str | None) -> None:
    def reader(graph: Graph, node: fx.Node) -> Arguments | None:
        return None if node.kwargs.keys() - {"consumed_inputs"} else node.args

    reads(name, target, *([] if op_type is None else [op_type]))(reader)


for _name, _op_type in {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "erf": "Erf", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
    "rsqrt": None, "reciprocal": "Reciprocal", "neg": "Neg", "abs": "Abs", "sin": "Sin", "cos": "Cos",
}.items():  # fmt: skip
    _declare_unary(_name, getattr(aten, _name).default, _op_type)


@reads("add", aten.add.Tensor)
@reads("sub", aten.sub.Tensor)
@reads("mul", aten.mul.Tensor)
@reads("div", aten.div.Tensor)
@reads("pow", aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor)
@reads("maximum", aten.maximum.default)
@reads("minimum", aten.minimum.default)
@reads("matmul", aten.matmul.default, aten.mm.default, aten.bmm.default)
@reads("where", aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _plain_torch(graph: Graph, node: fx.Node) -> Arguments | None:
    return node.args if not node.kwargs or node.kwargs == {"alpha": 1} else None


@reads("sub", aten.rsub.Scalar)
def _reversed_subtraction(graph: Graph, node: fx.Node) -> Arguments | None:
    return (node.args[1], node.args[0]) if len(node.args) == 2 and not node.kwargs else None


@reads("add", "Add")
@reads("sub", "Sub")
@reads("mul", "Mul")
@reads("pow", "Pow")
@reads("matmul", "MatMul")
@reads("where", "Where")
def _plain_onnx(graph: Graph, node: fx.Node) -> Arguments | None:
    return node.args if not node.kwargs else None  # below opset 7 there is an attribute `broadcast`


@reads("div", "Div")
def _onnx_division(graph: Graph, node: fx.Node) -> Arguments | None:
    floating = any(is_floating(operand) for operand in (node, *node.args))
    return _plain_onnx(graph, node) if floating else None  # integers are truncated


@reads("maximum", "Max")
@reads("minimum", "Min")
def _extremum(graph: Graph, node: fx.Node) -> Arguments | None:
    return _plain_onnx(graph, node) if len(node.args) == 2 else None


@reads("cast", "Cast")
def _onnx_cast(graph: Graph, node: fx.Node) -> Arguments | None:
    code: Any = node.kwargs.get("to")
    if code not in TO_TORCH or node.kwargs.keys() - {"to", "saturate"} or node.kwargs.get("saturate", 1) != 1:
        return None
    return node.args[0], TO_TORCH[code]


@reads("cast", aten._to_copy.default)
def _torch_cast(graph: Graph, node: fx.Node) -> Arguments | None:
    given = {name for name, value in node.kwargs.items() if value is not None}
    return (node.args[0], node.kwargs["dtype"]) if given == {"dtype"} else None
