"""Matrix products of the domain `com.microsoft`: fused, 8-bit and block-quantized."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.common import require
from fxopt.ir.onnx.references.integer import matmul_integer, per_row
from fxopt.ir.onnx.references.quantize import (
    dequantize_linear,
    dynamic_quantize_linear,
    quantize_linear,
)
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")

operators.reference("QuantizeLinear")(quantize_linear)
operators.reference("DequantizeLinear")(dequantize_linear)


def _transposed(x: Tensor, last_two: int, batch: int) -> Tensor:
    """The operand [rows, batch..., columns] as [batch..., rows, columns] when `batch`, then its last axes swapped."""
    if batch:
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if last_two and x.dim() > 1 else x


@operators.reference("FusedMatMul", "TransposeMatMul")
def fused_matmul(
    call: Call,
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """alpha * a' @ b', with a' and b' optionally transposed."""
    product = torch.matmul(_transposed(a, transA, transBatchA), _transposed(b, transB, transBatchB))
    return product if alpha == 1.0 else product * alpha


@operators.reference("MatMulIntegerToFloat")
def matmul_integer_to_float(
    call: Call,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """((a - a_zero_point) * a_scale) @ ((b - b_zero_point) * b_scale) + bias, with an exact integer product."""
    scale = per_row(a_scale) * b_scale
    y = matmul_integer(a, b, a_zero_point, b_zero_point).to(scale.dtype) * scale
    return y if bias is None else y + bias


@operators.reference("DynamicQuantizeMatMul")
def dynamic_quantize_matmul(
    call: Call,
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """quantize(a) @ b with the scale and zero point of DynamicQuantizeLinear, as floating point, + bias."""
    quantized, scale, zero_point = dynamic_quantize_linear(Call(11, 3), a)
    y: Tensor = matmul_integer_to_float(call, quantized, b, scale, b_scale, zero_point, b_zero_point, bias)
    return y


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes as the unsigned numbers packed in them along the last axis, lowest bits first."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts).bitwise_and(2**bits - 1).flatten(-2)


@operators.reference("MatMulNBits")
def matmul_n_bits(
    call: Call,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    K: int = 0,
    N: int = 0,
    block_size: int = 32,
    bits: int = 4,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:
    """a @ ((b - zero_points) * scales)' + bias, with b of `bits` bits in blocks along the K columns of its N rows.

    The zero point is 2 ** (bits - 1) where it is omitted. `accuracy_level` allows kernels to round; this does not.
    """
    require(bits in (2, 4, 8), f"MatMulNBits with {bits} bits has no torch reference")
    require(not weight_prepacked, "MatMulNBits with a weight in a packed layout has no torch reference")
    if 0 in b.shape:  # an omitted projection
        y = a.new_zeros([*a.shape[:-1], N])
        return y if bias is None else y + bias
    weight = n_bits_weight(b, scales, zero_points, g_idx, a.dtype, K, N, block_size, bits)
    return F.linear(a, weight.to(a.dtype), bias)


def n_bits_weight(
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    g_idx: Tensor | None,
    dtype: torch.dtype,
    K: int,
    N: int,
    block_size: int,
    bits: int,
) -> Tensor:
    """(b - zero_points) * scales as [N, K], at least in `dtype`."""
    blocks = (K + block_size - 1) // block_size
    dtype = torch.promote_types(dtype, scales.dtype)
    numbers = unpack(b.reshape(N, blocks, -1), bits).to(dtype).reshape(N, -1)[:, :K]
    zero: Any = float(2 ** (bits - 1))
    if zero_points is not None:
        packed = zero_points.dtype == torch.uint8
        zero = unpack(zero_points.reshape(N, -1), bits)[:, :blocks] if packed else zero_points.reshape(N, blocks)
        zero = _per_column(zero.to(dtype), K, block_size, g_idx)
    weight: Tensor = (numbers - zero) * _per_column(scales.reshape(N, blocks), K, block_size, g_idx)
    return weight


def _per_column(parameter: Tensor, columns: int, block_size: int, g_idx: Tensor | None) -> Tensor:
    """A parameter per block as one per column; `g_idx` names the block of every column where they are out of order."""
    if g_idx is not None:
        return parameter.index_select(1, g_idx[:columns].to(torch.int64))
    return parameter.repeat_interleave(block_size, 1)[:, :columns]
