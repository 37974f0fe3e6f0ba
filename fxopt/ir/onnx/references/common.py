"""Helpers that several operator families share; declares no operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher

from fxopt.errors import MissingReference
from fxopt.ir.onnx.lane import to_ints
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

Ints = Sequence[Any]  # int or SymInt
WIDE_UNSIGNED = frozenset({torch.uint16, torch.uint32, torch.uint64})
FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz})
_SIGN_BIT = -(2**63)
_BITS: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def first(call: Call, *values: Any) -> Any:
    """The outputs that the node wants: the first value bare, or a tuple of the first `call.outputs`."""
    return values[0] if call.outputs == 1 else tuple(values[: call.outputs])


def require(condition: bool, reason: str) -> None:
    """Raise MissingReference with this reason unless the condition holds."""
    if not condition:
        raise MissingReference(reason)


def in_int64(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` with uint16, uint32 and uint64 tensors computed in int64; integer results are cast back.

    Right for whatever depends on the bits modulo 2**64 only; see `ordered` for comparisons.
    """

    @functools.wraps(function)
    def widened(*values: Tensor, **options: Any) -> Tensor:
        dtype = values[0].dtype
        if dtype not in WIDE_UNSIGNED:
            return function(*values, **options)
        result = function(*(value.to(torch.int64) for value in values), **options)
        return result.to(dtype) if result.dtype == torch.int64 else result

    return widened


def ordered(x: Tensor) -> Tensor:
    """An unsigned tensor as int64 values in the same order; other tensors as they are."""
    require(isinstance(x, Tensor), "strings have no torch reference")
    if x.dtype == torch.uint64:
        return x.to(torch.int64) ^ _SIGN_BIT
    return x.to(torch.int64) if x.dtype in WIDE_UNSIGNED else x


def unordered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `ordered`."""
    if dtype == torch.uint64:
        return (x ^ _SIGN_BIT).to(dtype)
    return x.to(dtype)


def as_bits(x: Tensor) -> Tensor:
    """The tensor viewed as plain integers, where torch cannot move its element type (unsigned 16-64, float8)."""
    if x.dtype in WIDE_UNSIGNED or x.dtype in FLOAT8:
        return x.view(_BITS[x.element_size()])
    return x


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 widened to float32; float64 stays, as the verifier computes in float64."""
    return x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x


def axes_of(axes: Any, rank: int) -> list[int] | None:
    """An `axes` attribute or operand as non-negative axes; None when it was omitted."""
    listed = to_ints(axes)
    return None if listed is None else [axis % rank if rank else 0 for axis in listed]


def product(sizes: Ints) -> Any:
    """The product of sizes, symbolic where one is."""
    result: Any = 1
    for size in sizes:
        result = result * size
    return result


def larger(a: Any, b: Any) -> Any:
    """max(a, b) of sizes, symbolic where one is."""
    return torch.sym_max(a, b)  # type: ignore[no-untyped-call]


def along(vector: Tensor, rank: int, axis: int) -> Tensor:
    """A vector shaped to broadcast along `axis` of a tensor of this rank."""
    shape = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)


def normal_index(index: Tensor, size: Any) -> Tensor:
    """Indices as non-negative int64: negative ones count from the end."""
    index = index.to(torch.int64)
    return torch.where(index < 0, index + size, index)


def pad_list(before: Ints, after: Ints) -> list[Any]:
    """Pads per spatial axis in the order of `torch.nn.functional.pad`: last axis first."""
    return [pad for low, high in zip(reversed(before), reversed(after), strict=True) for pad in (low, high)]


def keep_symbols(*sizes: Any) -> AbstractContextManager[Any]:
    """The context in which the few torch functions that turn symbolic sizes into constants do not.

    Under fake tensors these are `pad` and the Fourier transforms; the Python dispatcher has other rules for them.
    """
    return enable_python_dispatcher() if any(isinstance(size, torch.SymInt) for size in sizes) else nullcontext()


def pad_with(x: Tensor, pads: list[Any], value: float | bool | None = None) -> Tensor:
    """`torch.nn.functional.pad` that keeps symbolic sizes."""
    with keep_symbols(*x.shape, *pads):
        return F.pad(x, pads, value=value)
