"""The product of `fused_int8` with a block-sparse C: blocks of 4 outputs x 1 input, of which only some are not zero.

    y = act((q - zero) @ C.T * scales + bias)     and all other results of `fused_int8`, from the same 32-bit sums

q is a panel: feature-major, 64 rows of q side by side. Of a row of blocks, four inputs at a time are taken: their
bytes of 64 rows are interleaved to four bytes per row and multiplied by four weights of each output (Shen et al.,
2023). So the time falls with the share of blocks that are kept. Which ones are is data: one list of places and
weights, read from front to back.

Where only bytes leave, they leave as a panel, too. Floats leave in rows: four outputs of 64 rows are turned in
registers, and then everything is as in `fused_int8`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    shuffle,
    spread,
    tail,
    typed,
)
from fxopt.backends.tvm.kernels.fused_int8 import Codes, Form, Tile, activated, dot, finish, normed
from fxopt.backends.tvm.kernels.lanes import as_elements, exchanged_lanes, interleaved, transposed_words
from fxopt.backends.tvm.kernels.rows_u8 import ANY_ROWS
from fxopt.backends.tvm.kernels.turn_u8 import PANEL
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.errors import Unsupported

BLOCK = 4  # outputs
# Of the C function, all pointers; those that a form has no use for are not read or written.
SPARSE_PARAMETERS = (
    "rows", "panel", "stream", "firsts", "starts", "scales", "bias", "residual", "gamma", "beta", "y", "codes",
    "inverse", "zero",
)  # fmt: skip

_MAGIC = 12582912.0  # 1.5 * 2**23: a float of this size holds an integer in its low bits, rounded half to even
_MAGIC_BITS = 0x4B400000


@dataclass(frozen=True)
class SparseForm(Form):
    """A fused product whose weight is block-sparse; any number of inputs."""

    def __post_init__(self) -> None:
        self.check_results()
        if self.inner <= 0 or self.outputs <= 0:
            raise Unsupported(f"a sparse product of {self.inner} -> {self.outputs}")

    @property
    def in_rows(self) -> bool:
        """Whether bytes leave in rows, as floats do and as a residual comes; else as a panel."""
        return self.floats or self.epilogue in ("residual", "layer_norm")


@dataclass(frozen=True)
class Packed:
    """A weight as the kernel reads it.

    Attributes:
        stream: int32, per group of inputs: their places in a panel, then for each of the four outputs its weights of
            the group in 32 bits (four int8 or two int16).
        firsts: int32 [rows of blocks + 1], the first group of each row of blocks.
        density: share of the blocks that are kept.
    """

    stream: npt.NDArray[np.int32]
    firsts: npt.NDArray[np.int32]
    density: float


def group_of(machine: Machine) -> int:
    """Inputs whose products are summed at a time.

    Raises:
        Unsupported: the machine has no AVX2.
    """
    if machine.family != "x86":
        raise Unsupported(f"sparse 8-bit products are made for x86-64; not for {machine.family}")
    return 4 if machine.dot == "vpdpbusd" else 2


def kept_blocks(codes: Codes) -> npt.NDArray[np.bool_]:
    """[rows of blocks, inputs]: which blocks of 4 outputs x 1 input hold anything but zeros."""
    outputs, inner = codes.shape
    whole = np.zeros((-(-outputs // BLOCK) * BLOCK, inner), bool)
    whole[:outputs] = codes != 0
    found: npt.NDArray[np.bool_] = np.logical_or.reduce(whole.reshape(-1, BLOCK, inner), axis=1)
    return found


def pack_sparse(codes: Codes, group: int) -> Packed:
    """[outputs, inner] -> its blocks; incomplete groups are filled up with zero weights of the first input."""
    kept = kept_blocks(codes)
    outputs, inner = codes.shape
    whole = np.zeros((len(kept) * BLOCK, inner), np.int8 if group == 4 else np.int16)
    whole[:outputs] = codes
    pieces, firsts = [], [0]
    for row, blocks in enumerate(kept):
        inputs = np.nonzero(blocks)[0]
        count = -(-len(inputs) // group)
        places = np.zeros(count * group, np.int32)
        places[: len(inputs)] = inputs * PANEL
        weights = np.zeros((BLOCK, count * group), whole.dtype)
        weights[:, : len(inputs)] = whole[row * BLOCK : (row + 1) * BLOCK, inputs]
        words = np.ascontiguousarray(weights.reshape(BLOCK, count, group).transpose(1, 0, 2)).view(np.int32)
        pieces.append(np.concatenate([places.reshape(count, group), words.reshape(count, BLOCK)], 1))
        firsts.append(firsts[-1] + count)
    stream = np.concatenate(pieces).ravel()
    return Packed(np.ascontiguousarray(stream, np.int32), np.array(firsts, np.int32), float(kept.mean()))


def sparse_starts(codes: Codes, zero: int) -> npt.NDArray[np.int32]:
    """-zero * sum(c) per output, padded to whole blocks: what the sums start from."""
    found = np.zeros(-(-codes.shape[0] // BLOCK) * BLOCK, np.int32)
    found[: codes.shape[0]] = -zero * codes.astype(np.int32).sum(1)
    return found


def sparse_int8(name: str, form: SparseForm, machine: Machine) -> Any:
    """`void NAME(...)` with the pointers `SPARSE_PARAMETERS`, for up to 64 rows.

    rows: int32 [1], 1 ... 64; panel: uint8 [inner, 64]; stream, firsts: of `pack_sparse`; starts: of `sparse_starts`;
    scales (weight scale * scale of q), bias, gamma, beta, inverse: float32 [outputs]; residual, y: float32
    [rows, outputs]; codes: uint8 [rows, outputs], or [outputs, 64] where they do not leave in rows; zero: float32 [1].
    No result may overlap an operand.
    """
    return _Writer(Kernel(name), form, machine).function()


@dataclass(frozen=True)
class _Grid:
    """How the rows of a register tile lie in its vectors.

    Attributes:
        lanes: 32-bit sums in a vector.
        vectors: per output.
        group: inputs summed at a time.
        vector_step, lane_step: element i in lane j (of 128 bits) of vector v is of row v * vector_step + j * lane_step
            + i.
    """

    lanes: int
    vectors: int
    group: int
    vector_step: int
    lane_step: int

    @property
    def rows(self) -> int:
        """Of the tile."""
        return self.lanes * self.vectors

    @property
    def blocks(self) -> int:
        """Rows of blocks whose results fill a vector."""
        return self.lanes // BLOCK

    @property
    def natural(self) -> list[int]:
        """Where the rows lie in all vectors of an output, one behind the other."""
        place = {}
        for v in range(self.vectors):
            for element in range(self.lanes):
                row = v * self.vector_step + element // 4 * self.lane_step + element % 4
                place[row] = v * self.lanes + element
        return [place[row] for row in range(self.rows)]


def _grids(machine: Machine) -> list[_Grid]:
    """The register tiles, the widest first; it is taken for more than half as many rows as it has."""
    group = group_of(machine)
    if machine.lanes == 16 and group == 4:
        return [_Grid(16, 4, 4, 4, 16), _Grid(16, 1, 4, 16, 4)]
    return [_Grid(8, 2, 4, 4, 8) if group == 4 else _Grid(8, 2, 2, 8, 4)]


class _Writer:
    def __init__(self, kernel: Kernel, form: SparseForm, machine: Machine) -> None:
        self.kernel, self.form, self.machine = kernel, form, machine
        blocks = -(-form.outputs // BLOCK)
        anything = ANY_ROWS * form.outputs
        sizes = {
            "rows": (1, "int32"), "panel": (form.inner * PANEL, "uint8"), "stream": (ANY_ROWS * BLOCK, "int32"),
            "firsts": (blocks + 1, "int32"), "starts": (blocks * BLOCK, "int32"), "residual": (anything, "float32"),
            "y": (anything, "float32"), "codes": (anything, "uint8"), "zero": (1, "float32"),
        }  # fmt: skip
        self.at = {key: kernel.buffer(key, *sizes.get(key, (form.outputs, "float32"))) for key in SPARSE_PARAMETERS}

    def function(self) -> Any:
        kernel, form = self.kernel, self.form
        self.rows = kernel.let(kernel.load(self.at["rows"], 0))
        grids = _grids(self.machine)
        if len(grids) == 1:
            self.tiles(grids[0], tirx.floordiv(self.rows + (grids[0].rows - 1), int32(grids[0].rows)))
        else:
            wide, narrow = grids
            with kernel.when(self.rows > int32(wide.rows // 4)):
                self.tiles(wide, 1)
            with kernel.when(self.rows <= int32(wide.rows // 4)):
                self.tiles(narrow, tirx.floordiv(self.rows + (narrow.rows - 1), int32(narrow.rows)))
        if form.epilogue == "layer_norm":
            self.norms()
        return kernel.function()

    def tiles(self, grid: _Grid, count: Expr) -> None:
        """All outputs of the rows, in `count` register tiles side by side."""
        kernel, outputs = self.kernel, self.form.outputs
        if not self.form.in_rows:
            full, rest = divmod(outputs, BLOCK)
            with kernel.loop(full, "block") as block, kernel.loop(count, "tile") as tile:
                self.to_panel(grid, block, tile, BLOCK)
            if rest:
                with kernel.loop(count, "tile") as tile:
                    self.to_panel(grid, int32(full), tile, rest)
            return
        full, rest = divmod(outputs, grid.lanes)
        turned = kernel.local(grid.blocks * grid.vectors * BLOCK * grid.lanes, "int32")
        with kernel.loop(full, "band") as band, kernel.loop(count, "tile") as tile:
            self.to_rows(grid, band, tile, grid.lanes, turned)
        if rest:
            with kernel.loop(count, "tile") as tile:
                self.to_rows(grid, int32(full), tile, rest, turned)

    def sums(self, grid: _Grid, block: Expr, tile: Expr) -> Any:
        """The sums of a row of blocks for a tile of rows: a local buffer [4 outputs, vectors, lanes]."""
        kernel, group = self.kernel, grid.group
        lanes, width = grid.lanes, grid.rows
        sums = kernel.local(BLOCK * width, "int32")
        for o in range(BLOCK):
            start = kernel.let(spread(kernel.load(self.at["starts"], block * BLOCK + o), lanes))
            for v in range(grid.vectors):
                kernel.store(sums, o * width + v * lanes, start, lanes)
        first = kernel.let(kernel.load(self.at["firsts"], block))
        count = kernel.let(kernel.load(self.at["firsts"], block + 1) - first)
        column = kernel.let(tile * width)
        with kernel.loop(count, "g") as g:
            at = (first + g) * (group + BLOCK)
            places = [kernel.let(kernel.load(self.at["stream"], at + i) + column) for i in range(group)]
            vectors = self.gathered(grid, places)
            for o in range(BLOCK):
                word = spread(kernel.load(self.at["stream"], at + group + o), lanes)
                kind = typed("int8", 4 * lanes) if group == 4 else typed("int16", 2 * lanes)
                weight = kernel.let(reinterpret(kind, word))
                for v, x in enumerate(vectors):
                    place = o * width + v * lanes
                    old = kernel.load(sums, place, lanes)
                    kernel.store(sums, place, dot(Tile(1, lanes, lanes, group), old, x, weight), lanes)
        return sums

    def gathered(self, grid: _Grid, places: list[Expr]) -> list[Expr]:
        """The bytes of a group of inputs, side by side for each row of the tile."""
        kernel = self.kernel
        rows = [kernel.let(kernel.load(self.at["panel"], place, grid.rows)) for place in places]
        if grid.group == 2:  # widened to 16 bits
            pairs = [interleaved(kernel, rows[0], rows[1], "uint8", 16, high=high) for high in (False, True)]
            return [kernel.let(cast("int16x16", pair)) for pair in pairs]
        if grid.rows == 64:
            found = []
            for high in (False, True):
                pairs = [interleaved(kernel, a, b, "uint8", 64, high=high) for a, b in (rows[:2], rows[2:])]
                found += self.quads(pairs, 64)
            return found
        if grid.lanes == 16:
            return [kernel.let(shuffle(rows, [16 * k + row for row in range(16) for k in range(4)]))]
        evens, odds = (kernel.let(shuffle(pair, range(32))) for pair in (rows[0::2], rows[1::2]))
        low, high = (interleaved(kernel, evens, odds, "uint8", 32, high=part) for part in (False, True))
        pairs = [kernel.let(shuffle([low, high], [*range(i, i + 16), *range(32 + i, 48 + i)])) for i in (0, 16)]
        return self.quads(pairs, 32)

    def quads(self, pairs: list[Expr], size: int) -> list[Expr]:
        """Two vectors of pairs of bytes -> in every lane the low, and the high, pairs of both side by side."""
        kernel = self.kernel
        a, b = (kernel.let(as_elements("uint16", pair, size)) for pair in pairs)
        both = [interleaved(kernel, a, b, "uint16", size // 2, high=high) for high in (False, True)]
        return [kernel.let(as_elements("uint8", value, size)) for value in both]

    def to_panel(self, grid: _Grid, block: Expr, tile: Expr, count: int) -> None:
        """Bytes of `count` outputs of a row of blocks."""
        kernel, lanes = self.kernel, grid.lanes
        sums = self.sums(grid, block, tile)
        zero = kernel.let(kernel.load(self.at["zero"], 0) + float32(_MAGIC))
        for o in range(count):
            output = kernel.let(block * BLOCK + o)
            scale, bias, inverse = (
                kernel.let(spread(kernel.load(self.at[key], output), lanes)) for key in ("scales", "bias", "inverse")
            )
            found = []
            for v in range(grid.vectors):
                total = kernel.load(sums, o * grid.rows + v * lanes, lanes)
                value = kernel.let(cast(typed("float32", lanes), total) * scale + bias)
                value = activated(kernel, self.form, value, lanes)
                shifted = tirx.Max(value * inverse + spread(zero, lanes), float32(_MAGIC, lanes))
                found.append(kernel.let(shifted))
            kernel.store(self.at["codes"], output * PANEL + tile * grid.rows, self.bytes_of(grid, found), grid.rows)

    def bytes_of(self, grid: _Grid, shifted: list[Expr]) -> Expr:
        """Vectors of floats 1.5 * 2**23 + code, all of them at least that, as saturated bytes in the rows' order."""
        kernel, lanes = self.kernel, grid.lanes
        if grid.rows != 64:
            high = float32(_MAGIC + 255, lanes)
            bits = [kernel.let(reinterpret(typed("int32", lanes), tirx.Min(value, high))) for value in shifted]
            return cast(typed("uint8", grid.rows), shuffle(bits, grid.natural))
        offset = spread(tirx.IntImm("int32", _MAGIC_BITS), 16)
        words = [kernel.let(reinterpret("int32x16", value) - offset) for value in shifted]
        halves = [
            kernel.let(intrinsic("int16x32", "llvm.x86.avx512.packssdw.512", *words[i : i + 2])) for i in (0, 2)
        ]
        return reinterpret("uint8x64", intrinsic("int8x64", "llvm.x86.avx512.packuswb.512", *halves))

    def to_rows(self, grid: _Grid, band: Expr, tile: Expr, count: int, turned: Any) -> None:
        """Floats of `count` outputs: as many blocks as fill a vector are turned, so that it is of one row."""
        kernel, lanes, vectors = self.kernel, grid.lanes, grid.vectors
        per_block = vectors * BLOCK * lanes
        with kernel.loop(-(-count // BLOCK), "block") as b:
            sums = self.sums(grid, band * grid.blocks + b, tile)
            for v in range(vectors):
                rows = [kernel.load(sums, o * grid.rows + v * lanes, lanes) for o in range(BLOCK)]
                for i, value in enumerate(transposed_words(kernel, rows, lanes)):
                    kernel.store(turned, b * per_block + (v * BLOCK + i) * lanes, value, lanes)
        with kernel.loop(vectors, "v") as v, kernel.loop(BLOCK, "i") as i:
            places = [b * per_block + (v * BLOCK + i) * lanes for b in range(grid.blocks)]
            parts = exchanged_lanes(kernel, [kernel.let(kernel.load(turned, place, lanes)) for place in places])
            for j, sums_of_row in enumerate(parts):
                row = kernel.let(tile * grid.rows + v * grid.vector_step + j * grid.lane_step + i)
                with kernel.when(row < self.rows):
                    for offset, n in tail(count, lanes):
                        part = sums_of_row if n == lanes else shuffle([sums_of_row], range(offset, offset + n))
                        self.to_row(row, kernel.let(band * lanes + offset), kernel.let(part), n)

    def to_row(self, row: Expr, column: Expr, sums: Expr, n: int) -> None:
        """Some outputs of a row."""
        kernel = self.kernel
        scale, bias = (kernel.load(self.at[key], column, n) for key in ("scales", "bias"))
        value = kernel.let(cast(typed("float32", n), sums) * scale + bias)
        finish(kernel, self.form, self.at, value, row * self.form.outputs + column, column, n)

    def norms(self) -> None:
        """Layer norm of the rows of y, in place."""
        kernel, form = self.kernel, self.form
        with kernel.loop(self.rows, "norm") as row:
            normed(kernel, self.machine.lanes, form, self.at, row * form.outputs)


__all__ = [
    "BLOCK", "SPARSE_PARAMETERS", "Packed", "SparseForm", "group_of", "kept_blocks", "pack_sparse", "sparse_int8",
    "sparse_starts",
]  # fmt: skip
