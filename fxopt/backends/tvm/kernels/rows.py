"""Softmax, layer norm and RMS norm over the last axis, one row at a time, with vector partial sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fxopt.backends.tvm.emit import Expr, Kernel, each, float32, int32, is_nan, spread
from fxopt.backends.tvm.kernels.approximations import exp_below_one
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine

Combine = Callable[[Expr, Expr], Expr]


def add(a: Expr, b: Expr) -> Expr:
    """Sum."""
    return a + b


def largest(a: Expr, b: Expr) -> Expr:
    """Maximum; NaN when either is (the comparison alone would drop it on one side)."""
    return tirx.Select(is_nan(a), a, tirx.Select(a > b, a, b))


def smallest(a: Expr, b: Expr) -> Expr:
    """Minimum; NaN when either is."""
    return tirx.Select(is_nan(a), a, tirx.Select(a < b, a, b))


def reduce_row(
    kernel: Kernel, machine: Machine, size: int, start: float, combine: Combine, value: Callable[[Expr, int], Expr]
) -> Expr:
    """Combine `value(offset, lanes)` over 0 ... size - 1, in the lanes first, then the lanes in order."""
    lanes = machine.lanes if size >= machine.lanes else 1
    partial = kernel.local(lanes)
    kernel.store(partial, 0, float32(start, lanes), lanes)
    full = size // lanes
    with kernel.loop(full, "r") as index:
        kernel.store(partial, 0, combine(kernel.load(partial, 0, lanes), value(index * lanes, lanes)), lanes)
    total = kernel.local(1)
    kernel.store(total, 0, kernel.load(partial, 0))
    for lane in range(1, lanes):
        kernel.store(total, 0, combine(kernel.load(total, 0), kernel.load(partial, lane)))
    for offset in range(full * lanes, size):
        kernel.store(total, 0, combine(kernel.load(total, 0), value(int32(offset), 1)))
    return kernel.let(kernel.load(total, 0))


def softmax_row(kernel: Kernel, machine: Machine, size: int, x: Any, source: Expr, y: Any, place: Expr) -> None:
    """y[place + i] = e**(x[source + i] - max) / sum; x and y may be one buffer. A row of -inf gives NaN."""

    def given(at: Expr, lanes: int) -> Expr:
        return kernel.let(kernel.load(x, source + at, lanes))

    high = reduce_row(
        kernel, machine, size, -math.inf, largest, lambda at, n: kernel.let(kernel.load(x, source + at, n))
    )

    def exponential(at: Expr, lanes: int) -> Expr:
        shifted = kernel.let(kernel.load(x, source + at, lanes) - spread(high, lanes))
        value = exp_below_one(kernel, shifted, lanes)
        kernel.store(y, place + at, value, lanes)
        return value

    total = reduce_row(kernel, machine, size, 0.0, add, exponential)
    scale = kernel.let(float32(1.0) / total)
    each(
        kernel, size, machine.lanes,
        lambda at, n: kernel.store(y, place + at, kernel.load(y, place + at, n) * spread(scale, n), n),
    )  # fmt: skip


def softmax(name: str, rows: int, size: int, machine: Machine) -> Any:
    """`void NAME(x [rows, size], y)`: e**(x - max(x)) / sum(e**(x - max(x)))."""
    kernel = Kernel(name)
    x, y = kernel.buffer("x", rows * size), kernel.buffer("y", rows * size)
    with kernel.loop(rows, "row") as row:
        softmax_row(kernel, machine, size, x, row * size, y, row * size)
    return kernel.function()


def layer_norm(name: str, rows: int, size: int, eps: float, machine: Machine, *, affine: tuple[bool, bool]) -> Any:
    """`void NAME(x [rows, size], [weight], [bias], y)`: (x - mean) / sqrt(variance + eps) * weight + bias.

    The variance is that of the centred values, in a pass of its own: no cancellation (Ba et al., 2016).
    """
    kernel = Kernel(name)
    x = kernel.buffer("x", rows * size)
    weight = kernel.buffer("weight", size) if affine[0] else None
    bias = kernel.buffer("bias", size) if affine[1] else None
    y = kernel.buffer("y", rows * size)
    with kernel.loop(rows, "row") as row:
        start = row * size
        total = reduce_row(kernel, machine, size, 0.0, add, lambda at, n: kernel.load(x, start + at, n))
        mean = kernel.let(total * float32(1 / size))

        def square(at: Expr, lanes: int, start: Expr = start, mean: Expr = mean) -> Expr:
            centred = kernel.let(kernel.load(x, start + at, lanes) - spread(mean, lanes))
            return centred * centred

        squares = reduce_row(kernel, machine, size, 0.0, add, square)
        scale = kernel.let(float32(1.0) / tirx.sqrt(squares * float32(1 / size) + float32(eps)))
        _scale_row(kernel, machine, size, (x, weight, bias, y), start, mean, scale)
    return kernel.function()


def rms_norm(name: str, rows: int, size: int, eps: float, machine: Machine, *, weighted: bool) -> Any:
    """`void NAME(x [rows, size], [weight], y)`: x / sqrt(mean(x**2) + eps) * weight (Zhang & Sennrich, 2019)."""
    kernel = Kernel(name)
    x = kernel.buffer("x", rows * size)
    weight = kernel.buffer("weight", size) if weighted else None
    y = kernel.buffer("y", rows * size)
    with kernel.loop(rows, "row") as row:
        start = row * size

        def square(at: Expr, lanes: int, start: Expr = start) -> Expr:
            value = kernel.let(kernel.load(x, start + at, lanes))
            return value * value

        squares = reduce_row(kernel, machine, size, 0.0, add, square)
        scale = kernel.let(float32(1.0) / tirx.sqrt(squares * float32(1 / size) + float32(eps)))
        _scale_row(kernel, machine, size, (x, weight, None, y), start, None, scale)
    return kernel.function()


def _scale_row(
    kernel: Kernel, machine: Machine, size: int, buffers: Any, start: Expr, mean: Expr | None, scale: Expr
) -> None:
    x, weight, bias, y = buffers

    def write(at: Expr, lanes: int) -> None:
        value = kernel.load(x, start + at, lanes)
        value = (value if mean is None else value - spread(mean, lanes)) * spread(scale, lanes)
        value = value if weight is None else value * kernel.load(weight, at, lanes)
        kernel.store(y, start + at, value if bias is None else value + kernel.load(bias, at, lanes), lanes)

    each(kernel, size, machine.lanes, write)
