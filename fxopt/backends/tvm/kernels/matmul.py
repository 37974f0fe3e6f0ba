"""y[b] = x[b] @ w[b] of two activations in float32; w [inner, outputs] is read as it lies."""

from __future__ import annotations

from typing import Any

from fxopt.backends.tvm.emit import Expr, Kernel, float32, int32, spread, tail
from fxopt.backends.tvm.machine import Machine


def matmul(
    name: str, batch: int, rows: int, inner: int, outputs: int, x_step: int, w_step: int, machine: Machine
) -> Any:
    """`void NAME(x [rows, inner], w [inner, outputs], y [rows, outputs])`, for each of `batch`.

    Args:
        x_step, w_step: distance of two matrices of the batch; 0: all use one.
    """
    kernel = Kernel(name)
    x = kernel.buffer("x", x_step * (batch - 1) + rows * inner)
    w = kernel.buffer("w", w_step * (batch - 1) + inner * outputs)
    y = kernel.buffer("y", batch * rows * outputs)

    def tile(b: Expr, row: Expr, count: int, column: Expr, columns: int) -> None:
        pieces = tail(columns, machine.lanes)
        sums = kernel.local(count * columns)
        for r in range(count):
            for at, n in pieces:
                kernel.store(sums, r * columns + at, float32(0.0, n), n)
        with kernel.loop(inner, "p") as p:
            values = [kernel.let(kernel.load(w, b * w_step + p * outputs + column + at, n)) for at, n in pieces]
            for r in range(count):
                scalar = kernel.let(kernel.load(x, b * x_step + (row + r) * inner + p))
                for (at, n), value in zip(pieces, values, strict=True):
                    place = r * columns + at
                    kernel.store(sums, place, kernel.load(sums, place, n) + spread(scalar, n) * value, n)
        for r in range(count):
            for at, n in pieces:
                place = (b * rows + row + r) * outputs + column + at
                kernel.store(y, place, kernel.load(sums, r * columns + at, n), n)

    def panel(b: Expr, column: Expr, columns: int) -> None:
        full, rest = divmod(rows, machine.rows)
        with kernel.loop(full, "tile") as index:
            tile(b, index * machine.rows, machine.rows, column, columns)
        if rest:
            tile(b, int32(full * machine.rows), rest, column, columns)

    with kernel.loop(batch, "b") as b:
        full, rest = divmod(outputs, machine.columns)
        with kernel.loop(full, "panel") as index:
            panel(b, index * machine.columns, machine.columns)
        if rest:
            panel(b, int32(full * machine.columns), rest)
    return kernel.function()
