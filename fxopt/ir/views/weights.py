"""The weight of a product as [out, in], whatever it is stored as: for what asks where it is zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import constant_value, evaluate, plain_tensor
from fxopt.ir.onnx.references.contrib_matmul import n_bits_weight
from fxopt.ir.op import declaration
from fxopt.ir.ops.linear_nbits import dequantized
from fxopt.ir.ops.linear_sparse import dense
from fxopt.ir.views.common import argument, is_onnx
from fxopt.ir.views.conv import Conv, conv
from fxopt.ir.views.linear import Linear, linear
from fxopt.ir.views.quantized import OPERATORS


def weight_of(graph: Graph, node: fx.Node) -> Tensor | None:
    """The weight [out, in] of a linear or of a convolution of one group, also of their forms with fewer bits.

    The inputs of a convolution are those of its flattened kernel. Codes come without their zero points, with or without
    their scales. None for other nodes, and where the weight is computed at run time.
    """
    if node.op != "call_function":
        return None
    declared = declaration(node.target)
    if declared is not None:
        form = _OWN.get(declared.name)
        return None if form is None else form(graph, node)
    view = linear(graph, node)
    if isinstance(view, Linear):
        return view.weight(graph)
    found = conv(graph, node)
    if isinstance(found, Conv):
        return found.weight(graph).flatten(1) if found.groups == 1 else None
    return _onnx(graph, node) if graph.origin == "onnx" else None


# ---- fxopt operators


def _codes(graph: Graph, node: fx.Node) -> Tensor | None:
    codes = graph.constant(node.args[1])
    if codes is None:
        return None
    return (codes.float() if codes.dtype.is_floating_point else codes).flatten(1)


def _conv_codes(graph: Graph, node: fx.Node) -> Tensor | None:
    return _codes(graph, node) if node.args[-1] == 1 else None


def _few_bits(columns_at: int) -> Callable[[Graph, fx.Node], Tensor | None]:
    def weight(graph: Graph, node: fx.Node) -> Tensor | None:
        arguments: Any = node.args
        packed, scales, zeros = (graph.constant(argument) for argument in arguments[1:4])
        if packed is None or scales is None:
            return None
        columns, bits, group = arguments[columns_at : columns_at + 3]
        if isinstance(columns, (list, tuple)):  # of a convolution
            if arguments[-1] != 1:
                return None
            columns = torch.Size(columns).numel()
        return dequantized(packed, torch.ones_like(scales), zeros, bits, group, columns)

    return weight


def _stored(graph: Graph, node: fx.Node) -> Tensor | None:
    arguments: Any = node.args
    values, mask = (graph.constant(argument) for argument in arguments[1:3])
    return None if values is None or mask is None else dense(values, mask, arguments[4])


_OWN: dict[str, Callable[[Graph, fx.Node], Tensor | None]] = {
    **dict.fromkeys(
        ("linear_w8a8", "linear_w8a8_dynamic", "linear_u8s8", "sparse_linear_u8s8", "linear_fp8"), _codes
    ),
    "conv_w8a8": _conv_codes,
    "linear_nbits": _few_bits(5),
    "conv_nbits": _few_bits(5),
    **dict.fromkeys(("linear_sparse", "conv_sparse"), _stored),
}


# ---- operators of ONNX files


def _onnx(graph: Graph, node: fx.Node) -> Tensor | None:
    target: Any = node.target
    key = target.domain, target.op_type
    if key in OPERATORS:
        codes_at, _, zero_at, _ = OPERATORS[key]
        return _integer(graph, node, codes_at, zero_at)
    if is_onnx(node, "MatMulNBits", domain="com.microsoft"):
        return _n_bits(graph, node)
    if is_onnx(node, "FusedLinearInt8", "SparseLinearInt8", domain="fxopt"):  # in a file with own kernels
        return graph.constant(node.args[1])
    if not is_onnx(node, "MatMul", "Gemm", "Conv"):
        return None
    weight = _computed(graph, node.args[1])
    if weight is None or weight.dim() < 2:
        return None
    if is_onnx(node, "Conv"):
        return weight.flatten(1) if node.kwargs.get("group", 1) == 1 else None
    return weight if node.kwargs.get("transB", 0) else weight.t()


def _integer(graph: Graph, node: fx.Node, codes_at: int, zero_at: int) -> Tensor | None:
    """Codes of an integer product, [in, out], or [out, in, *kernel] of a convolution."""
    codes, zero = (_computed(graph, argument(node, place)) for place in (codes_at, zero_at))
    if codes is None or codes.dim() < 2 or node.kwargs.get("group", 1) != 1:
        return None
    wide, middle = codes.to(torch.int16), 0 if zero is None else zero.to(torch.int16)
    if is_onnx(node, "QLinearConv", "ConvInteger") or is_onnx(node, "QLinearConv", domain="com.microsoft"):
        return (wide.flatten(1).t() - middle).t()
    stored_transposed = bool(node.kwargs.get("transB", 0))
    return (wide.t() - middle).t() if stored_transposed else (wide - middle).t()


def _n_bits(graph: Graph, node: fx.Node) -> Tensor | None:
    options: dict[str, Any] = {"block_size": 32, "bits": 4, **node.kwargs}
    packed, scales, zeros, order = (_computed(graph, argument(node, place)) for place in range(1, 5))
    if packed is None or scales is None or options.get("weight_prepacked"):
        return None
    sizes = options["K"], options["N"], options["block_size"], options["bits"]
    return n_bits_weight(packed, scales, zeros, order, torch.float32, *sizes)


def _computed(graph: Graph, value: Any) -> Tensor | None:
    """The tensor of a constant, or of what is computed from constants alone: dequantised, decoded, transposed."""
    if not isinstance(value, fx.Node) or value.op not in ("get_attr", "call_function"):
        return None
    found = constant_value(graph, value) if value.op == "get_attr" else _evaluated(graph, value)
    found = plain_tensor(found)
    return found if isinstance(found, Tensor) else None


def _evaluated(graph: Graph, node: fx.Node) -> Any:
    """The value of a node; None when an input of the graph takes part in it."""
    before: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current.op not in ("get_attr", "call_function"):
            return None
        if current not in before:
            before.add(current)
            pending.extend(current.all_input_nodes)
    values: dict[fx.Node, Any] = {}
    for current in graph.fx.nodes:
        if current not in before:
            continue
        if current.op == "get_attr":
            values[current] = constant_value(graph, current)
        else:
            args, kwargs = fx.map_arg((current.args, current.kwargs), values.__getitem__)
            values[current] = evaluate(graph, current, tuple(args), dict(kwargs))
    return values[node]
