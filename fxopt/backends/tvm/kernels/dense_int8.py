"""y = act((q - zero) @ C.T * scales + b): 8-bit codes of x and W, 32-bit sums, float32 results or codes.

Rows are worked off in blocks that the second-level cache holds, in them panels of outputs, in them register tiles.
`fxopt.backends.tvm.kernels.dot` has the instructions, and how codes are stored for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxopt.backends.tvm.emit import Expr, Kernel, cast, each, int32, reinterpret, spread, tail, typed
from fxopt.backends.tvm.kernels.dot import Dot, in_groups, load_weights, multiply, spread_group
from fxopt.backends.tvm.kernels.results_int8 import Product, Results
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import tvm_type

_LEAST_ROWS = 8  # from which a panel is widened ahead
_BLOCK_BYTES = 192 * 1024  # codes of rows that stay in the second-level cache while all panels go past them


def block_rows(inner: int) -> int:
    """Rows that are worked off together, at most."""
    return max(8, _BLOCK_BYTES // max(2 * inner, 1) // 8 * 8)


def work_space(size: Product, dot: Dot, machine: Machine) -> tuple[str, int]:
    """Type and number of values: sums of rows for raised weights, or a panel of weights in 16 bits; none: ("", 0).

    WebAssembly engines keep an inner loop of 16-bit loads in registers, and one that widens bytes not always.
    """
    if dot.raised:
        return "int32", min(size.rows, block_rows(size.inner))
    if machine.family == "wasm" and size.rows >= _LEAST_ROWS:
        return "int16", in_groups(size.inner, dot) * machine.columns
    return "", 0


def dense_int8(name: str, size: Product, dot: Dot, machine: Machine) -> Any:
    """`void NAME(q, w, starts, scales, bias, [range], [factors], [work space], y)`.

    q: [rows, inner in whole groups] as `dot.x` says; w as `pack_codes` gives; the others: see `Results`.
    """
    return _Writer(name, size, dot, machine).function()


class _Writer:
    def __init__(self, name: str, size: Product, dot: Dot, machine: Machine) -> None:
        self.kernel, self.size, self.dot, self.machine = Kernel(name), size, dot, machine
        self.groups, self.width = in_groups(size.inner, dot) // dot.group, machine.columns
        kernel, panels = self.kernel, -(-size.outputs // self.width)
        self.q = kernel.buffer("q", size.rows * self.groups * dot.group, tvm_type(dot.x.dtype))
        self.w = kernel.buffer("w", panels * self.groups * self.width * dot.group, dot.weights)
        self.results = Results(kernel, size, dot, machine, self.width)
        kind, count = work_space(size, dot, machine)
        self.row_sums = kernel.buffer("row_sums", count, kind) if kind == "int32" else None
        self.wide = kernel.buffer("wide", count, kind) if kind == "int16" else None
        self.results.declare_y()

    def function(self) -> Any:
        kernel, size = self.kernel, self.size
        full, rest = divmod(size.rows, block_rows(size.inner))
        with kernel.loop(full, "block") as index:
            self.block(index * block_rows(size.inner), block_rows(size.inner))
        if rest:
            self.block(int32(full * block_rows(size.inner)), rest)
        return kernel.function()

    def block(self, start: Expr, rows: int) -> None:
        """All panels past some rows."""
        kernel, size = self.kernel, self.size
        if self.row_sums is not None:
            self.add_up_rows(start, rows)
        full, rest = divmod(size.outputs, self.width)

        def panel(number: Expr, columns: int) -> None:
            height = self.machine.dot_rows if self.wide is not None or self.dot.group == 4 else 3
            if self.wide is not None:
                self.widen(number)
            tiles, left = divmod(rows, height)
            with kernel.loop(tiles, "tile") as index:
                self.tile(number, start, index * height, height, columns)
            if left:
                self.tile(number, start, int32(tiles * height), left, columns)

        with kernel.loop(full, "panel") as number:
            panel(number, self.width)
        if rest:
            panel(int32(full), rest)

    def widen(self, panel: Expr) -> None:
        """A panel's codes in 16 bits."""
        kernel, count = self.kernel, self.groups * self.dot.group * self.width

        def write(at: Expr, n: int) -> None:
            value = cast(typed("int16", n), kernel.load(self.w, panel * count + at, n))
            kernel.store(self.wide, at, value, n)

        each(kernel, count, 8, write)

    def add_up_rows(self, start: Expr, rows: int) -> None:
        """-raised * the sum of the stored codes of each row."""
        kernel, inner = self.kernel, self.groups * self.dot.group
        with kernel.loop(rows, "row") as row:
            total = kernel.local(4, "int32")
            kernel.store(total, 0, spread(int32(0), 4), 4)
            place = kernel.let((start + row) * inner)
            with kernel.loop(inner // 16, "v") as v:
                ones = spread(tirx.IntImm("uint8", 1), 16)
                codes = kernel.load(self.q, place + v * 16, 16)
                kernel.store(total, 0, multiply(self.dot, kernel.load(total, 0, 4), codes, ones, 4), 4)
            parts = [kernel.load(total, lane) for lane in range(4)]
            parts += [cast("int32", kernel.load(self.q, place + i)) for i in range(inner // 16 * 16, inner)]
            value: Expr = int32(0)
            for part in parts:
                value = value + part
            kernel.store(self.row_sums, row, value * int32(-self.dot.raised))

    def tile(self, panel: Expr, start: Expr, row: Expr, count: int, columns: int) -> None:
        """`count` rows times a panel, of whose outputs `columns` exist."""
        kernel, dot, width, lanes = self.kernel, self.dot, self.width, self.machine.lanes
        sums = kernel.local(count * width, "int32")
        vectors = range(0, width, lanes)
        for r in range(count):
            for v in vectors:
                kernel.store(sums, r * width + v, self.first(panel * width + v, row + r), lanes)

        def step(g: Expr, group_of: Callable[[int], Expr]) -> None:
            if self.wide is not None:
                place = g * (width * dot.group)
                weights = [kernel.let(kernel.load(self.wide, place + 2 * v, 2 * lanes)) for v in vectors]
            else:
                place = (panel * self.groups + g) * (width * dot.group)
                weights = [load_weights(kernel, dot, self.w, place + v * dot.group, lanes) for v in vectors]
            for r in range(count):
                value = group_of(r)
                for v, weight in zip(vectors, weights, strict=True):
                    old = kernel.load(sums, r * width + v, lanes)
                    kernel.store(sums, r * width + v, multiply(dot, old, value, weight, lanes), lanes)

        def of_row(r: int, g: Expr) -> Expr:
            return spread_group(kernel, dot, self.q, ((start + row + r) * self.groups + g) * dot.group, lanes)

        fours = self.groups // 4 if dot.instruction == "sdot" else 0  # it takes a lane of x as it is
        if fours:
            with kernel.loop(fours, "g") as four:
                at = [((start + row + r) * self.groups + four * 4) * dot.group for r in range(count)]
                loaded = [kernel.let(reinterpret("int32x4", kernel.load(self.q, place, 16))) for place in at]
                for j in range(4):
                    step(four * 4 + j, lambda r, j=j: tirx.Shuffle([loaded[r]], [int32(j)] * 4))  # type: ignore[misc]
        with kernel.loop(self.groups - 4 * fours, "g") as g:
            step(g + 4 * fours, lambda r: of_row(r, g + 4 * fours))
        for r in range(count):
            for v, n in tail(columns, lanes):
                total = cast(typed("float32", n), kernel.load(sums, r * width + v, n))
                self.results.finish(kernel.let(total), panel * width + v, start + row + r, n)

    def first(self, column: Expr, row: Expr) -> Expr:
        """What the sums of a row start from."""
        value = self.results.first(column)
        if self.row_sums is not None:
            value = value + spread(self.kernel.load(self.row_sums, row), self.machine.lanes)
        return value


__all__ = ["Product", "dense_int8", "work_space"]
