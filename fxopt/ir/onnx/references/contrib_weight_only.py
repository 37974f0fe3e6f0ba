"""Products with weights of few bits beyond MatMulNBits: MatMulBnb4, fused projections, and GatherBlockQuantized."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.cast import small_to_tensor
from fxopt.ir.onnx.references.common import FLOAT8, at_least_float32, require
from fxopt.ir.onnx.references.contrib_matmul import matmul_n_bits, unpack
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")

# The 16 values of a code, by `quant_type`. NF4: quantiles of the normal distribution (Dettmers et al.,
# arXiv 2305.14314, appendix E); FP4: sign, two bits of exponent, one of mantissa, scaled to 1.
_FP4 = (0.0, 0.0052083333, 0.6666666667, 1.0, 0.3333333333, 0.5, 0.1666666667, 0.25)
_NF4_BELOW = (-1.0, -0.6961928010, -0.5250730515, -0.3949174881, -0.2844413817, -0.1847734302, -0.0910500363, 0.0)
_NF4_ABOVE = (0.0795802995, 0.1609302014, 0.2461123019, 0.3379152417, 0.4407098293, 0.5626170039, 0.7229568362, 1.0)
_CODES = {0: (*_FP4, *(-value for value in _FP4)), 1: (*_NF4_BELOW, *_NF4_ABOVE)}


@operators.reference("MatMulBnb4")
def matmul_bnb4(
    call: Call,
    a: Tensor,
    b: Tensor,
    absmax: Tensor,
    K: int,
    N: int,
    block_size: int,
    quant_type: int,
    transB: int = 1,
    training_mode: int = 0,
) -> Tensor:
    """a @ w' of w = table[code] * absmax per block of the flattened [N, K], two codes per byte, high bits first."""
    require(quant_type in _CODES, f"MatMulBnb4 with quant_type {quant_type} has no torch reference")
    codes = torch.stack([b.reshape(-1) >> 4, b.reshape(-1) & 15], -1).reshape(-1)[: N * K]
    table = torch.tensor(_CODES[quant_type], dtype=absmax.dtype, device=b.device)
    scales = absmax.reshape(-1).repeat_interleave(block_size)[: N * K]
    weight = (table[codes.to(torch.int64)] * scales).reshape(N, K).to(a.dtype)
    return F.linear(a, weight) if transB else torch.matmul(a, weight)


@operators.reference("GatherBlockQuantized")
def gather_block_quantized(
    call: Call,
    data: Any,
    indices: Tensor,
    scales: Tensor,
    zero_points: Any = None,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Tensor:
    """gather((data - zero_point) * scale, indices) with one scale and zero point per block of `quantize_axis`.

    uint8 data hold numbers of `bits` bits, lowest first, in their last axis, with 2 ** (bits - 1) as the default zero
    point; an index out of range gives zeros.
    """
    packed = isinstance(data, Tensor) and data.dtype == torch.uint8
    x, zero = small_to_tensor(data), small_to_tensor(zero_points)
    if packed:
        x = unpack(x, bits)
        zero = None if zero is None else unpack(zero, bits)
    axis, along_ = gather_axis % x.dim(), quantize_axis % x.dim()
    size = x.shape[along_]
    block = block_size or size

    def spread(parameter: Tensor) -> Tensor:
        return parameter.repeat_interleave(block, along_).narrow(along_, 0, size)

    real = x.to(at_least_float32(scales).dtype)
    if zero is not None:
        real = real - spread(zero).to(real.dtype)
    elif packed and x.dtype not in FLOAT8:
        real = real - float(2 ** (bits - 1))
    table = (real * spread(scales)).to(scales.dtype)
    count = table.shape[axis]
    valid = (indices >= -count) & (indices < count)
    index = torch.where(indices < 0, indices + count, indices).clamp(0, count - 1).to(torch.int64)
    rows = table.index_select(axis, index.reshape(-1))
    keep = valid.reshape([1] * axis + [-1] + [1] * (table.dim() - axis - 1))
    kept = torch.where(keep, rows, torch.zeros_like(rows))
    return kept.reshape([*table.shape[:axis], *indices.shape, *table.shape[axis + 1 :]])


def _normed(a: Tensor, skip: Tensor | None, scale: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """rms_norm(a + skip) * scale (a + skip itself where there is no scale), and the sum."""
    total = a if skip is None else a + skip
    if scale is None:
        return total, total
    wide = at_least_float32(total)
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (normal * scale).to(a.dtype), total


@operators.reference("MatMulNBitsMlp")
def matmul_n_bits_mlp(
    call: Call,
    a: Tensor,
    skip: Tensor | None,
    norm_scale: Tensor | None,
    gate_b: Tensor,
    gate_scales: Tensor,
    gate_bias: Tensor | None,
    up_b: Tensor,
    up_scales: Tensor,
    up_bias: Tensor | None = None,
    activation: str = "silu",
    epsilon: float = 1e-5,
    **sizes: int,
) -> Any:
    """activation(x @ gate) * (x @ up) of x = a, or its rms norm with a skip; also a + skip."""
    functions: dict[str, Any] = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": torch.relu}
    require(str(activation).lower() in functions, f"MatMulNBitsMlp with activation {activation!r}")
    x, total = _normed(a, skip, norm_scale, epsilon)
    gate = matmul_n_bits(Call(1), x, gate_b, gate_scales, bias=gate_bias, **sizes)
    up = matmul_n_bits(Call(1), x, up_b, up_scales, bias=up_bias, **sizes)
    y = functions[str(activation).lower()](gate) * up
    return y if call.outputs == 1 else (y, total)


@operators.reference("MatMulNBitsQkv")
def matmul_n_bits_qkv(
    call: Call,
    a: Tensor,
    skip: Tensor | None,
    norm_scale: Tensor,
    q_b: Tensor,
    q_scales: Tensor,
    q_bias: Tensor | None,
    k_b: Tensor,
    k_scales: Tensor,
    k_bias: Tensor | None,
    v_b: Tensor,
    v_scales: Tensor,
    v_bias: Tensor | None = None,
    K: int = 0,
    Nq: int = 0,
    Nkv: int = 0,
    epsilon: float = 1e-6,
    **sizes: int,
) -> Any:
    """The projections q, k and v of the rms norm of a + skip; also a + skip."""
    x, total = _normed(a, skip, norm_scale, epsilon)
    q = matmul_n_bits(Call(1), x, q_b, q_scales, bias=q_bias, K=K, N=Nq, **sizes)
    k = matmul_n_bits(Call(1), x, k_b, k_scales, bias=k_bias, K=K, N=Nkv, **sizes)
    v = matmul_n_bits(Call(1), x, v_b, v_scales, bias=v_bias, K=K, N=Nkv, **sizes)
    return (q, k, v, total)[: call.outputs]


@operators.reference("MatMulNBitsQLoRA")
def matmul_n_bits_qlora(
    call: Call,
    x: Tensor,
    w: Tensor,
    scales: Tensor,
    lora_a: Tensor,
    lora_a_scales: Tensor,
    lora_b: Tensor,
    lora_b_scales: Tensor,
    K: int = 0,
    N: int = 0,
    bits: int = 4,
    block_size: int = 32,
    lora_bits: int = 8,
    lora_block_size: int = 32,
    accuracy_level: int = 0,
) -> Tensor:
    """x @ w + (x @ lora_a) @ lora_b, all of few bits."""
    base: Tensor = matmul_n_bits(Call(1), x, w, scales, K=K, N=N, bits=bits, block_size=block_size)
    if 0 in lora_b.shape:
        return base
    rank = lora_a_scales.reshape(-1, (K + lora_block_size - 1) // lora_block_size).shape[0]
    few = {"bits": lora_bits, "block_size": lora_block_size}
    down = matmul_n_bits(Call(1), x, lora_a, lora_a_scales, K=K, N=rank, **few)
    result: Tensor = base + matmul_n_bits(Call(1), down, lora_b, lora_b_scales, K=rank, N=N, **few)
    return result


@operators.reference("MatMulBlockQuantizedFp8Weight")
def matmul_block_quantized_fp8(
    call: Call,
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    a_scale: Tensor | None = None,
    bias: Tensor | None = None,
    block_size: int = 128,
) -> Tensor:
    """a @ (b * b_scale)' + bias with float8 b [N, K] and a scale per block of K; a scale of a rounds it to float8."""
    weight = b.to(b_scale.dtype) * b_scale.repeat_interleave(block_size, 1)[:, : b.shape[1]]
    x = a.to(b_scale.dtype)
    if a_scale is not None:
        x = (x / a_scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(b_scale.dtype) * a_scale
    y = F.linear(x, weight).to(a.dtype)
    return y if bias is None else y + bias
