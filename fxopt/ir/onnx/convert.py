"""Conversions to and from the element types that torch lacks, by the rules of ONNX's Cast.

Source: the operator's specification (opset 28); OCP Microscaling Formats 1.0 (float4, float6, float8e8m0). Where the
specification says "undefined" or "unspecified": a float outside the range of a 2- or 4-bit integer keeps its low bits;
NaN as a float4, a float6 or an integer is zero; float8e8m0 has no sign, so |x| is converted.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import torch

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.dtypes import from_numpy
from fxopt.ir.onnx.foreign import CODES, Array, strings

INTEGER_RANGES: dict[str, tuple[int, int]] = {"int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3)}
FLOAT_SIGN_BIT: dict[str, int] = {"float4_e2m1fn": 0x8, "float6_e2m3fn": 0x20, "float6_e3m2fn": 0x20}
_E8M0_NAN, _E8M0_MAX, _E8M0_BIAS = 0xFF, 0xFE, 127
_INT64_LIMIT = 2.0**63 - 1024  # the largest float64 that an int64 holds
_SPECIAL = {"inf": np.inf, "+inf": np.inf, "-inf": -np.inf, "nan": np.nan}


@cache
def _magnitudes(name: str) -> tuple[Array, Array]:
    """The non-negative values of a float type in increasing order (= by code), and the midpoints between them."""
    codes = np.arange(FLOAT_SIGN_BIT[name], dtype=np.uint8)
    values = codes.view(_dtype(name)).astype(np.float64)
    return values, (values[1:] + values[:-1]) / 2


def _dtype(name: str) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


def to_small_float(x: Array, dtype: np.dtype[Any]) -> Array:
    """x rounded to the nearest float4 or float6, ties to even; what is too large becomes the largest number."""
    wide = np.asarray(x).astype(np.float64)
    _, midpoints = _magnitudes(dtype.name)
    magnitude = np.where(np.isnan(wide), 0.0, np.abs(wide))
    below = np.searchsorted(midpoints, magnitude, side="left")
    tie = midpoints[np.minimum(below, len(midpoints) - 1)] == magnitude
    codes = below + (tie & (below % 2 == 1))
    sign = np.where(np.signbit(wide) & ~np.isnan(wide), FLOAT_SIGN_BIT[dtype.name], 0)
    result: Array = (codes | sign).astype(np.uint8).view(dtype)
    return result


def to_e8m0(x: Array, saturate: bool = True, round_mode: str = "up") -> Array:
    """|x| rounded to a power of two from 2**-127 to 2**127; `nearest` rounds ties up.

    Zero, infinity and what is out of range become the nearest number if `saturate`, else NaN.
    """
    if round_mode not in ("up", "down", "nearest"):
        raise InvalidInput(f"round_mode {round_mode!r} given; expected 'up', 'down' or 'nearest'")
    wide = np.abs(np.asarray(x).astype(np.float64))
    finite = np.isfinite(wide) & (wide > 0)
    fraction, exponent = np.frexp(np.where(finite, wide, 1.0))  # fraction in [0.5, 1)
    threshold = {"up": 0.5, "down": 1.0, "nearest": 0.75}[round_mode]
    rounds_up = fraction > threshold if round_mode == "up" else fraction >= threshold
    power = exponent - 1 + rounds_up + _E8M0_BIAS
    power = np.where(finite, power, np.where(wide == 0, -1, _E8M0_MAX + 1))
    inside = np.clip(power, 0, _E8M0_MAX)
    codes = inside if saturate else np.where(power == inside, inside, _E8M0_NAN)
    return np.where(np.isnan(wide), _E8M0_NAN, codes).astype(np.uint8).view(_dtype("float8_e8m0fnu"))


def to_small_integer(x: Array, dtype: np.dtype[Any]) -> Array:
    """The low 2 or 4 bits of x, truncated towards zero."""
    if x.dtype.kind in "iub":
        whole = x.astype(np.int64)
    else:
        whole = np.trunc(np.clip(np.nan_to_num(x.astype(np.float64)), -_INT64_LIMIT, _INT64_LIMIT)).astype(np.int64)
    low, high = INTEGER_RANGES[dtype.name]
    return ((whole - low) % (high - low + 1) + low).astype(dtype)


def to_number(x: Array, dtype: np.dtype[Any], saturate: bool = True, round_mode: str = "up") -> Array:
    """Numbers of any numpy or `ml_dtypes` type as a type that torch lacks."""
    if x.dtype == dtype:
        return x
    if x.dtype.name in CODES:
        x = x.astype(np.float32)  # exact
    if dtype.name in INTEGER_RANGES:
        return to_small_integer(x, dtype)
    if dtype.name in FLOAT_SIGN_BIT:
        return to_small_float(x, dtype)
    return to_e8m0(x, saturate, round_mode)


def to_strings(x: Array) -> Array:
    """Numbers as text: the shortest that reads back as the same number, without exponent; "INF", "-INF", "NaN"."""
    flat = [_text(item) for item in x.reshape(-1)]
    return strings(flat).reshape(x.shape) if flat else np.empty(x.shape, dtype=object)


def _text(item: Any) -> str:
    if isinstance(item, (bool, np.bool_, int, np.integer)):
        return str(int(item))
    if np.isnan(item):
        return "NaN"
    if np.isinf(item):
        return "INF" if item > 0 else "-INF"
    if not isinstance(item, np.floating):  # ml_dtypes
        item = np.float32(item)
    return np.format_float_positional(item, trim="0")


def from_strings(x: Array, dtype: torch.dtype | np.dtype[Any]) -> Array:
    """Text as float64 numbers, or as Python integers' int64 / uint64 where an integer type is wanted.

    Raises:
        InvalidInput: a string is no number.
    """
    integer = isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex)
    parse = _integer if integer else _float
    wide = (np.uint64 if dtype == torch.uint64 else np.int64) if integer else np.float64
    return np.array([parse(text) for text in x.reshape(-1)], dtype=wide).reshape(x.shape)


def _float(text: str) -> float:
    stripped = str(text).strip()
    special = _SPECIAL.get(stripped.lower())
    if special is not None:
        return float(special)
    try:
        return float(stripped)
    except ValueError as error:
        raise InvalidInput(
            f"Cast of the string {text!r}: expected a number, such as '3.14', '1e-5' or 'INF'"
        ) from error


def _integer(text: str) -> int:
    try:
        return int(str(text))
    except ValueError:
        return int(_float(text))


def to_torch(x: Array) -> torch.Tensor:
    """Numbers that torch lacks as the wider type that holds them exactly: int8, uint8 or float32."""
    if x.dtype.name in INTEGER_RANGES:
        return from_numpy(x.astype(np.int8 if x.dtype.name.startswith("int") else np.uint8))
    return from_numpy(x.astype(np.float32))
