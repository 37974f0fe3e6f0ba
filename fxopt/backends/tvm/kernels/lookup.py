"""Elements by position along one axis: y[o, i] = x[o, positions[i]]."""

from __future__ import annotations

import math
from typing import Any

from fxopt.backends.tvm.emit import Expr, Kernel, cast, each, float32, spread
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import tvm_type


def lookup(
    name: str, outer: int, size: int, count: int, inner: int, index: str, kind: str, machine: Machine, *, rows: bool
) -> Any:
    """`void NAME(x [outer, size, inner], positions [count] or [outer, count], y [outer, count, inner])`.

    Args:
        index: the positions' type; those below zero count from the end. A C function raises nothing: one outside gives
            NaN (zero where `kind` is no float).
        rows: positions differ from one `outer` to the next.
    """
    kernel = Kernel(name)
    x = kernel.buffer("x", outer * size * inner, tvm_type(kind))
    positions = kernel.buffer("positions", (outer if rows else 1) * count, index)
    y = kernel.buffer("y", outer * count * inner, tvm_type(kind))
    outside = float32(math.nan) if kind == "float32" else tirx.IntImm(tvm_type(kind), 0)
    zero, end = tirx.IntImm(index, 0), tirx.IntImm(index, size)
    with kernel.loop(outer, "o") as o, kernel.loop(count, "i") as i:
        given = kernel.let(kernel.load(positions, o * count + i if rows else i))
        place = kernel.let(tirx.Select(given < zero, given + end, given))
        inside = kernel.let(tirx.And(place >= zero, place < end))
        source = kernel.let((o * size + cast("int32", place)) * inner)
        target = kernel.let((o * count + i) * inner)

        def copy(at: Expr, n: int, source: Expr = source, target: Expr = target) -> None:
            kernel.store(y, target + at, kernel.load(x, source + at, n), n)

        def fill(at: Expr, n: int, target: Expr = target) -> None:
            kernel.store(y, target + at, spread(outside, n), n)

        with kernel.when(inside):
            each(kernel, inner, machine.lanes, copy)
        with kernel.when(tirx.Not(inside)):
            each(kernel, inner, machine.lanes, fill)
    return kernel.function()


def take_along(
    name: str, outer: int, size: int, count: int, inner: int, index: str, kind: str, machine: Machine
) -> Any:
    """`void NAME(x [outer, size, inner], positions [outer, count, inner], y [outer, count, inner])`.

    y[o, i, n] = x[o, positions[o, i, n], n]; positions outside as in `lookup`.
    """
    kernel = Kernel(name)
    x = kernel.buffer("x", outer * size * inner, tvm_type(kind))
    positions = kernel.buffer("positions", outer * count * inner, index)
    y = kernel.buffer("y", outer * count * inner, tvm_type(kind))
    outside = float32(math.nan) if kind == "float32" else tirx.IntImm(tvm_type(kind), 0)
    zero, end = tirx.IntImm(index, 0), tirx.IntImm(index, size)
    with kernel.loop(outer, "o") as o, kernel.loop(count, "i") as i, kernel.loop(inner, "n") as n:
        target = kernel.let((o * count + i) * inner + n)
        given = kernel.let(kernel.load(positions, target))
        place = kernel.let(tirx.Select(given < zero, given + end, given))
        kernel.store(y, target, outside)
        with kernel.when(tirx.And(place >= zero, place < end)):
            kernel.store(y, target, kernel.load(x, (o * size + cast("int32", place)) * inner + n))
    return kernel.function()


def put_along(name: str, outer: int, size: int, count: int, inner: int, index: str, kind: str, machine: Machine) -> Any:
    """`void NAME(positions [outer, count, inner], values [outer, count, inner], y [outer, size, inner])`.

    y[o, positions[o, i, n], n] = values[o, i, n], in the order of i; positions outside are left out.
    """
    kernel = Kernel(name)
    positions = kernel.buffer("positions", outer * count * inner, index)
    values = kernel.buffer("values", outer * count * inner, tvm_type(kind))
    y = kernel.buffer("y", outer * size * inner, tvm_type(kind))
    zero, end = tirx.IntImm(index, 0), tirx.IntImm(index, size)
    with kernel.loop(outer, "o") as o, kernel.loop(count, "i") as i, kernel.loop(inner, "n") as n:
        source = kernel.let((o * count + i) * inner + n)
        given = kernel.let(kernel.load(positions, source))
        place = kernel.let(tirx.Select(given < zero, given + end, given))
        with kernel.when(tirx.And(place >= zero, place < end)):
            kernel.store(y, (o * size + cast("int32", place)) * inner + n, kernel.load(values, source))
    return kernel.function()
