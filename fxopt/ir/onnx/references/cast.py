"""Conversions of the element type: Cast, CastLike, BitCast."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.convert import from_strings, to_number, to_strings, to_torch
from fxopt.ir.onnx.dtypes import FROM_TORCH, TO_TORCH, from_numpy, to_numpy
from fxopt.ir.onnx.foreign import CODES, NUMBERS, Array, host_data, is_foreign, is_string
from fxopt.ir.onnx.lane import HostArray, has_symbol, to_tensor
from fxopt.ir.onnx.references.common import FLOAT8, at_least_float32, require
from fxopt.ir.onnx.registry import Call, Operators
from fxopt.ir.onnx.values import from_array

operators = Operators()

_NARROW_INTEGERS = frozenset(
    {torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32}
)  # a float goes through int64, so that what does not fit wraps around
_HOST_CASTS = {6: np.int32, 7: np.int64, 9: np.bool_}  # by TensorProto.DataType


def small_to_tensor(x: Any) -> Any:
    """An array of numbers that torch lacks as a tensor of a wider type; tensors and None as they are.

    Raises:
        MissingReference: an array of strings.
    """
    if not isinstance(x, np.ndarray):
        return x
    if is_string(x):
        raise MissingReference("the operator takes numbers, strings were given")
    return to_torch(x) if is_foreign(x) else to_tensor(x)


def to_float8(x: Tensor, dtype: torch.dtype, saturate: int) -> Tensor:
    """x rounded to a float8 type; what is too large becomes the largest number, or NaN / infinity unless `saturate`."""
    wide = at_least_float32(x) if x.is_floating_point() else x.to(torch.float32)
    largest = torch.finfo(dtype).max
    if saturate:  # clamp keeps NaN
        return torch.clamp(wide, -largest, largest).to(dtype)
    if dtype != torch.float8_e4m3fn:
        return wide.to(dtype)
    too_large = torch.abs(wide) > 464.0  # the midpoint of 448 and the next number of this exponent, which is NaN
    return torch.where(too_large, torch.full_like(wide, torch.nan), wide).to(dtype)


def convert(x: Tensor, dtype: torch.dtype, saturate: int = 1) -> Tensor:
    """x with another element type, by the rules of Cast."""
    if dtype == x.dtype:
        return x
    if dtype in FLOAT8:
        return to_float8(x, dtype, saturate)
    if x.dtype in FLOAT8:
        x = x.to(torch.float32)
    if dtype == torch.bool:
        return x != 0
    if x.is_floating_point() and dtype in _NARROW_INTEGERS:
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


def _target(to: int | str) -> int:
    """A `to` attribute as a data type number; below opset 6 it is a name."""
    return int(TensorProto.DataType.Value(to.upper())) if isinstance(to, str) else to


def convert_to(x: Any, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    """x with the element type `to`, by the rules of Cast; an array where torch lacks the type."""
    if to in TO_TORCH:
        dtype = TO_TORCH[to]
        if is_string(x):
            return convert(from_numpy(from_strings(x, dtype)), dtype, saturate)
        return convert(small_to_tensor(x), dtype, saturate)
    if to == TensorProto.STRING:
        return x if is_string(x) else to_strings(host_data(x))
    if to not in NUMBERS:
        raise MissingReference(f"there is no conversion to ONNX data type {to}")
    dtype_ = NUMBERS[to]
    numbers = from_strings(x, dtype_) if is_string(x) else host_data(x)
    return to_number(numbers, dtype_, bool(saturate), str(round_mode))


def type_code(x: Any) -> int:
    """The ONNX data type of a value of a run."""
    if isinstance(x, Tensor):
        return FROM_TORCH[x.dtype]
    if is_string(x):
        return int(TensorProto.STRING)
    return CODES[x.dtype.name] if is_foreign(x) else FROM_TORCH[to_tensor(x).dtype]


@operators.reference("Cast", raw=True)
def cast(call: Call, x: Any, to: int | str, saturate: int = 1, round_mode: str = "up") -> Any:
    """x converted to the element type `to`."""
    return convert_to(x, _target(to), saturate, round_mode)


@operators.host("Cast")
def host_cast(call: Call, x: HostArray, to: int | str, saturate: int = 1, round_mode: str = "up") -> Any:
    """Host integers stay host integers; symbolic ones are int64."""
    if to not in _HOST_CASTS or (has_symbol(x) and to != 7):
        return NotImplemented
    return x if has_symbol(x) else x.astype(_HOST_CASTS[int(to)])


@operators.reference("CastLike", raw=True)
def cast_like(call: Call, x: Any, target: Any, saturate: int = 1, round_mode: str = "up") -> Any:
    """x converted to the element type of `target`."""
    return convert_to(x, type_code(target), saturate, round_mode)


@operators.reference("BitCast", raw=True)
def bit_cast(call: Call, x: Any, to: int) -> Any:
    """The bits of x read as another element type of the same width."""
    require(not is_string(x), "BitCast of strings")
    if to in NUMBERS or is_foreign(x):
        return _bit_cast_foreign(host_data(x), to)
    tensor, dtype = to_tensor(x), TO_TORCH[to]
    require(dtype.itemsize == tensor.element_size(), f"BitCast from {tensor.dtype} to {dtype} changes the width")
    return tensor.view(dtype)


def _bit_cast_foreign(x: Array, to: int) -> Any:
    dtype: np.dtype[Any] = NUMBERS[to] if to in NUMBERS else to_numpy(torch.empty(0, dtype=TO_TORCH[to])).dtype
    require(_bits(x.dtype) == _bits(dtype), f"BitCast from {x.dtype} to {dtype} changes the width")
    bits: Array = np.ascontiguousarray(x).view(np.uint8)
    if dtype.name in ("int4", "int2"):  # ml_dtypes keeps the sign in the unused bits
        sign = 1 << (_bits(dtype) - 1)
        signed: Array = (bits.astype(np.int8) ^ sign) - sign
        return signed.astype(dtype)
    if x.dtype.name in ("int4", "int2"):
        bits = bits & ((1 << _bits(dtype)) - 1)
    return from_array(bits.view(dtype).reshape(x.shape))


def _bits(dtype: np.dtype[Any]) -> int:
    """The width of an element."""
    if dtype.name in CODES and dtype.name != "float8_e8m0fnu":
        return int(dtype.name.removeprefix("u").removeprefix("int").removeprefix("float")[0])
    return 8 * dtype.itemsize
