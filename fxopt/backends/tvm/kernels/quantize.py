"""float32 to codes and back: q = clamp(round(x / scale) + zero, 0, 255), stored as `dot.Format` says.

With a static range the scale and zero point are constants; with a dynamic one, a first pass finds the range of x.
"""

from __future__ import annotations

import math
from typing import Any

from fxopt.backends.tvm.codes import Format, Levels
from fxopt.backends.tvm.emit import Expr, Kernel, cast, each, float32, reinterpret, spread, typed
from fxopt.backends.tvm.kernels.rows import largest, reduce_row, smallest
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import tvm_type

_MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds half to even, and the integer is in the low bits
_MAGIC_BITS = 0x4B400000


def rounded(levels: Levels, scaled: Expr, lanes: int) -> Expr:
    """The stored code of x / scale (NaN: the lowest)."""
    low, high = float32(float(-levels.zero), lanes), float32(float(255 - levels.zero), lanes)
    clamped = tirx.Min(tirx.Max(scaled, low), high)
    bits = reinterpret(typed("int32", lanes), clamped + float32(_MAGIC, lanes))
    start = spread(tirx.IntImm("int32", _MAGIC_BITS - levels.zero + levels.shift), lanes)
    return cast(typed(tvm_type(levels.stored.dtype), lanes), bits - start)


def float_of(levels: Levels, code: Expr, lanes: int) -> Expr:
    """The value of a stored code."""
    value = cast(typed("float32", lanes), cast(typed("int32", lanes), code))
    if levels.shift != levels.zero:
        value = value + float32(float(levels.shift - levels.zero), lanes)
    return value if levels.scale == 1.0 else value * float32(levels.scale, lanes)


def quantize(name: str, count: int, levels: Levels, machine: Machine) -> Any:
    """`void NAME(x [count], q [count])`."""
    kernel = Kernel(name)
    x, q = kernel.buffer("x", count), kernel.buffer("q", count, tvm_type(levels.stored.dtype))

    def write(at: Expr, n: int) -> None:
        scaled = kernel.load(x, at, n) / float32(levels.scale, n)
        kernel.store(q, at, rounded(levels, kernel.let(scaled), n), n)

    each(kernel, count, machine.lanes, write)
    return kernel.function()


def dequantize(name: str, count: int, levels: Levels, machine: Machine) -> Any:
    """`void NAME(q [count], y [count])`."""
    kernel = Kernel(name)
    q, y = kernel.buffer("q", count, tvm_type(levels.stored.dtype)), kernel.buffer("y", count)
    each(
        kernel, count, machine.lanes,
        lambda at, n: kernel.store(y, at, float_of(levels, kernel.load(q, at, n), n), n),
    )  # fmt: skip
    return kernel.function()


def find_range(name: str, count: int, machine: Machine) -> Any:
    """`void NAME(x [count], range [2])`: scale and zero point that map x, zero included, onto 0 ... 255."""
    kernel = Kernel(name)
    x, found = kernel.buffer("x", count), kernel.buffer("range", 2)
    ends = [
        reduce_row(kernel, machine, count, start, combine, lambda at, n: kernel.let(kernel.load(x, at, n)))
        for combine, start in ((smallest, math.inf), (largest, -math.inf))
    ]
    low = kernel.let(tirx.Min(ends[0], float32(0.0)))
    high = kernel.let(tirx.Max(ends[1], float32(0.0)))
    scale = kernel.let((high - low) / float32(255.0))
    scale = kernel.let(tirx.Select(tirx.EQ(scale, float32(0.0)), float32(1.0), scale))
    zero = kernel.let((float32(0.0) - low) / scale + float32(_MAGIC)) - float32(_MAGIC)
    kernel.store(found, 0, scale)
    kernel.store(found, 1, tirx.Min(tirx.Max(zero, float32(0.0)), float32(255.0)))
    return kernel.function()


def quantize_to_range(name: str, count: int, stored: Format, machine: Machine) -> Any:
    """`void NAME(x [count], range [2], q [count])`, with the range that `find_range` gives."""
    kernel = Kernel(name)
    x, found = kernel.buffer("x", count), kernel.buffer("range", 2)
    q = kernel.buffer("q", count, tvm_type(stored.dtype))
    scale, zero = (kernel.let(kernel.load(found, index)) for index in range(2))
    # the integer part of a stored code that is not in its bits: zero - offset
    more = float32(0.0) if stored.offset is None else zero - float32(float(stored.offset))
    low, high = kernel.let(float32(0.0) - zero), kernel.let(float32(255.0) - zero)
    start = kernel.let(tirx.IntImm("int32", _MAGIC_BITS) - cast("int32", more))

    def write(at: Expr, n: int) -> None:
        scaled = kernel.let(kernel.load(x, at, n) / spread(scale, n))
        clamped = tirx.Min(tirx.Max(scaled, spread(low, n)), spread(high, n))
        bits = reinterpret(typed("int32", n), kernel.let(clamped + float32(_MAGIC, n)))
        kernel.store(q, at, cast(typed(tvm_type(stored.dtype), n), bits - spread(start, n)), n)

    each(kernel, count, machine.lanes, write)
    return kernel.function()


def round_groups(name: str, rows: int, inner: int, group: int, machine: Machine) -> Any:
    """`void NAME(x [rows, inner], y)`: round(x / s) * s per row and group of inputs, with s = max|x| / 127."""
    kernel = Kernel(name)
    x, y = kernel.buffer("x", rows * inner), kernel.buffer("y", rows * inner)

    def one(start: Expr, count: int) -> None:
        def size(at: Expr, n: int) -> Expr:
            value = kernel.let(kernel.load(x, start + at, n))
            return kernel.let(tirx.Max(value, float32(0.0, n) - value))

        scale = kernel.let(reduce_row(kernel, machine, count, 0.0, largest, size) / float32(127.0))
        scale = kernel.let(tirx.Select(tirx.EQ(scale, float32(0.0)), float32(1.0), scale))

        def write(at: Expr, n: int) -> None:
            scaled = kernel.let(kernel.load(x, start + at, n) / spread(scale, n))
            rounded_ = kernel.let(scaled + float32(_MAGIC, n)) - float32(_MAGIC, n)
            kernel.store(y, start + at, rounded_ * spread(scale, n), n)

        each(kernel, count, machine.lanes, write)

    full, rest = divmod(inner, group)
    with kernel.loop(rows, "row") as row:
        with kernel.loop(full, "g") as g:
            one(kernel.let(row * inner + g * group), group)
        if rest:
            one(kernel.let(row * inner + full * group), rest)
    return kernel.function()
