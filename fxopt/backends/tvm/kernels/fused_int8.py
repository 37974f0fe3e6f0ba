"""A product of 8-bit codes with what follows it in one function: bias, activation, residual, layer norm, rounding.

    y = act((q - zero) @ C.T * scales + bias)     or    y = ... + residual     or    y = layer_norm of that sum
    codes = clamp(round(y * inverse) + zero, 0, 255)

q and the codes are unsigned bytes, C signed ones in -127 ... 127; the 32-bit sums are exact on every machine:
`vpdpbusd` where there is one, else bytes are widened to 16 bits and pairs are multiplied by `vpmaddwd`. `inverse` is
per output, so that a per-channel scaling of what comes next (SmoothQuant: Xiao et al., 2022) costs nothing.

The number of rows is known at run time only, the sizes of C when the code is made: its strides are then constants.
Rows are worked off in blocks that the second-level cache holds, in them panels of outputs, in them register tiles.
The last tile of rows is moved up to end where the rows end; what it computes twice, it computes alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.emit import (
    Expr,
    Kernel,
    cast,
    float32,
    int32,
    intrinsic,
    reinterpret,
    spread,
    tail,
    typed,
)
from fxopt.backends.tvm.kernels import approximations
from fxopt.backends.tvm.kernels.rows_u8 import ANY_ROWS, norm_row, round_to_bytes
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.errors import Unsupported

Epilogue = Literal["none", "relu", "gelu", "gelu_tanh", "residual", "layer_norm"]
Codes = npt.NDArray[np.int8]

# Of the C function, all pointers; those that a form has no use for are not read or written.
PARAMETERS = (
    "rows", "q", "w", "starts", "scales", "bias", "residual", "gamma", "beta", "y", "codes", "inverse", "zero",
)  # fmt: skip

_BLOCK_BYTES = 192 * 1024  # codes of the rows of a block


@dataclass(frozen=True)
class Form:
    """A fused product.

    Attributes:
        inner, outputs: the sizes of the weight; inner is a multiple of 4.
        epilogue: what is done to the sums after scales and bias.
        floats: y is written (always with "layer_norm", whose rows need the place).
        codes: the bytes are written.
    """

    inner: int
    outputs: int
    epilogue: Epilogue = "none"
    floats: bool = True
    codes: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.inner % 4 or self.inner <= 0 or self.outputs <= 0:
            raise Unsupported(f"a fused product takes a multiple of 4 inputs; given {self.inner} -> {self.outputs}")
        self.check_results()

    def check_results(self) -> None:
        """Raise `Unsupported` where nothing is written, or a layer norm has no place for its rows."""
        if not (self.floats or self.codes):
            raise Unsupported("a fused product without results")
        if self.epilogue == "layer_norm" and not self.floats:
            raise Unsupported("a fused layer norm always writes its float result: rows are collected there")


@dataclass(frozen=True)
class Tile:
    """The register tile: `rows` rows of q, `columns` outputs, `group` codes summed into a lane at a time."""

    rows: int
    columns: int
    lanes: int
    group: int


def tile_for(outputs: int, machine: Machine) -> Tile:
    """24 accumulators of 32 registers, 12 of 16; the width that divides the outputs, if one does.

    Raises:
        Unsupported: the machine has no AVX2.
    """
    if machine.family != "x86":
        raise Unsupported(f"fused 8-bit products are made for x86-64; not for {machine.family}")
    group = 4 if machine.dot == "vpdpbusd" else 2
    if machine.lanes == 8:
        return Tile(6, 16, 8, group)
    rows, columns = next(((r, c) for r, c in ((8, 48), (6, 64), (12, 32)) if outputs % c == 0), (8, 48))
    return Tile(rows, columns, 16, group)


def pack(codes: Codes, tile: Tile) -> npt.NDArray[Any]:
    """[outputs, inner] -> [panels, inner / group, columns, group], zero padded; int16 where the group is 2."""
    outputs, inner = codes.shape
    whole = np.zeros((-(-outputs // tile.columns) * tile.columns, inner), np.int8 if tile.group == 4 else np.int16)
    whole[:outputs] = codes
    panels = whole.reshape(-1, tile.columns, inner // tile.group, tile.group)
    return np.ascontiguousarray(panels.transpose(0, 2, 1, 3))


def starts_of(codes: Codes, zero: int, tile: Tile) -> npt.NDArray[np.int32]:
    """-zero * sum(c) per output, padded to whole panels: what the sums start from."""
    outputs = codes.shape[0]
    found = np.zeros(-(-outputs // tile.columns) * tile.columns, np.int32)
    found[:outputs] = -zero * codes.astype(np.int32).sum(1)
    return found


def spread_codes(kernel: Kernel, tile: Tile, q: Any, offset: Expr) -> Expr:
    """One group of bytes of q in the 32 bits of every lane."""
    some = kernel.load(q, offset, tile.group)
    if tile.group == 4:
        word = spread(reinterpret("int32", some), tile.lanes)
        return kernel.let(reinterpret(typed("uint8", 4 * tile.lanes), word))
    pair = reinterpret("int32", cast("int16x2", some))
    return kernel.let(reinterpret(typed("int16", 2 * tile.lanes), spread(pair, tile.lanes)))


def dot(tile: Tile, sums: Expr, x: Expr, w: Expr) -> Expr:
    """sums + the products of each lane's group, of unsigned x and signed w."""
    n = tile.lanes
    if tile.group == 4:
        return intrinsic(typed("int32", n), f"llvm.x86.avx512.vpdpbusd.{32 * n}", sums, x, w)
    name = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}[n]
    return sums + intrinsic(typed("int32", n), name, x, w)


def fused_int8(name: str, form: Form, machine: Machine) -> Any:
    """`void NAME(...)` with the pointers `PARAMETERS`.

    rows: int32 [1]; q: uint8 [rows, inner]; w, starts: of `pack` and `starts_of`; scales (weight scale * scale of q),
    bias, gamma, beta, inverse: float32 [outputs]; residual, y: float32 [rows, outputs]; codes: uint8 [rows, outputs];
    zero: float32 [1]. No result may overlap an operand.
    """
    tile = tile_for(form.outputs, machine)
    return _Writer(Kernel(name), form, tile).function()


class _Writer:
    def __init__(self, kernel: Kernel, form: Form, tile: Tile) -> None:
        self.kernel, self.form, self.tile = kernel, form, tile
        self.groups = form.inner // tile.group
        self.line = 64 if tile.group == 4 else 32  # weights in a cache line
        panels = -(-form.outputs // tile.columns)
        sizes = {
            "rows": (1, "int32"),
            "q": (ANY_ROWS * form.inner, "uint8"),
            "w": (panels * form.inner * tile.columns, "int8" if tile.group == 4 else "int16"),
            "starts": (panels * tile.columns, "int32"),
            "residual": (ANY_ROWS * form.outputs, "float32"),
            "y": (ANY_ROWS * form.outputs, "float32"),
            "codes": (ANY_ROWS * form.outputs, "uint8"),
            "zero": (1, "float32"),
        }
        self.at = {key: kernel.buffer(key, *sizes.get(key, (form.outputs, "float32"))) for key in PARAMETERS}

    def function(self) -> Any:
        kernel, tile = self.kernel, self.tile
        rows = kernel.let(kernel.load(self.at["rows"], 0))
        high = max(1, _BLOCK_BYTES // self.form.inner // tile.rows) * tile.rows
        with (
            kernel.when(rows >= int32(tile.rows)),
            kernel.loop(tirx.floordiv(rows + (high - 1), int32(high)), "block") as block,
        ):
            first = kernel.let(block * high)
            end = kernel.let(tirx.Min(first + high, rows))
            tiles = kernel.let(tirx.floordiv(end - first + (tile.rows - 1), int32(tile.rows)))

            def tiled(panel: Expr, columns: int) -> None:
                with kernel.loop(tiles, "tile") as index:
                    row = kernel.let(tirx.Min(first + index * tile.rows, rows - tile.rows))
                    self.one(panel, index, row, tile.rows, columns)

            self.panels(tiled)
            if self.form.epilogue == "layer_norm":
                start = kernel.let(tirx.Min(first, rows - tile.rows))
                self.norms(start, end - start)
        with kernel.when(rows < int32(tile.rows)):

            def single(panel: Expr, columns: int) -> None:
                with kernel.loop(rows, "row") as row:
                    self.one(panel, row, row, 1, columns)

            self.panels(single)
            if self.form.epilogue == "layer_norm":
                self.norms(int32(0), rows)
        return kernel.function()

    def panels(self, body: Callable[[Expr, int], None]) -> None:
        """Full panels, then the last one, of which some columns do not exist."""
        full, rest = divmod(self.form.outputs, self.tile.columns)
        with self.kernel.loop(full, "panel") as panel:
            body(panel, self.tile.columns)
        if rest:
            body(int32(full), rest)

    def one(self, panel: Expr, index: Expr, row: Expr, count: int, columns: int) -> None:
        """Register tile `index` of a panel: `count` rows from `row` on times the panel's first `columns` outputs.

        Meanwhile the panels that come next are fetched, a line per group.
        """
        kernel, form, tile = self.kernel, self.form, self.tile
        width, lanes, group = tile.columns, tile.lanes, tile.group
        vectors = range(0, width, lanes)
        sums = kernel.local(count * width, "int32")
        for r in range(count):
            for v in vectors:
                kernel.store(sums, r * width + v, kernel.load(self.at["starts"], panel * width + v, lanes), lanes)
        ahead = kernel.let((panel + 1) * (form.inner * width) + index * (self.groups * self.line))
        with kernel.loop(self.groups, "g") as g:
            place = (panel * self.groups + g) * (width * group)
            weights = [kernel.let(kernel.load(self.at["w"], place + v * group, lanes * group)) for v in vectors]
            if count > 1:
                kernel.prefetch(self.at["w"], ahead + g * self.line)
            for r in range(count):
                at = (row * form.inner + g * group) + r * form.inner
                value = spread_codes(kernel, tile, self.at["q"], at)
                for v, weight in zip(vectors, weights, strict=True):
                    old = kernel.load(sums, r * width + v, lanes)
                    kernel.store(sums, r * width + v, dot(tile, old, value, weight), lanes)
        for v, n in tail(columns, lanes):
            at = kernel.let(panel * width + v)
            scale, bias = (kernel.let(kernel.load(self.at[key], at, n)) for key in ("scales", "bias"))
            for r in range(count):
                value = cast(typed("float32", n), kernel.load(sums, r * width + v, n)) * scale + bias
                finish(kernel, form, self.at, kernel.let(value), (row + r) * form.outputs + at, at, n)

    def norms(self, first: Expr, count: Expr) -> None:
        """Layer norm of rows of y, in place."""
        with self.kernel.loop(count, "norm") as index:
            normed(self.kernel, self.tile.lanes, self.form, self.at, (first + index) * self.form.outputs)


def activated(kernel: Kernel, form: Form, value: Expr, n: int) -> Expr:
    """The form's activation of `n` values; short ones where only bytes are made of them."""
    if form.epilogue == "relu":
        return kernel.let(tirx.Max(float32(0.0, n), value))
    if form.epilogue in ("gelu", "gelu_tanh"):
        function = getattr(approximations, form.epilogue if form.floats else f"{form.epilogue}_short")
        return function(kernel, value, n)
    return value


def finish(kernel: Kernel, form: Form, at: dict[str, Any], value: Expr, place: Expr, column: Expr, n: int) -> None:
    """Everything after the bias for `n` outputs of a row: `column` is the first one, `place` its index in y."""
    if form.epilogue in ("residual", "layer_norm"):
        value = kernel.let(value + kernel.load(at["residual"], place, n))
    if form.epilogue == "layer_norm":
        kernel.store(at["y"], place, value, n)
        return
    value = activated(kernel, form, value, n)
    if form.floats:
        kernel.store(at["y"], place, value, n)
    if form.codes:
        round_to_bytes(kernel, at, value, place, column, n)


def normed(kernel: Kernel, lanes: int, form: Form, at: dict[str, Any], row: Expr) -> None:
    """Layer norm of a row of y, in place."""
    y, start = at["y"], kernel.let(row)

    def write(column: Expr, n: int, value: Expr) -> None:
        kernel.store(y, start + column, value, n)
        if form.codes:
            round_to_bytes(kernel, at, value, start + column, column, n)

    norm_row(kernel, lanes, form.outputs, form.eps, at, y, start, write)


__all__ = [
    "PARAMETERS", "Codes", "Epilogue", "Form", "Tile", "activated", "dot", "finish", "fused_int8", "normed", "pack",
    "spread_codes", "starts_of", "tile_for",
]  # fmt: skip
