"""Rows of bytes to a panel and back: a panel is feature-major, 64 bytes (one of each of 64 rows) per feature.

Sixteen features of 64 rows are turned at a time, in registers. The sizes are known at run time only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxopt.backends.tvm.emit import Expr, Kernel, int32, shuffle
from fxopt.backends.tvm.kernels.lanes import LANE, transposed_bytes
from fxopt.backends.tvm.kernels.rows_u8 import ANY_ROWS
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine

PANEL = 64  # rows
TURN_PARAMETERS = ("sizes", "rows", "panel")  # sizes: int32 [number of rows (1 ... 64), features]


def rows_to_panel(name: str, machine: Machine) -> Any:
    """`void NAME(...)` with the pointers `TURN_PARAMETERS`: panel[f, r] = rows[r, f].

    Rows that do not exist repeat the last one.
    """
    kernel, rows, panel, count, size = _start(name)
    half = 4 * machine.lanes  # bytes of a vector, and as many rows

    def unit(feature: Expr) -> None:
        for first in range(0, PANEL, half):
            vectors = []
            for i in range(LANE):
                parts = []
                for lane in range(0, half, LANE):
                    row = tirx.Min(int32(first + lane + i), count - 1)
                    parts.append(kernel.let(kernel.load(rows, row * size + feature, LANE)))
                vectors.append(kernel.let(shuffle(parts, range(half))))
            for i, vector in enumerate(transposed_bytes(kernel, vectors, half)):
                kernel.store(panel, (feature + i) * PANEL + first, vector, half)

    _units(kernel, size, unit)
    with kernel.when(size < LANE), kernel.loop(size, "f") as f, kernel.loop(PANEL, "r") as r:
        kernel.store(panel, f * PANEL + r, kernel.load(rows, tirx.Min(r, count - 1) * size + f))
    return kernel.function()


def panel_to_rows(name: str, machine: Machine) -> Any:
    """`void NAME(...)` with the pointers `TURN_PARAMETERS`: rows[r, f] = panel[f, r]."""
    kernel, rows, panel, count, size = _start(name)
    half = 4 * machine.lanes

    def unit(feature: Expr) -> None:
        for first in range(PANEL - half, -1, -half):
            vectors = [kernel.let(kernel.load(panel, (feature + i) * PANEL + first, half)) for i in range(LANE)]
            turned = transposed_bytes(kernel, vectors, half)
            for lane in range(half // LANE - 1, -1, -1):  # backwards: rows that do not exist are overwritten
                for i in range(LANE - 1, -1, -1):
                    row = tirx.Min(int32(first + lane * LANE + i), count - 1)
                    part = shuffle([turned[i]], range(lane * LANE, (lane + 1) * LANE))
                    kernel.store(rows, row * size + feature, part, LANE)

    _units(kernel, size, unit)
    with kernel.when(size < LANE), kernel.loop(size, "f") as f, kernel.loop(count, "r") as r:
        kernel.store(rows, r * size + f, kernel.load(panel, f * PANEL + r))
    return kernel.function()


def _start(name: str) -> tuple[Kernel, Any, Any, Expr, Expr]:
    kernel = Kernel(name)
    sizes = kernel.buffer("sizes", 2, "int32")
    rows, panel = (kernel.buffer(each, ANY_ROWS * PANEL, "uint8") for each in TURN_PARAMETERS[1:])
    return kernel, rows, panel, kernel.let(kernel.load(sizes, 0)), kernel.let(kernel.load(sizes, 1))


def _units(kernel: Kernel, size: Expr, unit: Callable[[Expr], None]) -> None:
    """Sixteen features each; the last ones end where the features end, even if some are turned twice."""
    with kernel.when(size >= LANE), kernel.loop(tirx.floordiv(size + (LANE - 1), int32(LANE)), "unit") as index:
        unit(kernel.let(tirx.Min(index * LANE, size - LANE)))


__all__ = ["PANEL", "TURN_PARAMETERS", "panel_to_rows", "rows_to_panel"]
