"""Element-wise arithmetic, comparison and logic of two tensors, and the same on host arrays."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.ir.onnx.lane import HostArray
from fxopt.ir.onnx.references.common import in_int64, ordered
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def old_broadcast(a: Tensor, b: Tensor, broadcast: int, axis: int | None) -> Tensor:
    """`b` shaped for opset < 7, where `broadcast=1, axis=k` aligns the axes of b with those of a from k on."""
    if not broadcast or axis is None or b.dim() >= a.dim():
        return b
    trailing = a.dim() - axis % a.dim() - b.dim()
    return b.reshape([*b.shape, *[1] * trailing])


def _declare(op_type: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    @operators.reference(op_type)
    def binary(
        call: Call,
        a: Tensor,
        b: Tensor,
        broadcast: int = 0,
        axis: int | None = None,
        consumed_inputs: list[int] | None = None,
    ) -> Tensor:
        return function(a, old_broadcast(a, b, broadcast, axis))

    binary.__doc__ = f"{op_type}(a, b), element by element with broadcasting."


def unsigned_divide(a: Tensor, b: Tensor) -> Tensor:
    """floor(a / b) of uint64 values held in int64 (Hacker's Delight, section 9-3)."""
    half = (a >> 1) & (2**63 - 1)
    safe = torch.where(b <= 0, torch.ones_like(b), b)
    quotient = torch.div(half, safe, rounding_mode="trunc") << 1
    remainder = a - quotient * safe
    sign_bit = -(2**63)
    quotient = quotient + ((remainder ^ sign_bit) >= (safe ^ sign_bit)).to(torch.int64)
    large = ((a ^ sign_bit) >= (b ^ sign_bit)).to(torch.int64)
    return torch.where(b < 0, large, quotient)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b; integers are truncated towards zero."""
    if a.is_floating_point() or a.is_complex():
        return a / b
    if a.dtype == torch.uint64:
        return unsigned_divide(a.to(torch.int64), b.to(torch.int64)).to(torch.uint64)
    return in_int64(functools.partial(torch.div, rounding_mode="trunc"))(a, b)


def power(a: Tensor, b: Tensor) -> Tensor:
    """a ** b in the type of a."""
    if a.is_floating_point():
        return torch.pow(a, b if b.is_floating_point() else b.to(a.dtype)).to(a.dtype)
    if b.is_floating_point():
        return torch.pow(a.to(torch.float64), b).to(a.dtype)
    return torch.pow(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)


def _compare(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: function(ordered(a), ordered(b))


_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": in_int64(torch.add),
    "Sub": in_int64(torch.sub),
    "Mul": in_int64(torch.mul),
    "Div": divide,
    "Pow": power,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Equal": _compare(torch.eq),
    "Less": _compare(torch.lt),
    "LessOrEqual": _compare(torch.le),
    "Greater": _compare(torch.gt),
    "GreaterOrEqual": _compare(torch.ge),
    "BitwiseAnd": in_int64(torch.bitwise_and),
    "BitwiseOr": in_int64(torch.bitwise_or),
    "BitwiseXor": in_int64(torch.bitwise_xor),
}
for _op_type, _function in _FUNCTIONS.items():
    _declare(_op_type, _function)


@operators.reference("BitShift")
def bit_shift(call: Call, a: Tensor, b: Tensor, direction: str) -> Tensor:
    """a << b or a >> b; beyond the width only the sign remains: -1 for a negative a shifted right, else 0."""
    width = 8 * a.element_size()
    value, count = a.to(torch.int64), b.to(torch.int64)
    beyond = (count < 0) | (count >= width)
    safe = count.clamp(0, width - 1)
    if str(direction) == "LEFT":
        return torch.where(beyond, 0, value << safe).to(a.dtype)
    shifted = value >> safe
    if a.dtype == torch.uint64:  # the mask makes the arithmetic shift of int64 a logical one
        mask = torch.where(safe == 0, -1, (1 << (64 - safe).clamp(max=63)) - 1)
        return torch.where(beyond, 0, shifted & mask).to(a.dtype)
    return torch.where(beyond, value >> 63, shifted).to(a.dtype)


@operators.reference("Mod")
def mod(call: Call, a: Tensor, b: Tensor, fmod: int = 0) -> Tensor:
    """a modulo b: with the sign of a when `fmod`, else with the sign of b."""
    if a.dtype == torch.uint64:
        wide_a, wide_b = a.to(torch.int64), b.to(torch.int64)
        return (wide_a - unsigned_divide(wide_a, wide_b) * wide_b).to(torch.uint64)
    return in_int64(torch.fmod if fmod else torch.remainder)(a, b)


def _divide_number(a: Any, b: Any) -> Any:
    """a / b truncated towards zero; comparisons of symbolic integers become guards."""
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


def _host_arithmetic(op_type: str, function: Callable[[Any, Any], Any]) -> None:
    @operators.host(op_type)
    def host(
        call: Call,
        a: HostArray,
        b: HostArray,
        broadcast: int = 0,
        axis: int | None = None,
        fmod: int = 0,
        consumed_inputs: list[int] | None = None,
    ) -> Any:
        if fmod or (broadcast and axis is not None):
            return NotImplemented
        return np.asarray(function(a, b), dtype=object if object in (a.dtype, b.dtype) else a.dtype)

    host.__doc__ = f"{op_type}(a, b) of host integers."


def _host_test(op_type: str, function: Callable[[Any, Any], Any]) -> None:
    elementwise = np.frompyfunc(lambda a, b: bool(function(a, b)), 2, 1)

    @operators.host(op_type)
    def host(call: Call, a: HostArray, b: HostArray, broadcast: int = 0, axis: int | None = None) -> Any:
        if broadcast and axis is not None:
            return NotImplemented
        return np.asarray(elementwise(a, b), dtype=bool)

    host.__doc__ = f"{op_type}(a, b) of host values; a test of a symbolic integer becomes a guard."


for _op_type, _number_function in {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": np.frompyfunc(_divide_number, 2, 1),
    "Mod": np.frompyfunc(operator.mod, 2, 1),
}.items():
    _host_arithmetic(_op_type, _number_function)
for _op_type, _test in {
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "And": operator.and_,
    "Or": operator.or_,
}.items():
    _host_test(_op_type, _test)
