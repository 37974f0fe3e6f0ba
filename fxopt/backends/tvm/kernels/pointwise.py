"""Fused pointwise expressions over strided operands; a copy is the smallest of them.

An expression is a tuple: ("load", operand), ("constant", value, dtype), ("decode", code, levels) and ("encode", value,
levels) between float32 and 8-bit codes, or (operator, argument, ...). Truth values are TIR booleans inside an
expression and bytes in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxopt.backends.tvm.emit import Expr, Kernel, cast, differs, each, float32, int32, is_nan, spread, typed
from fxopt.backends.tvm.kernels.activations import ACTIVATIONS, apply
from fxopt.backends.tvm.kernels.approximations import erf, exp
from fxopt.backends.tvm.kernels.functions import FUNCTIONS
from fxopt.backends.tvm.kernels.quantize import float_of, rounded
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import tvm_type

Tree = tuple[Any, ...]


@dataclass(frozen=True)
class Operand:
    """Memory that an expression reads: strides for the axes of the result (0: broadcast), offset, elements in all."""

    strides: tuple[int, ...]
    offset: int
    count: int
    dtype: str


def pointwise(
    name: str, tree: Tree, shape: tuple[int, ...], operands: tuple[Operand, ...], place: Operand, machine: Machine
) -> Any:
    """`void NAME(operand, ..., y)`: y[place] = tree, over all elements of `shape`."""
    kernel = Kernel(name)
    buffers = [kernel.buffer(f"x{i}", operand.count, tvm_type(operand.dtype)) for i, operand in enumerate(operands)]
    y = kernel.buffer("y", place.count, tvm_type(place.dtype))
    shape, strides = _collapsed(shape, [*(operand.strides for operand in operands), place.strides])
    offsets = [*(operand.offset for operand in operands), place.offset]
    lanes = machine.lanes

    def inner(starts: list[Expr]) -> None:
        steps = [s[-1] if s else 1 for s in strides]

        def write(at: Expr, n: int) -> None:
            def load(index: int) -> Expr:
                value = _load(kernel, buffers[index], starts[index], at, steps[index], n)
                return _truth(value, n) if operands[index].dtype == "uint8" else value

            value = evaluate(kernel, tree, load, n)
            value = _from_truth(value, "uint8", n) if place.dtype == "uint8" else value
            kernel.store(y, starts[-1] + at * steps[-1], value, n, steps[-1])

        each(kernel, shape[-1] if shape else 1, lanes, write)

    def nest(axis: int, starts: list[Expr]) -> None:
        if axis >= len(shape) - 1:
            inner(starts)
            return
        with kernel.loop(shape[axis], "i") as index:
            nest(axis + 1, [kernel.let(start + index * s[axis]) for start, s in zip(starts, strides, strict=True)])

    if math.prod(shape):
        nest(0, [int32(offset) for offset in offsets])
    return kernel.function()


def _load(kernel: Kernel, buffer: Any, start: Expr, at: Expr, step: int, lanes: int) -> Expr:
    if step == 0:
        return kernel.let(spread(kernel.load(buffer, start), lanes))
    return kernel.let(kernel.load(buffer, start + at * step, lanes, step))


def _truth(value: Expr, lanes: int) -> Expr:
    return tirx.NE(value, spread(tirx.IntImm("uint8", 0), lanes))


def _from_truth(value: Expr, dtype: str, lanes: int) -> Expr:
    if dtype == "float32":
        return tirx.Select(value, float32(1.0, lanes), float32(0.0, lanes))
    one, zero = (spread(tirx.IntImm(dtype, number), lanes) for number in (1, 0))
    return tirx.Select(value, one, zero)


def _collapsed(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The same elements with fewer axes: those of size 1 dropped, neighbours that all operands step through joined."""
    axes = [axis for axis, size in enumerate(shape) if size != 1]
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for axis in axes:
        size = shape[axis]
        if sizes and all(s[-1] == given[axis] * size for s, given in zip(steps, strides, strict=True)):
            sizes[-1] *= size
            for s, given in zip(steps, strides, strict=True):
                s[-1] = given[axis]
            continue
        sizes.append(size)
        for s, given in zip(steps, strides, strict=True):
            s.append(given[axis])
    return tuple(sizes), [tuple(s) for s in steps]


# ---- expressions


def evaluate(kernel: Kernel, tree: Tree, load: Callable[[int], Expr], lanes: int) -> Expr:
    """The value of an expression for `lanes` neighbouring elements."""
    operator, *rest = tree
    if operator == "load":
        return load(rest[0])
    if operator == "constant":
        return _constant(rest[0], rest[1], lanes)
    if operator == "cast":
        return _cast(evaluate(kernel, rest[0], load, lanes), rest[1], rest[2], lanes)
    if operator in ("decode", "encode"):
        value, levels = kernel.let(evaluate(kernel, rest[0], load, lanes)), rest[1]
        if operator == "decode":
            return float_of(levels, value, lanes)
        return rounded(levels, kernel.let(value / float32(levels.scale, lanes)), lanes)
    values = [kernel.let(evaluate(kernel, part, load, lanes)) for part in rest]
    if operator in ACTIVATIONS:
        return apply(kernel, operator, values[0], lanes)
    if operator in ("exp", "erf"):
        return (exp if operator == "exp" else erf)(kernel, values[0], lanes)
    if operator in FUNCTIONS:
        return FUNCTIONS[operator](kernel, values[0], lanes)
    return OPERATORS[operator](*values)


def _constant(value: float, dtype: str, lanes: int) -> Expr:
    if dtype == "float32":
        return float32(value, lanes)
    return spread(tirx.IntImm("bool" if dtype == "uint8" else tvm_type(dtype), int(value)), lanes)


def _cast(value: Expr, source: str, target: str, lanes: int) -> Expr:
    if target == "uint8":
        return differs(value, _constant(0, source, lanes))
    if source == "uint8":
        return _from_truth(value, target, lanes)
    return cast(typed(target, lanes), value)


def _maximum(a: Expr, b: Expr) -> Expr:
    return tirx.Select(is_nan(a), a, tirx.Max(a, b))  # Max(a, b) is a > b ? a : b, so that NaN in b stays


def _minimum(a: Expr, b: Expr) -> Expr:
    return tirx.Select(is_nan(a), a, tirx.Min(a, b))


def _rsqrt(a: Expr) -> Expr:
    return _one(a) / tirx.sqrt(a)


def _one(a: Expr) -> Expr:
    return float32(1.0, _lanes(a))


def _lanes(a: Expr) -> int:
    return int(getattr(a.ty, "lanes", 1) or 1)


OPERATORS: dict[str, Callable[..., Expr]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "maximum": _maximum,
    "minimum": _minimum,
    "sqrt": tirx.sqrt,
    "rsqrt": _rsqrt,
    "abs": tirx.abs,
    "floor": tirx.floor,
    "where": tirx.Select,
    "eq": tirx.EQ,
    "ne": differs,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "and": tirx.And,
    "or": tirx.Or,
    "not": tirx.Not,
    "floordiv": tirx.floordiv,
    "floormod": tirx.floormod,
    "truncdiv": tirx.truncdiv,
}
