"""y = act((q - zero) @ C.T * scales + b) with a block-sparse C: blocks of some outputs x 1 input, most of them zero.

An instruction sums the products of a group of inputs (`fxopt.backends.tvm.kernels.dot`), which here lie apart: of a
row of blocks, the kept inputs are taken group by group. For several rows of x a panel of them is turned first:
feature-major, so that a load brings one input of all rows, and a few exchanges bring every row's group together (as
Shen et al., 2023, do with wider vectors). A single row collects its groups byte by byte.

Sums are the same integers as the dense product's: results are equal bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.emit import Expr, Kernel, cast, int32, reinterpret, shuffle, spread, tail, typed
from fxopt.backends.tvm.kernels.dot import Dot, in_groups, load_weights, multiply, pairs_fit
from fxopt.backends.tvm.kernels.lanes import LANE, interleaved, transposed
from fxopt.backends.tvm.kernels.nm import index_dtype
from fxopt.backends.tvm.kernels.results_int8 import Product, Results
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import tvm_type

Codes = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Blocks:
    """A weight as the kernel reads it, row of blocks by row of blocks.

    Attributes:
        weights: [groups, width, group], as the instruction takes them.
        inputs: [groups, group]; incomplete groups are filled up with zero weights of some input.
        firsts: int32 [rows of blocks + 1], the first group of each row of blocks.
        width: outputs in a block.
        density: share of the blocks that are kept.
    """

    weights: npt.NDArray[Any]
    inputs: npt.NDArray[Any]
    firsts: npt.NDArray[np.int32]
    width: int
    density: float

    @property
    def groups(self) -> int:
        """Of all rows of blocks."""
        return len(self.inputs)


def pack_blocks(codes: Codes, width: int, dot: Dot) -> Blocks:
    """[outputs, inner] -> the blocks of `width` outputs x 1 input that hold anything but zeros."""
    inner = codes.shape[1]
    whole = _in_blocks(codes, width)
    kept = (whole != 0).any(1)
    counts = -(-kept.sum(1) // dot.group)
    firsts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    inputs = np.zeros((int(firsts[-1]), dot.group), index_dtype(inner))
    weights = np.zeros((len(inputs), dot.group, width), np.int16)
    for row, blocks in enumerate(kept):
        places = np.nonzero(blocks)[0]
        part = slice(firsts[row], firsts[row + 1])
        inputs[part].reshape(-1)[: len(places)] = places
        weights[part].reshape(-1, width)[: len(places)] = whole[row][:, places].T
    turned = np.ascontiguousarray(weights.transpose(0, 2, 1) + dot.raised).astype(dot.weights)
    return Blocks(turned, inputs, firsts, width, float(kept.mean()) if kept.size else 0.0)


def _in_blocks(codes: Codes, width: int) -> npt.NDArray[np.int16]:
    """[outputs, inner] -> [rows of blocks, width, inner], the last one filled up with zeros."""
    outputs, inner = codes.shape
    whole = np.zeros((-(-outputs // width), width, inner), np.int16)
    whole.reshape(-1, inner)[:outputs] = codes
    return whole


# Time per share of kept blocks over that of the dense 8-bit product, of blocks of `machine.columns` outputs and of half
# and a quarter as many: for some rows, and for one (benchmarks/sparse_rates.py; on x86 of one shape only).
_COSTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "sdot": ((2.1, 2.9), (4.6, 7.5)),
    "smull": ((1.2, 1.8), (1.9, 2.7)),
    "relaxed_dot": ((1.75, 3.2), (4.6, 8.5)),
    "dot_i16x8": ((1.3, 1.8), (1.9, 2.6)),
    "vpdpbusd": ((1.3, 2.7, 5.0), (1.3, 2.7, 5.0)),
    "vpmaddubsw": ((1.5, 2.9), (1.5, 2.9)),
    "vpmaddwd": ((1.5, 2.9), (1.5, 2.9)),
}


def block_density(codes: Codes, width: int) -> float:
    """The share of blocks that hold anything but zeros; 1 of an empty weight."""
    return float((_in_blocks(codes, width) != 0).any(1).mean()) if codes.size else 1.0


def sparse_form(codes: Codes, rows: int, dot: Dot, machine: Machine) -> Blocks | None:
    """The blocks of the width that takes the least time; None where the dense product takes less, or else is exact."""
    best, chosen, least = 1.0, 0, 8 if machine.family == "x86" else 4
    for halvings, cost in enumerate(_COSTS[dot.instruction][rows < 2]):
        width = machine.columns >> halvings
        density = block_density(codes, width)
        if 0 < density * cost < best and width >= least:
            best, chosen = density * cost, width
    if not chosen:
        return None
    found = pack_blocks(codes, chosen, dot)
    return found if is_exact(found, dot) else None


def is_exact(blocks: Blocks, dot: Dot) -> bool:
    """Whether the instruction sums the weights exactly as they lie now: others are neighbours than before."""
    return dot.instruction != "vpmaddubsw" or not blocks.groups or pairs_fit(blocks.weights.reshape(-1, dot.group))


def panel_rows(size: Product, dot: Dot) -> int:
    """Rows of x that are turned together; 0: a single row is not."""
    most = LANE // (4 // dot.group)
    return 0 if size.rows < 2 else next(high for high in (4, 8, 16) if high >= min(size.rows, most))


def bsr_int8(name: str, size: Product, groups: int, width: int, dot: Dot, machine: Machine) -> Any:
    """`void NAME(q, weights, inputs, firsts, starts, scales, bias, [range], [factors], [panel], y)`.

    q: [rows, inner in whole groups] as `dot.x` says; weights, inputs and firsts of `Blocks`; panel: work space of
    `panel_rows` x inner in whole groups, of the type of q, if any are turned; the others: see `Results`.
    """
    return _Writer(name, size, groups, width, dot, machine).function()


class _Writer:
    def __init__(self, name: str, size: Product, groups: int, width: int, dot: Dot, machine: Machine) -> None:
        self.kernel, self.size, self.dot, self.machine = Kernel(name), size, dot, machine
        self.width, self.lanes = width, min(width, machine.lanes)
        self.inner, self.high = in_groups(size.inner, dot), panel_rows(size, dot)
        kernel, kind = self.kernel, tvm_type(dot.x.dtype)
        self.q = kernel.buffer("q", size.rows * self.inner, kind)
        self.weights = kernel.buffer("weights", groups * width * dot.group, dot.weights)
        self.inputs = kernel.buffer("inputs", groups * dot.group, index_dtype(size.inner))
        self.firsts = kernel.buffer("firsts", -(-size.outputs // width) + 1, "int32")
        self.results = Results(kernel, size, dot, machine, width)
        self.panel = kernel.buffer("panel", self.high * self.inner, kind) if self.high else None
        self.results.declare_y()

    def function(self) -> Any:
        kernel, rows = self.kernel, self.size.rows
        if self.panel is None:
            self.products(int32(0), rows)
            return kernel.function()
        full, rest = divmod(rows, self.high)
        with kernel.loop(full, "panel") as index:
            self.turn(index * self.high, self.high)
            self.products(index * self.high, self.high)
        if rest:
            self.turn(int32(full * self.high), rest)
            self.products(int32(full * self.high), rest)
        return kernel.function()

    def turn(self, start: Expr, rows: int) -> None:
        """panel[input, row] = q[start + row, input]; rows that do not exist repeat the last one."""
        kernel, high, kind = self.kernel, self.high, tvm_type(self.dot.x.dtype)
        step = LANE // (4 // self.dot.group)  # inputs of a vector

        def unit(first: Expr) -> None:
            places = [(start + min(row, rows - 1)) * self.inner + first for row in range(high)]
            loaded = [kernel.let(kernel.load(self.q, place, step)) for place in places]
            for i, vector in enumerate(transposed(kernel, loaded, kind, step)):
                kernel.store(self.panel, first * high + i * step, vector, step)

        full, rest = divmod(self.inner, step)
        with kernel.loop(full, "unit") as index:
            unit(index * step)
        if rest and full:
            unit(int32(self.inner - step))
        elif rest:
            with kernel.loop(rest, "f") as f, kernel.loop(high, "r") as r:
                row = tirx.Min(int32(r), int32(rows - 1))
                kernel.store(self.panel, f * high + r, kernel.load(self.q, (start + row) * self.inner + f))

    def products(self, start: Expr, rows: int) -> None:
        """All blocks times some rows."""
        kernel, size = self.kernel, self.size
        full, rest = divmod(size.outputs, self.width)
        height = min(self.machine.dot_rows, self.high or rows)

        def blocks(number: Expr, columns: int) -> None:
            first = kernel.let(kernel.load(self.firsts, number))
            count = kernel.let(kernel.load(self.firsts, number + 1) - first)
            tiles, left = divmod(rows, height)
            with kernel.loop(tiles, "tile") as index:
                self.tile(number, first, count, start, index * height, height, columns)
            if left:
                self.tile(number, first, count, start, int32(tiles * height), left, columns)

        with kernel.loop(full, "block") as number:
            blocks(number, self.width)
        if rest:
            blocks(int32(full), rest)

    def tile(self, number: Expr, first: Expr, groups: Expr, start: Expr, row: Expr, count: int, columns: int) -> None:
        """`count` rows times a row of blocks, of whose outputs `columns` exist."""
        kernel, dot, width, lanes = self.kernel, self.dot, self.width, self.lanes
        vectors = range(0, width, lanes)
        sums = kernel.local(count * width, "int32")
        for r in range(count):
            for v in vectors:
                kernel.store(sums, r * width + v, self.results.first(number * width + v), lanes)
        raised = kernel.local(-(-count // 4) * 4, "int32") if dot.raised else None  # sums of the groups of x
        if raised is not None:
            for at in range(0, count, 4):
                kernel.store(raised, at, spread(int32(0), 4), 4)
        with kernel.loop(groups, "g") as g:
            at = kernel.let(first + g)
            inputs = [kernel.let(cast("int32", kernel.load(self.inputs, at * dot.group + i))) for i in range(dot.group)]
            weights = [load_weights(kernel, dot, self.weights, (at * width + v) * dot.group, lanes) for v in vectors]
            quads = self.gathered(inputs, row, count) if self.panel is not None else [self.collected(inputs, start)]
            values = [kernel.let(self.repeated(quads[r // 4], r % 4)) for r in range(count)]
            for r, value in enumerate(values):
                for v, weight in zip(vectors, weights, strict=True):
                    old = kernel.load(sums, r * width + v, lanes)
                    kernel.store(sums, r * width + v, multiply(dot, old, value, weight, lanes), lanes)
            if raised is not None:
                ones = spread(tirx.IntImm("uint8", 1), 16)
                for i, x in enumerate(quads):
                    kernel.store(raised, 4 * i, multiply(dot, kernel.load(raised, 4 * i, 4), x, ones, 4), 4)
        for r in range(count):
            for v, n in tail(columns, lanes):
                total = kernel.load(sums, r * width + v, n)
                if raised is not None:
                    total = total - spread(kernel.load(raised, r) * int32(dot.raised), n)
                total = kernel.let(cast(typed("float32", n), total))
                self.results.finish(total, number * width + v, start + row + r, n)

    def repeated(self, quad: Expr, index: int) -> Expr:
        """One of four values in every lane."""
        if self.lanes == 4:
            return shuffle([quad], [index] * 4)
        return spread(self.kernel.let(shuffle([quad], [index])), self.lanes)

    def gathered(self, inputs: list[Expr], row: Expr, count: int) -> list[Expr]:
        """Groups of the rows, one in each 32 bits: as many vectors of four as there are fours of rows."""
        kernel, high, kind = self.kernel, self.high, tvm_type(self.dot.x.dtype)
        places = [kernel.let(place * high + row) for place in inputs]
        found: list[Expr] = []
        for first in range(0, count, 8):
            size = 8 if count - first > 4 else 4
            if self.dot.group == 2:
                for part in range(first, first + size, 4):
                    a, b = (kernel.let(kernel.load(self.panel, place + part, 4)) for place in places)
                    pairs = shuffle([a, b], [i for lane in range(4) for i in (lane, lane + 4)])
                    found.append(kernel.let(reinterpret("int32x4", kernel.let(pairs))))
            elif size == 4:
                words = [reinterpret("int32", kernel.load(self.panel, place + first, 4)) for place in places]
                bytes_ = kernel.let(reinterpret(typed(kind, 16), kernel.let(shuffle(words, range(4)))))
                turned = shuffle([bytes_], [4 * i + lane for lane in range(4) for i in range(4)])
                found.append(kernel.let(reinterpret("int32x4", kernel.let(turned))))
            else:
                loaded = [kernel.let(kernel.load(self.panel, place + first, 8)) for place in places]
                zipped = [i for lane in range(8) for i in (lane, lane + 8)]
                a, b = (
                    kernel.let(reinterpret("int16x8", kernel.let(shuffle(pair, zipped))))
                    for pair in (loaded[:2], loaded[2:])
                )
                for part in (False, True):
                    found.append(kernel.let(reinterpret("int32x4", interleaved(kernel, a, b, "int16", 8, high=part))))
        return found

    def collected(self, inputs: list[Expr], row: Expr) -> Expr:
        """A row's group, from its place in x, four times."""
        codes = [self.kernel.load(self.q, row * self.inner + place) for place in inputs]
        group = self.kernel.let(shuffle(codes, range(len(codes))))
        return self.kernel.let(reinterpret("int32x4", shuffle([group] * 4, range(4 * len(codes)))))


__all__ = ["Blocks", "Codes", "Product", "bsr_int8", "pack_blocks", "panel_rows"]
