"""Conversions of the element type: Cast, CastLike, BitCast."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.dtypes import TO_TORCH
from fxopt.ir.onnx.lane import HostArray, has_symbol
from fxopt.ir.onnx.references.common import FLOAT8, at_least_float32, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_NARROW_INTEGERS = frozenset(
    {torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32}
)  # a float goes through int64, so that what does not fit wraps around
_SMALL = {"int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8, "float4_e2m1fn": np.float32}
_HOST_CASTS = {6: np.int32, 7: np.int64, 9: np.bool_}  # by TensorProto.DataType


def small_to_tensor(x: Any) -> Any:
    """A numpy array of 2- or 4-bit numbers as the tensor of a wider type; tensors and None as they are.

    Raises:
        MissingReference: another array that torch cannot hold (strings, float6, ...).
    """
    if not isinstance(x, np.ndarray):
        return x
    wider = _SMALL.get(x.dtype.name)
    if wider is None:
        raise MissingReference(f"torch has no element type {x.dtype}")
    return torch.from_numpy(x.astype(wider))


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


def _target(to: int | str) -> torch.dtype:
    """The torch type of a `to` attribute: a data type number, or below opset 6 its name."""
    if isinstance(to, str):
        from onnx import TensorProto

        to = int(TensorProto.DataType.Value(to.upper()))
    if to not in TO_TORCH:
        raise MissingReference(f"torch has no element type for ONNX data type {to}")
    return TO_TORCH[to]


@operators.reference("Cast")
def cast(call: Call, x: Any, to: int | str, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """x converted to the element type `to`."""
    return convert(small_to_tensor(x), _target(to), saturate)


@operators.host("Cast")
def host_cast(call: Call, x: HostArray, to: int | str, saturate: int = 1, round_mode: str = "up") -> Any:
    """Host integers stay host integers; symbolic ones are int64."""
    if to not in _HOST_CASTS or (has_symbol(x) and to != 7):
        return NotImplemented
    return x if has_symbol(x) else x.astype(_HOST_CASTS[int(to)])


@operators.reference("CastLike")
def cast_like(call: Call, x: Any, target: Any, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """x converted to the element type of `target`."""
    if not isinstance(target, Tensor):
        raise MissingReference(f"torch has no element type {getattr(target, 'dtype', type(target).__name__)}")
    return convert(small_to_tensor(x), target.dtype, saturate)


@operators.reference("BitCast")
def bit_cast(call: Call, x: Tensor, to: int) -> Tensor:
    """The bits of x read as another element type of the same width."""
    require(isinstance(x, Tensor), "BitCast of an element type that torch has not")
    dtype = _target(to)
    require(dtype.itemsize == x.element_size(), f"BitCast from {x.dtype} to {dtype} changes the width")
    return x.view(dtype)
