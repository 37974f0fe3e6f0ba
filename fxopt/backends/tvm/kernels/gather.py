"""Rows of a table by index (embedding)."""

from __future__ import annotations

import math
from typing import Any

from fxopt.backends.tvm.emit import Expr, Kernel, cast, each, float32, spread
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine


def gather(name: str, count: int, table: int, width: int, dtype: str, machine: Machine, kind: str = "float32") -> Any:
    """`void NAME(table [table, width], indices [count], y [count, width])`; `dtype` is that of the indices.

    A C function raises nothing: an index outside the table gives a row of NaN (of zeros where `kind` is no float).
    """
    kernel = Kernel(name)
    rows = kernel.buffer("table", table * width, kind)
    indices = kernel.buffer("indices", count, dtype)
    y = kernel.buffer("y", count * width, kind)
    outside = float32(math.nan) if kind == "float32" else tirx.IntImm(kind, 0)
    with kernel.loop(count, "i") as i:
        index = kernel.let(kernel.load(indices, i))
        inside = kernel.let(tirx.And(index >= tirx.IntImm(dtype, 0), index < tirx.IntImm(dtype, table)))

        def copy(at: Expr, n: int, i: Expr = i, index: Expr = index) -> None:
            kernel.store(y, i * width + at, kernel.load(rows, cast("int32", index) * width + at, n), n)

        def fill(at: Expr, n: int, i: Expr = i) -> None:
            kernel.store(y, i * width + at, spread(outside, n), n)

        with kernel.when(inside):
            each(kernel, width, machine.lanes, copy)
        with kernel.when(tirx.Not(inside)):
            each(kernel, width, machine.lanes, fill)
    return kernel.function()
