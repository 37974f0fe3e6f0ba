"""Run linears of fxopt in torch's own matrix products on CUDA devices: in 8 bits, and with 2:4 weights.

    register()  # from now on CUDA tensors go to torch._int_mm, torch._scaled_mm and semi-structured products

Not measured: written for torch 2.11 to 2.13 and compared with the definitions on CPU tensors. What the products ask for
(aten/src/ATen/native/cuda/Blas.cpp and ScaledBlas.cpp of PyTorch):
`_int_mm`: int8 matrices, more than 16 rows, both axes of the second one multiples of 8; the result is int32.
`_scaled_mm`: a row-major and a column-major float8 matrix, both axes of the second one multiples of 16; compute
capability 8.9 or later; scales per row with 16-bit results, for older versions with bfloat16 only; no bias where the
result is float32. Smaller sizes are filled up with zeros, anything else runs the definition.
2:4 (torch/sparse/semi_structured.py): compute capability 8.0 or later, float16 or bfloat16, outputs in multiples of 32
and inputs in multiples of 64 (the stricter of CUTLASS and cuSPARSELt). In 8 bits torch has such products too; they are
not used here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxopt.ir.ops import linear_fp8 as float8
from fxopt.ir.ops import linear_sparse as sparse
from fxopt.ir.ops import linear_w8a8 as integer
from fxopt.ir.target import Target

_ROWS, _INTEGER, _FLOAT8 = 17, 8, 16  # the least number of rows, and the multiples that axes must be
_CAPABILITY = (8, 9)
_LONGEST = (2**31 - 1) // (255 * 127)  # sums of more products may not fit 32 bits
_ATEN = torch.ops.aten
_MIDDLE = 128  # from codes 0 ... 255 to -128 ... 127


@cache
def register() -> None:
    """Take over the operators' CUDA tensors, once."""
    library = _library()
    library.impl(integer.linear_w8a8_dynamic.name, linear_w8a8_dynamic, "CUDA")
    library.impl(integer.linear_w8a8.name, linear_w8a8, "CUDA")
    library.impl(float8.linear_fp8.name, linear_fp8, "CUDA")
    library.impl(sparse.linear_sparse.name, linear_sparse, "CUDA")


@cache
def _library() -> Any:
    return torch.library.Library("fxopt", "IMPL", "CUDA")  # type: ignore[no-untyped-call]


def linear_w8a8_dynamic(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`fxopt::linear_w8a8_dynamic` with an integer product."""
    scale, zero = integer.dynamic_range(x)
    return _integer(x, codes, scales, bias, scale, zero)


def linear_w8a8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float, x_zero: int) -> Tensor:
    """`fxopt::linear_w8a8` with an integer product."""
    return _integer(x, codes, scales, bias, x_scale, x_zero)


def _integer(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, scale: Tensor | float, zero: Tensor | int
) -> Tensor:
    """Codes 0 ... 255 are moved by 128 into int8; the row sums of the weight make up for that and for the zero point.

    The sums are those of the definition, exactly.
    """
    out, inner = codes.shape
    if inner > _LONGEST:
        quantized = integer.quantized(x, scale, zero)
        sums = torch.matmul(quantized, codes.double().t()).to(x.dtype)
    else:
        levels = ((torch.round(x / scale) + zero).clamp(0, 255) - _MIDDLE).to(torch.int8).reshape(-1, inner)
        product = _int_mm(levels, codes)
        moved = _MIDDLE - (zero.to(torch.int32) if isinstance(zero, Tensor) else zero)
        whole = product + moved * codes.sum(1, dtype=torch.int32)
        sums = whole.to(x.dtype).reshape(*x.shape[:-1], out)
    y = sums * (scales.to(x.dtype) * scale)
    return y if bias is None else y + bias.to(x.dtype)


def _int_mm(levels: Tensor, codes: Tensor) -> Tensor:
    """levels [rows, in] @ codes [out, in] transposed, int32 [rows, out]."""
    rows, out = len(levels), len(codes)
    columns = _multiple(levels.shape[1], _INTEGER)
    levels = _filled(levels, max(rows, _ROWS), columns)
    codes = _filled(codes, _multiple(out, _INTEGER), columns)
    product: Tensor = _ATEN._int_mm(levels, codes.t())
    return product[:rows, :out]


def linear_fp8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, x_scale: float | None) -> Tensor:
    """`fxopt::linear_fp8` with a float8 product; bfloat16 is scaled inside it, other types behind it in float32."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < _CAPABILITY:
        return float8.linear_fp8.function(x, codes, scales, bias, x_scale)
    out, inner = codes.shape
    rows = x.reshape(-1, inner)
    if x_scale is None:
        steps = float8.row_steps(rows)
    else:
        steps = torch.full((len(rows), 1), x_scale, dtype=torch.float32, device=x.device)
    columns, outputs = _multiple(inner, _FLOAT8), _multiple(out, _FLOAT8)
    levels = _filled(float8.to_e4m3(rows, steps), len(rows), columns)
    weight, scales = _filled(codes, outputs, columns).t(), scales.float()
    if x.dtype == torch.bfloat16:
        scales = torch.nn.functional.pad(scales, (0, outputs - out))[None]
        added = None if bias is None else torch.nn.functional.pad(bias.to(x.dtype), (0, outputs - out))
        y: Tensor = _ATEN._scaled_mm(
            levels, weight, scale_a=steps, scale_b=scales, bias=added, out_dtype=x.dtype, use_fast_accum=False
        )[:, :out]
    else:
        one = torch.ones((), device=x.device)
        sums: Tensor = _ATEN._scaled_mm(
            levels, weight, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False
        )[:, :out]
        y = sums * steps * scales
        y = y if bias is None else y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], out)


_SPARSE = "2:4"
_SPARSE_TYPES = ("float16", "bfloat16")
_SPARSE_MULTIPLES = (32, 64)  # of outputs and inputs
_converted: Any = WeakTensorKeyDictionary()  # stored blocks -> the weight as torch's products take it


def unskipped(target: Target, dtype: str, pattern: str, shape: tuple[int, int] | None) -> str:
    """Why zeros of a weight give no time on a CUDA device; "" where torch has a product for them."""
    if pattern != _SPARSE:
        return f"the matrix units of CUDA devices skip {_SPARSE}, not {pattern}"
    if "sparse_24" not in target.features:
        return f"{target.name} does not skip {_SPARSE}: that begins with compute capability 8.0"
    if dtype not in _SPARSE_TYPES:
        return f"{_SPARSE} products take {' and '.join(_SPARSE_TYPES)}; the weight is {dtype}"
    if shape is not None and any(size % of for size, of in zip(shape, _SPARSE_MULTIPLES, strict=True)):
        outputs, inputs = _SPARSE_MULTIPLES
        return (
            f"{_SPARSE} products take outputs in multiples of {outputs} and inputs in multiples of {inputs}; the "
            f"weight is {shape[0]}x{shape[1]}"
        )
    return ""


def linear_sparse(
    x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, columns: int, pattern: str
) -> Tensor:
    """`fxopt::linear_sparse` with a semi-structured weight; the definition where there is no product for it."""
    out = len(mask) * values.shape[1]
    dtype = str(x.dtype).removeprefix("torch.")
    fits = dtype in _SPARSE_TYPES and not any(
        size % of for size, of in zip((out, columns), _SPARSE_MULTIPLES, strict=True)
    )
    if pattern != _SPARSE or not fits or (x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0)):
        return sparse.linear_sparse.function(x, values, mask, bias, columns, pattern)
    weight = _semi_structured(values, mask, columns, x.dtype)
    shift = None if bias is None else bias.to(x.dtype)
    y: Tensor = torch.nn.functional.linear(x.reshape(-1, columns), weight, shift)
    return y.reshape(*x.shape[:-1], out)


def _semi_structured(values: Tensor, mask: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight as torch's products take it, made once for the stored blocks."""
    found: Tensor | None = _converted.get(values)
    if found is None or found.dtype != dtype:
        found = torch.sparse.to_sparse_semi_structured(sparse.dense(values, mask, columns).to(dtype).contiguous())
        _converted[values] = found
    return found


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix, contiguous, with zeros behind it up to this size."""
    if matrix.shape == (rows, columns):
        return matrix.contiguous()
    filled = torch.zeros(rows, columns, dtype=matrix.dtype, device=matrix.device)
    filled[: len(matrix), : matrix.shape[1]] = matrix
    return filled
