"""Operators of the domain `com.microsoft` on 8-bit tensors with a scale and zero point: QLinear* and QGemm.

Each is its floating-point operator between a dequantization and a quantization; runtimes may differ by one step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.common import along
from fxopt.ir.onnx.references.contrib_fused import to_channels_first, to_channels_last
from fxopt.ir.onnx.references.integer import matmul_integer, qlinear_conv, requantize
from fxopt.ir.onnx.references.pool import average_pool
from fxopt.ir.onnx.references.quantize import quantize_linear
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")

Zero = Tensor | None


def _real(x: Tensor, scale: Tensor, zero_point: Zero) -> Tensor:
    """(x - zero_point) * scale with one scale for the tensor."""
    shifted = x.to(torch.int32)
    if zero_point is not None:
        shifted = shifted - zero_point.reshape(()).to(torch.int32)
    return shifted.to(scale.dtype) * scale.reshape(())


def _quantized(x: Tensor, scale: Tensor, zero_point: Zero, dtype: torch.dtype) -> Tensor:
    """saturate(round(x / scale) + zero_point) in the type of the inputs."""
    zero = torch.zeros((), dtype=dtype, device=x.device) if zero_point is None else zero_point.reshape(())
    y: Tensor = quantize_linear(Call(21), x, scale.reshape(()), zero)
    return y


@operators.reference("QLinearAdd")
def qlinear_add(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Zero,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Zero,
    c_scale: Tensor,
    c_zero_point: Zero = None,
) -> Tensor:
    """quantize(dequantize(a) + dequantize(b))."""
    total = _real(a, a_scale, a_zero_point) + _real(b, b_scale, b_zero_point)
    return _quantized(total, c_scale, c_zero_point, a.dtype)


@operators.reference("QLinearMul")
def qlinear_mul(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Zero,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Zero,
    c_scale: Tensor,
    c_zero_point: Zero = None,
) -> Tensor:
    """quantize(dequantize(a) * dequantize(b))."""
    total = _real(a, a_scale, a_zero_point) * _real(b, b_scale, b_zero_point)
    return _quantized(total, c_scale, c_zero_point, a.dtype)


@operators.reference("QLinearSigmoid")
def qlinear_sigmoid(
    call: Call, x: Tensor, x_scale: Tensor, x_zero_point: Zero, y_scale: Tensor, y_zero_point: Zero = None
) -> Tensor:
    """quantize(sigmoid(dequantize(x)))."""
    return _quantized(torch.sigmoid(_real(x, x_scale, x_zero_point)), y_scale, y_zero_point, x.dtype)


@operators.reference("QLinearLeakyRelu")
def qlinear_leaky_relu(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Zero,
    y_scale: Tensor,
    y_zero_point: Zero = None,
    alpha: float = 0.01,
) -> Tensor:
    """quantize(leaky_relu(dequantize(x)))."""
    y = F.leaky_relu(_real(x, x_scale, x_zero_point), alpha)
    return _quantized(y, y_scale, y_zero_point, x.dtype)


@operators.reference("QLinearSoftmax")
def qlinear_softmax(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Zero,
    y_scale: Tensor,
    y_zero_point: Zero = None,
    axis: int = -1,
    opset: int = 13,
) -> Tensor:
    """quantize(softmax(dequantize(x))) over one axis, or below opset 13 over all axes from it on."""
    real = _real(x, x_scale, x_zero_point)
    axis %= x.dim()
    y = torch.softmax(real, axis) if opset >= 13 else torch.softmax(real.flatten(axis), axis).reshape(x.shape)
    return _quantized(y, y_scale, y_zero_point, x.dtype)


@operators.reference("QLinearAveragePool")
def qlinear_average_pool(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Zero,
    y_scale: Tensor,
    y_zero_point: Zero = None,
    channels_last: int = 0,
    **attributes: Any,
) -> Tensor:
    """quantize(average_pool(dequantize(x)))."""
    real = _real(x, x_scale, x_zero_point)
    pooled: Tensor = average_pool(Call(19), to_channels_first(real) if channels_last else real, **attributes)
    return _quantized(to_channels_last(pooled) if channels_last else pooled, y_scale, y_zero_point, x.dtype)


@operators.reference("QLinearGlobalAveragePool")
def qlinear_global_average_pool(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    channels_last: int = 0,
) -> Tensor:
    """quantize(the mean of dequantize(x) over its spatial axes)."""
    axes = list(range(1, x.dim() - 1)) if channels_last else list(range(2, x.dim()))
    return _quantized(_real(x, x_scale, x_zero_point).mean(axes, keepdim=True), y_scale, y_zero_point, x.dtype)


@operators.reference("QLinearReduceMean")
def qlinear_reduce_mean(
    call: Call,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Zero,
    y_scale: Tensor,
    y_zero_point: Zero = None,
    axes: list[int] | None = None,
    keepdims: int = 1,
) -> Tensor:
    """quantize(the mean of dequantize(x) over the axes, all when there are none)."""
    dims = list(axes) if axes else list(range(x.dim()))
    return _quantized(_real(x, x_scale, x_zero_point).mean(dims, bool(keepdims)), y_scale, y_zero_point, x.dtype)


@operators.reference("QLinearConcat")
def qlinear_concat(call: Call, y_scale: Tensor, y_zero_point: Tensor, *inputs: Tensor, axis: int) -> Tensor:
    """quantize(the concatenation of dequantized tensors); each comes with its scale and zero point."""
    triples = zip(inputs[0::3], inputs[1::3], inputs[2::3], strict=True)
    return _quantized(
        torch.cat([_real(*triple) for triple in triples], axis), y_scale, y_zero_point, y_zero_point.dtype
    )


@operators.reference("QLinearWhere")
def qlinear_where(
    call: Call,
    condition: Tensor,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    y: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    z_scale: Tensor,
    z_zero_point: Tensor,
) -> Tensor:
    """quantize(dequantize(x) where the condition holds, else dequantize(y))."""
    chosen = torch.where(condition, _real(x, x_scale, x_zero_point), _real(y, y_scale, y_zero_point))
    return _quantized(chosen, z_scale, z_zero_point, x.dtype)


@operators.reference("QLinearConv")
def qlinear_conv_channels(call: Call, x: Tensor, *inputs: Any, channels_last: int = 0, **attributes: Any) -> Tensor:
    """QLinearConv of ONNX, with x and y channels last when the attribute says so; w is as in Conv."""
    y: Tensor = qlinear_conv(call, to_channels_first(x) if channels_last else x, *inputs, **attributes)
    return to_channels_last(y) if channels_last else y


@operators.reference("QGemm")
def qgemm(
    call: Call,
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha * a_scale * b_scale * (a' @ b' + c), exact up to there, in floating point or quantized by y's scale."""
    columns = b_zero_point if b_zero_point.dim() == 0 or b_zero_point.shape[0] == 1 else along(b_zero_point, 2, 1)
    total = matmul_integer(a.t() if transA else a, b.t() if transB else b, a_zero_point.reshape(1), columns)
    if c is not None:
        total = total + c
    scale = alpha * a_scale.reshape(()) * b_scale
    if y_scale is None:
        return total.to(scale.dtype) * scale
    zero = torch.zeros((), dtype=a.dtype, device=a.device) if y_zero_point is None else y_zero_point.reshape(())
    return requantize(total, scale / y_scale.reshape(()), zero)
