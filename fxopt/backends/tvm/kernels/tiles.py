"""The register tile that dense and sparse products share: rows of x times packed columns of W.

y[m, n] = act(b[n] + sum_p x[m, column(p)] * w[p, n]): the sum runs over what the weight keeps. Weights are packed in
panels of as many outputs as the tile has columns, [panel, p, columns], zero padded, so that loads are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fxopt.backends.tvm.emit import Expr, Kernel, cast, int32, spread, tail
from fxopt.backends.tvm.kernels.activations import Activation, apply
from fxopt.backends.tvm.machine import Machine

# walk(panel) -> (number of steps, step), step(p) -> of each input of a step: column of x, offset of its weights
Step = Callable[[Expr], Sequence[tuple[Expr, Expr]]]
Walk = Callable[[Expr], tuple[Expr, Step]]

_BLOCK_BYTES = 192 * 1024  # rows of x that stay in the second-level cache while all panels go past them


@dataclass(frozen=True)
class RowMajor:
    """x [rows, inner] times panels of `width` outputs gives y [rows, outputs]."""

    rows: int
    inner: int
    outputs: int
    width: int
    activation: Activation = ""

    @property
    def panels(self) -> int:
        """Number of panels; the last one may be padded."""
        return -(-self.outputs // self.width)


def emit_rows(
    kernel: Kernel, size: RowMajor, machine: Machine, buffers: Sequence[Any], walks: Sequence[Walk],
    prepare: Callable[[Expr], None] | None = None,
) -> None:  # fmt: skip
    """Blocks of rows, in them the walks (parts of the sum), in them panels, in them tiles of `machine.rows` rows.

    Args:
        buffers: x, weights, bias, y.
        walks: each adds its part of the inputs to y; the first starts from the bias, the last applies the activation.
        prepare: what is done before the rows of a block go past a panel.
    """
    inner = -(-size.inner // len(walks))
    tile_rows = machine.tile_rows(size.width)
    block = max(1, _BLOCK_BYTES // (4 * max(inner, 1)) // tile_rows) * tile_rows
    full, rest = divmod(size.outputs, size.width)

    def rows(start: Expr, count: int) -> None:
        for index, walk in enumerate(walks):
            piece = _Tile(kernel, size, machine, tuple(buffers), index == 0, index == len(walks) - 1)

            def panel(number: Expr, columns: int, piece: _Tile = piece, walk: Walk = walk) -> None:
                if prepare is not None:
                    prepare(number)
                piece.panel(walk, number, columns, start, count)

            with kernel.loop(full, "panel") as number:
                panel(number, size.width)
            if rest:
                panel(int32(full), rest)

    with kernel.loop(size.rows // block, "block") as index:
        rows(index * block, block)
    if size.rows % block:
        rows(int32(size.rows - size.rows % block), size.rows % block)


def wide(machine: Machine, offset: Expr) -> Expr:
    """An offset in the width of an address: a base and an index that LLVM can tell apart."""
    return cast("int64", int32(offset)) if machine.pointer_bits == 64 else offset


@dataclass(frozen=True)
class _Tile:
    kernel: Kernel
    size: RowMajor
    machine: Machine
    buffers: tuple[Any, ...]
    first: bool
    last: bool

    def panel(self, walk: Walk, panel: Expr, columns: int, start: Expr, count: int) -> None:
        """All rows of a block times one panel, of whose outputs `columns` exist."""
        extent, step = walk(panel)
        rows = self.machine.tile_rows(self.size.width)
        full, rest = divmod(count, rows)
        with self.kernel.loop(full, "tile") as index:
            self.tile(extent, step, panel, columns, start + index * rows, rows)
        if rest:
            self.tile(extent, step, panel, columns, start + full * rows, rest)

    def tile(self, extent: Expr, step: Step, panel: Expr, columns: int, row: Expr, rows: int) -> None:
        """The accumulators of `rows` rows: initial values, the sum, the results."""
        kernel, size = self.kernel, self.size
        x, w, bias, y = self.buffers
        width = size.width
        lanes = min(width, self.machine.lanes)
        vectors = range(0, width, lanes)
        sums = kernel.local(rows * width)
        for r in range(rows):
            if self.first:
                for v in vectors:
                    kernel.store(sums, r * width + v, kernel.load(bias, panel * width + v, lanes), lanes)
                continue
            for v, some in tail(columns, lanes):
                at = (row + r) * size.outputs + panel * width + v
                kernel.store(sums, r * width + v, kernel.load(y, at, some), some)
        with kernel.loop(extent, "p") as p:
            for column, offset in step(p):
                weights = [kernel.let(kernel.load(w, offset + v, lanes)) for v in vectors]
                for r in range(rows):
                    place = wide(self.machine, (row + r) * size.inner) + wide(self.machine, column)
                    value = kernel.let(spread(kernel.load(x, place), lanes))
                    for v, weight in zip(vectors, weights, strict=True):
                        at = r * width + v
                        kernel.store(sums, at, kernel.load(sums, at, lanes) + value * weight, lanes)
        for r in range(rows):
            for v, some in tail(columns, lanes):
                value = kernel.let(kernel.load(sums, r * width + v, some))
                value = apply(kernel, size.activation, value, some) if self.last else value
                kernel.store(y, (row + r) * size.outputs + panel * width + v, value, some)


__all__ = ["RowMajor", "Step", "Walk", "emit_rows"]
