"""What the parts of quantize-linear share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph, hint, label, shape_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.sparsity import block_shares
from fxopt.ir.target import Cost, Zeros, conv_kind
from fxopt.ir.views.conv import Conv, conv
from fxopt.ir.views.eight_bit import saturated, source, takers
from fxopt.ir.views.linear import Linear
from fxopt.passes.base import Context

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
JUDGED = 192  # outputs of a linear by which its error is estimated


def unfit(graph: Graph, ctx: Context, view: Linear | Conv) -> Refusal | None:
    """Why no form is offered: the user left the node out, or its weight holds nothing that can be quantised."""
    excluded = ctx.excluded(label(view.node))
    if excluded is not None:
        return excluded
    weight = view.weight(graph)
    if weight.dtype not in FLOATS:
        return Refusal("the weight has type {}; expected a floating-point type", weight.dtype)
    if weight.numel() == 0:
        return Refusal("the weight is empty")
    if not bool(torch.isfinite(weight).all()):
        return Refusal("the weight holds infinite or NaN values")
    if isinstance(view, Linear) and any(isinstance(conv(graph, user), Conv) for user in view.x.users):
        return Refusal("a convolution takes its input too: their features lie on different axes")
    return None


def value_of(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node whose type is known."""
    value = node.meta.get("val")
    assert isinstance(value, torch.Tensor), f"the shape of {node} is unknown"
    return value


def result_of(graph: Graph, view: Linear | Conv) -> fx.Node:
    """The node whose value the integer operator replaces: the ReLU or clip behind a convolution is part of it."""
    return saturated(graph, view.node) if isinstance(view, Conv) else view.node


def float_cost(view: Linear | Conv, weight: torch.Tensor) -> Cost:
    """Work of the float form: 2 operations per weight and position, less where kernels skip the weight's zeros."""
    y = shape_of(view.node)
    x = shape_of(view.x)
    assert x is not None and y is not None
    outputs = _count(y)
    itemsize = value_of(view.x).dtype.itemsize
    dtype = str(value_of(view.x).dtype).removeprefix("torch.")
    inner = weight.numel() // weight.shape[0]
    moved = (_count(x) + weight.numel() + outputs) * itemsize
    extra = len(getattr(view, "inner", ()))
    kind = "linear" if isinstance(view, Linear) else conv_kind(weight.shape)
    return Cost(2.0 * outputs * inner, moved, dtype, kind, 1 + extra, zeros=zeros_of(view, weight))


def zeros_of(view: Linear | Conv, weight: torch.Tensor) -> Zeros | None:
    """The blocks of zeros that a kernel may skip, if there are any."""
    shape = shape_of(view.node)
    if shape is None or (isinstance(view, Conv) and view.groups > 1):
        return None
    shares = block_shares(weight.flatten(1))
    rows = _count((*shape[:1], *shape[2:]) if isinstance(view, Conv) else shape[:-1])
    return Zeros(shares, rows) if shares else None


# Dequantising and reordering an element, and quantising it again, in operations of a narrow float convolution: from
# profiles of a MobileNetV2 whose depthwise convolutions were left in floats between 8-bit ones.
_CONVERSION = 4.0


def with_conversions(graph: Graph, view: Conv, result: fx.Node, cost: Cost) -> Cost:
    """The work of a narrow float convolution together with the conversions where it lies between other convolutions.

    Those around it pay on their own; left in floats, it would have its input dequantised and its output quantised. Of
    those with blocks of zeros that is not known: in floats they may be faster.
    """
    if cost.kind != "conv.narrow":
        return cost
    elements = 0
    if _comes_from_conv(graph, source(view.x)):
        elements += _count(shape_of(view.x) or ())
    if any(_pays_alone(graph, user) for user, _ in takers(result)):
        elements += _count(shape_of(result) or ())
    return replace(cost, flops=cost.flops + _CONVERSION * elements, macs=cost.multiply_adds)


def _comes_from_conv(graph: Graph, node: fx.Node) -> bool:
    """Whether a value is that of a convolution, with its activation."""
    before = node.args[0] if node.op == "call_function" and node.args else None
    if isinstance(before, fx.Node) and saturated(graph, before) is node:
        node = before
    return _pays_alone(graph, node)


def _pays_alone(graph: Graph, node: fx.Node) -> bool:
    """Whether a node is a convolution that is expected to be computed in 8 bits."""
    view = conv(graph, node)
    return isinstance(view, Conv) and zeros_of(view, view.weight(graph)) is None


def _count(shape: tuple[Any, ...]) -> int:
    total = 1
    for dim in shape:
        total *= hint(dim)
    return total


def replaced(
    graph: Graph, view: Linear | Conv, result: fx.Node, target: Any, arguments: tuple[Any, ...], made_by: str
) -> fx.Node:
    """Put an integer operator in the place of a view; `result` is the node whose value it gives."""
    node = graph.call(target, arguments, before=result, made_by=made_by, like=view.node)
    graph.replace(result, node)
    for swallowed in (view.node, *getattr(view, "inner", ())):
        if swallowed is not result and not swallowed.users:
            graph.erase(swallowed)
    if not view.weight_node.users:
        graph.erase(view.weight_node)
    return node


def float_conv(x: torch.Tensor, view: Conv, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What the convolution gives with this weight and bias, both of the type of x."""
    rank = weight.dim() - 2
    pads = [pad for axis in reversed(range(rank)) for pad in (view.padding[0][axis], view.padding[1][axis])]
    padded = torch.nn.functional.pad(x, pads)
    convolve = getattr(torch.nn.functional, f"conv{rank}d")
    result: torch.Tensor = convolve(
        padded, weight, None if bias is None else bias.float(), view.stride, 0, view.dilation, view.groups
    )
    return result


def sums_of(ctx: Context, view: Linear | Conv, weight: torch.Tensor) -> int:
    """The `sums` of `grids.quantize_weight` for the target's kernels."""
    if is_depthwise(view, weight):
        return 32
    features = ctx.target.features
    if ctx.target.kind == "wasm":
        return 7 if "relaxed_simd" in features else 32
    if ctx.target.kind != "cpu" or not ctx.target.arch.startswith("x86"):
        return 32
    return 32 if {"avx512_vnni", "avx_vnni", "amx_int8"} & features else 16


def is_depthwise(view: Linear | Conv, weight: torch.Tensor) -> bool:
    """One input and one output channel per group: kernels for these multiply in 32 bits everywhere."""
    return isinstance(view, Conv) and view.groups == weight.shape[0] and weight.shape[1] == 1
