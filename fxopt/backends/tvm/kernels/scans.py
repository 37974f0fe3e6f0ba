"""Along the middle axis of [outer, size, inner], one value after the other: sums, places of the largest, integers."""

from __future__ import annotations

from typing import Any, Literal

from fxopt.backends.tvm.emit import Expr, Kernel, is_nan
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import tvm_type

Fold = Literal["sum", "prod", "amax", "amin"]


def cumulate(name: str, outer: int, size: int, inner: int, kind: str, machine: Machine) -> Any:
    """`void NAME(x, y)`, both [outer, size, inner]: running sums, in the order of the elements."""
    kernel = Kernel(name)
    x, y = (kernel.buffer(given, outer * size * inner, kind) for given in ("x", "y"))
    total = kernel.local(1, kind)
    with kernel.loop(outer, "o") as o, kernel.loop(inner, "n") as n:
        kernel.store(total, 0, _constant(0, kind))
        with kernel.loop(size, "i") as i:
            at = kernel.let((o * size + i) * inner + n)
            kernel.store(total, 0, kernel.load(total, 0) + kernel.load(x, at))
            kernel.store(y, at, kernel.load(total, 0))
    return kernel.function()


def place_of_largest(
    name: str, outer: int, size: int, inner: int, kind: str, machine: Machine, *, smallest: bool = False
) -> Any:
    """`void NAME(x [outer, size, inner], y int64 [outer, inner])`: the first of equal ones; NaN counts as the largest
    (and as the smallest)."""
    kernel = Kernel(name)
    x, y = kernel.buffer("x", outer * size * inner, kind), kernel.buffer("y", outer * inner, "int64")
    best, place = kernel.local(1, kind), kernel.local(1, "int64")
    with kernel.loop(outer, "o") as o, kernel.loop(inner, "n") as n:
        kernel.store(best, 0, kernel.load(x, o * size * inner + n))
        kernel.store(place, 0, tirx.IntImm("int64", 0))
        with kernel.loop(size, "i") as i:
            value = kernel.let(kernel.load(x, (o * size + i) * inner + n))
            known = kernel.let(kernel.load(best, 0))
            better = value < known if smallest else value > known
            if kind == "float32":
                better = tirx.Or(better, tirx.And(is_nan(value), tirx.EQ(known, known)))
            with kernel.when(better):
                kernel.store(best, 0, value)
                kernel.store(place, 0, tirx.Cast("int64", i))
        kernel.store(y, o * inner + n, kernel.load(place, 0))
    return kernel.function()


def in_order(
    name: str, outer: int, size: int, inner: int, count: int, kind: str, machine: Machine, *, largest: bool
) -> Any:
    """`void NAME(x [outer, size, inner], y [outer, count, inner], places int64 [outer, count, inner])`.

    The first `count` elements in descending order (of `largest`; else ascending), equal ones in theirs. NaN counts as
    the largest. Takes size * count steps: for short axes, or few elements.
    """
    kernel = Kernel(name)
    x = kernel.buffer("x", outer * size * inner, kind)
    y, places = kernel.buffer("y", outer * count * inner, kind), kernel.buffer("places", outer * count * inner, "int64")
    last, best = kernel.local(1, kind), kernel.local(1, kind)
    before, place = kernel.local(1, "int64"), kernel.local(1, "int64")

    def above(a: Expr, b: Expr) -> Expr:
        found = a > b if largest else a < b
        if kind != "float32":
            return found
        nan_a, nan_b = is_nan(a), is_nan(b)
        first, second = (nan_a, nan_b) if largest else (nan_b, nan_a)
        return tirx.Or(found, tirx.And(first, tirx.Not(second)))

    with kernel.loop(outer, "o") as o, kernel.loop(inner, "n") as n, kernel.loop(count, "j") as j:
        kernel.store(place, 0, tirx.IntImm("int64", -1))
        with kernel.loop(size, "i") as i:
            value = kernel.let(kernel.load(x, (o * size + i) * inner + n))
            index = kernel.let(tirx.Cast("int64", i))
            known, previous = kernel.let(kernel.load(best, 0)), kernel.let(kernel.load(last, 0))
            same = tirx.And(tirx.Not(above(value, previous)), tirx.Not(above(previous, value)))
            later = tirx.Or(above(previous, value), tirx.And(same, index > kernel.load(before, 0)))
            empty = tirx.EQ(kernel.load(place, 0), tirx.IntImm("int64", -1))
            with kernel.when(tirx.And(tirx.Or(tirx.EQ(j, 0), later), tirx.Or(empty, above(value, known)))):
                kernel.store(best, 0, value)
                kernel.store(place, 0, index)
        target = kernel.let((o * count + j) * inner + n)
        kernel.store(last, 0, kernel.load(best, 0))
        kernel.store(before, 0, kernel.load(place, 0))
        kernel.store(y, target, kernel.load(best, 0))
        kernel.store(places, target, kernel.load(place, 0))
    return kernel.function()


def fold(name: str, how: Fold, outer: int, size: int, inner: int, kind: str, machine: Machine) -> Any:
    """`void NAME(x [outer, size, inner], y [outer, inner])` for integers, and products of floats; `size` is not 0."""
    kernel = Kernel(name)
    x, y = (
        kernel.buffer(given, count, tvm_type(kind))
        for given, count in (("x", outer * size * inner), ("y", outer * inner))
    )
    total = kernel.local(1, tvm_type(kind))
    combine = {"sum": lambda a, b: a + b, "prod": lambda a, b: a * b, "amax": tirx.Max, "amin": tirx.Min}[how]
    with kernel.loop(outer, "o") as o, kernel.loop(inner, "n") as n:
        kernel.store(total, 0, kernel.load(x, o * size * inner + n))
        with kernel.loop(size - 1, "i") as i:
            value = kernel.load(x, (o * size + i + 1) * inner + n)
            kernel.store(total, 0, combine(kernel.load(total, 0), value))
        kernel.store(y, o * inner + n, kernel.load(total, 0))
    return kernel.function()


def _constant(value: int, kind: str) -> Expr:
    return tirx.FloatImm(kind, float(value)) if kind == "float32" else tirx.IntImm(kind, value)
