"""QuantizeLinear, DequantizeLinear (per tensor, per axis, blocked) and DynamicQuantizeLinear."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from fxopt.ir.onnx.convert import FLOAT_SIGN_BIT, INTEGER_RANGES, to_small_float
from fxopt.ir.onnx.dtypes import TO_TORCH
from fxopt.ir.onnx.foreign import NUMBERS, host_data
from fxopt.ir.onnx.references.cast import small_to_tensor, to_float8, type_code
from fxopt.ir.onnx.references.common import FLOAT8, along, first, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

RANGES: dict[torch.dtype, tuple[int, int]] = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.uint16: (0, 65535),
    torch.int16: (-32768, 32767),
}


def aligned(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point that broadcasts against x: one number, one per index of `axis`, or one per block."""
    if parameter.dim() == 0 or (parameter.dim() == 1 and not block_size and parameter.shape[0] == 1):
        return parameter.reshape(())
    if block_size:
        repeated = parameter.repeat_interleave(block_size, axis)
        return repeated.narrow(axis, 0, x.shape[axis])
    require(parameter.dim() == 1, f"a scale of rank {parameter.dim()} without block_size has no torch reference")
    return along(parameter, x.dim(), axis)


def _range(code: int) -> tuple[int, int]:
    """The smallest and the largest number of an integer type that can be quantized to."""
    if code in NUMBERS:
        return INTEGER_RANGES[NUMBERS[code].name]
    require(TO_TORCH.get(code) in RANGES, f"QuantizeLinear to ONNX data type {code} has no torch reference")
    return RANGES[TO_TORCH[code]]


def _output_code(zero_point: Any, output_dtype: int) -> int:
    """The ONNX type of a quantized tensor: that of the zero point, else the attribute, else uint8."""
    return type_code(zero_point) if zero_point is not None else output_dtype or int(TensorProto.UINT8)


@operators.reference("QuantizeLinear")
def quantize_linear(
    call: Call,
    x: Tensor,
    scale: Any,
    zero_point: Any = None,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Any:
    """saturate(round(x / scale) + zero_point), rounding half to even; an array where torch lacks the type."""
    code = _output_code(zero_point, output_dtype)
    scale, zero_point = small_to_tensor(scale), small_to_tensor(zero_point)
    divide_in = TO_TORCH[precision] if precision else scale.dtype
    if torch.float64 in (x.dtype, scale.dtype):
        divide_in = torch.float64
    quotient = x.to(divide_in) / aligned(scale, x, axis, block_size).to(divide_in)
    if code in NUMBERS and NUMBERS[code].name in FLOAT_SIGN_BIT:
        if zero_point is not None:
            quotient = quotient + aligned(zero_point, x, axis, block_size).to(divide_in)
        return to_small_float(host_data(quotient), NUMBERS[code])
    if code in TO_TORCH and TO_TORCH[code] in FLOAT8:
        return to_float8(quotient, TO_TORCH[code], saturate)
    low, high = _range(code)
    rounded = torch.round(quotient)
    if divide_in in (torch.float16, torch.bfloat16):
        rounded = rounded.to(torch.float32)
    if zero_point is not None:
        rounded = rounded + aligned(zero_point, x, axis, block_size).to(rounded.dtype)
    whole = torch.clamp(rounded, low, high).to(torch.int32)
    return whole.to(TO_TORCH[code]) if code in TO_TORCH else host_data(whole).astype(NUMBERS[code])


@operators.reference("DequantizeLinear")
def dequantize_linear(
    call: Call,
    x: Any,
    scale: Any,
    zero_point: Any = None,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    """(x - zero_point) * scale in the type of the scale; x may be an array of numbers that torch lacks.

    A float8e8m0 scale comes with `output_dtype`; without it the result is float32.
    """
    x, scale, zero_point = small_to_tensor(x), small_to_tensor(scale), small_to_tensor(zero_point)
    dtype = TO_TORCH[output_dtype] if output_dtype and scale.dtype != torch.float64 else scale.dtype
    compute_in = torch.promote_types(scale.dtype, torch.float32)
    exact_in = torch.float64 if x.dtype == torch.int32 else compute_in
    shifted = x.to(exact_in)
    if zero_point is not None and x.dtype not in FLOAT8:
        shifted = shifted - aligned(zero_point, x, axis, block_size).to(exact_in)
    scaled: Tensor = shifted.to(compute_in) * aligned(scale, x, axis, block_size).to(compute_in)
    return scaled.to(dtype)


@operators.reference("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call, x: Tensor) -> Any:
    """x as uint8 with scale (max(x, 0) - min(x, 0)) / 255 and the zero point that makes 0 exact.

    Where x is zero throughout, the scale is 1 / 255, as in ONNX's reference implementation.
    """
    low, high = torch.clamp(x.amin(), max=0), torch.clamp(x.amax(), min=0)
    scale = torch.where(high == low, torch.ones_like(high), high - low) / 255
    shift = torch.where(low == 0, torch.zeros_like(low), low / scale)  # the scale of subnormal numbers may be 0
    zero_point = torch.round(torch.clamp(0 - shift, 0, 255))
    y = torch.clamp(torch.round(x / scale) + zero_point, 0, 255).to(torch.uint8)
    return first(call, y, scale, zero_point.to(torch.uint8))
