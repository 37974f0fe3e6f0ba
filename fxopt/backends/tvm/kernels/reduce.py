"""Sum, mean, maximum, minimum over the middle axis of [outer, size, inner] in float32."""

from __future__ import annotations

import math
from typing import Any, Literal

from fxopt.backends.tvm.emit import Expr, Kernel, each, float32
from fxopt.backends.tvm.kernels.rows import add, largest, reduce_row, smallest
from fxopt.backends.tvm.machine import Machine

How = Literal["sum", "mean", "amax", "amin"]
_COMBINE = {"sum": (add, 0.0), "mean": (add, 0.0), "amax": (largest, -math.inf), "amin": (smallest, math.inf)}


def reduce(name: str, how: How, outer: int, size: int, inner: int, machine: Machine) -> Any:
    """`void NAME(x [outer, size, inner], y [outer, inner])`."""
    kernel = Kernel(name)
    x, y = kernel.buffer("x", outer * size * inner), kernel.buffer("y", outer * inner)
    combine, start = _COMBINE[how]

    def scaled(value: Expr, lanes: int) -> Expr:
        return value * float32(1 / size, lanes) if how == "mean" else value

    def whole(o: Expr) -> None:
        value = reduce_row(
            kernel, machine, size, start, combine, lambda at, n: kernel.let(kernel.load(x, o * size + at, n))
        )
        kernel.store(y, o, scaled(value, 1))

    def columns(o: Expr, at: Expr, lanes: int) -> None:
        total = kernel.local(lanes)
        kernel.store(total, 0, float32(start, lanes), lanes)
        with kernel.loop(size, "i") as i:
            value = kernel.let(kernel.load(x, (o * size + i) * inner + at, lanes))
            kernel.store(total, 0, combine(kernel.load(total, 0, lanes), value), lanes)
        kernel.store(y, o * inner + at, scaled(kernel.load(total, 0, lanes), lanes), lanes)

    with kernel.loop(outer, "o") as o:
        if inner == 1:
            whole(o)
        else:
            each(kernel, inner, machine.lanes, lambda at, n: columns(o, at, n))
    return kernel.function()
