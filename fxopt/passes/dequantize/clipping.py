"""What the range of a quantised activation cut off on purpose.

Quantisers drop a ReLU before levels that begin at 0, and a ReLU6 before levels that also end at 6: saturation computes
it. A float value needs the operator again.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor, fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.dtypes import TO_TORCH
from fxopt.ir.onnx.references.quantize import RANGES
from fxopt.ir.views.common import argument, is_onnx, scalar_constant
from fxopt.ir.views.eight_bit import passes_levels_on

_POSITIVE = ("Relu", "Sigmoid", "Softmax", "Abs", "Exp", "Sqrt", "HardSigmoid", "Softplus")
_MEANS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax")
_OF_ALL = ("Add", "Mul", "Concat", "Sum")
_DEPTH = 8  # operators that are looked through for a value that cannot be negative
_CLIP_TAKES_INPUTS = 11


def clipped(graph: Graph, builder: Builder, node: fx.Node, clip: str) -> tuple[fx.Node, str]:
    """The operand of QuantizeLinear, behind a ReLU or clip where it needs one, and a word about that."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    found = _bounds(graph, node)
    if found is None:
        return x, ""
    low, high, dtype = found
    if clip == "all":
        if low.numel() != 1:
            return x, " nor clipped: it has a range per channel"
        return _clip(
            builder, x, float(low), float(high), dtype
        ), f"; clipped to its range {float(low):.3g} ... {float(high):.3g}"
    if bool((low != 0).any()):
        return x, ""
    if high.numel() == 1 and abs(float(high) - 6.0) < 1e-5 and _top(graph, x) != 6.0:
        return _clip(builder, x, 0.0, 6.0, dtype), "; its levels 0 ... 6 computed a ReLU6, an operator now"
    if _is_positive(graph, x):
        return x, ""
    return builder.relu(x), "; its levels from 0 on computed a ReLU, an operator now"


def _bounds(graph: Graph, node: fx.Node) -> tuple[Tensor, Tensor, torch.dtype] | None:
    """The smallest and the largest value that can be quantised, and its type; None where they are not known."""
    scale = graph.constant(node.args[1])
    given: Any = argument(node, 2)
    code: Any = node.kwargs.get("output_dtype", 0) or TensorProto.UINT8
    zero = graph.constant(given) if given is not None else torch.zeros((), dtype=TO_TORCH[code])
    if scale is None or zero is None or zero.dtype not in RANGES:  # numbers of float8 have no such range
        return None
    low, high = RANGES[zero.dtype]
    return (low - zero.double()) * scale.double(), (high - zero.double()) * scale.double(), scale.dtype


def _clip(builder: Builder, x: fx.Node, low: float, high: float, dtype: torch.dtype) -> fx.Node:
    if builder.opset < _CLIP_TAKES_INPUTS:
        return builder.onnx("Clip", x, min=low, max=high)
    bounds = (builder.const(torch.tensor(value, dtype=dtype), "bound") for value in (low, high))
    return builder.onnx("Clip", x, *bounds)


def _top(graph: Graph, x: fx.Node) -> float | None:
    return scalar_constant(graph, argument(x, 2, "max")) if is_onnx(x, "Clip") else None


def _is_positive(graph: Graph, x: object, depth: int = _DEPTH) -> bool:
    """Whether a value cannot be negative, as far as its operators show."""
    if not isinstance(x, fx.Node) or not depth:
        return False
    constant = graph.constant(x)
    if constant is not None:
        return bool((constant >= 0).all())
    if is_onnx(x, *_POSITIVE):
        return True
    if is_onnx(x, "Clip"):
        low = scalar_constant(graph, argument(x, 1, "min"))
        return low is not None and low >= 0
    if passes_levels_on(x) or is_onnx(x, *_MEANS):
        return _is_positive(graph, x.args[0], depth - 1)
    return is_onnx(x, *_OF_ALL) and all(_is_positive(graph, value, depth - 1) for value in x.args)
