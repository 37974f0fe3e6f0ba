"""softmax(q @ k.T * scale + mask) @ v on bytes, for one head of one batch element.

q, k and v are bytes of symmetric values: value = (byte - 128) * scale, that of v per channel. Both products are sums of
integers. The probabilities of a query are relative to its largest: round(255 * e**(score - highest)), and what they
are divided by is the sum of these codes, so that each row of them sums to one. The exponential has a relative error of
1e-4, which is less than a tenth of a code.

All keys of some queries are scored before the softmax; keys and values are packed once per head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fxopt.backends.tvm.emit import Expr, Kernel, cast, float32, int32, reinterpret, spread, typed
from fxopt.backends.tvm.kernels.fused_int8 import Tile, dot, spread_codes
from fxopt.backends.tvm.kernels.rows_u8 import ANY_ROWS, round_to_bytes
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.errors import Unsupported

# Of the C function, all pointers. sizes: int32 [queries, keys, mask_step]; mask: float32 [keys], or
# [queries, keys] with mask_step = keys (else 0), added to the scores; factor:
# float32 [1], scale of the scores; inverse: float32 [width], scale of v over that of the result; zero: float32 [1].
ATTENTION_PARAMETERS = (
    "sizes",
    "q",
    "k",
    "v",
    "mask",
    "factor",
    "inverse",
    "zero",
    "codes",
    "packed",
    "floats",
    "bytes",
)

_LOWEST = -30.0  # powers of two below this are zero codes
_MIDDLE, _WIDE_MIDDLE = tirx.IntImm("uint8", 128), tirx.IntImm("int16", 128)  # the byte of the value 0
_MAGIC = 12582912.0  # 1.5 * 2**23
# 2**x for x in -0.5 ... 0.5, fitted as those of `approximations`: relative error 7.5e-5.
_EXP2 = (0.9999280571937561, 0.6932609677314758, 0.2426111251115799, 0.0551716685295105)


@dataclass(frozen=True)
class AttentionForm:
    """Heads of `width` channels in rows of `stride` bytes."""

    width: int
    stride: int


def attention_tile(form: AttentionForm, machine: Machine) -> Tile:
    """Queries x keys, and queries x channels: two vectors wide.

    Raises:
        Unsupported: the width is no multiple of that.
    """
    if machine.family != "x86":
        raise Unsupported(f"8-bit attention is made for x86-64; not for {machine.family}")
    group = 4 if machine.dot == "vpdpbusd" else 2
    tile = Tile(12, 32, 16, group) if machine.lanes == 16 else Tile(6, 16, 8, group)
    if form.width % tile.columns or form.width > form.stride:
        raise Unsupported(f"8-bit attention takes heads of a multiple of {tile.columns} channels; given {form.width}")
    return tile


def scratch(form: AttentionForm, tile: Tile, keys: int) -> tuple[int, int, int]:
    """Sizes of the work space: elements of `packed` (weights of the tile's kind), floats, bytes."""
    padded = -(-keys // tile.columns) * tile.columns
    return 2 * padded * form.width, padded * (2 * tile.rows + 1) + tile.rows, tile.rows * (padded + form.width)


def attention_int8(name: str, form: AttentionForm, machine: Machine) -> Any:
    """`void NAME(...)` with the pointers `ATTENTION_PARAMETERS`.

    q, k, v: uint8 rows of `stride`, of which `width` bytes are the head's; codes: uint8 in the same rows, the result.
    packed, floats, bytes: work space of the sizes that `scratch` gives (a starts row of int32 lies in `floats`).
    """
    return _Writer(name, form, attention_tile(form, machine)).function()


class _Writer:
    def __init__(self, name: str, form: AttentionForm, tile: Tile) -> None:
        self.kernel, self.form, self.tile = Kernel(name), form, tile
        anything = ANY_ROWS * form.stride
        sizes = {
            "sizes": (3, "int32"), "mask": (ANY_ROWS, "float32"), "factor": (1, "float32"), "zero": (1, "float32"),
            "inverse": (form.width, "float32"), "packed": (anything, "int8" if tile.group == 4 else "int16"),
            "floats": (anything, "float32"),
        }  # fmt: skip
        self.at = {key: self.kernel.buffer(key, *sizes.get(key, (anything, "uint8"))) for key in ATTENTION_PARAMETERS}

    def function(self) -> Any:
        kernel, tile, width = self.kernel, self.tile, self.form.width
        queries, keys, step = (kernel.let(kernel.load(self.at["sizes"], index)) for index in range(3))
        panels = kernel.let(tirx.floordiv(keys + (tile.columns - 1), int32(tile.columns)))
        self.padded = kernel.let(panels * tile.columns)
        # floats: mask [rows, padded] (its first row when all queries share it), starts [padded], scores [rows, padded],
        # reciprocals [rows]
        self.mask_step = kernel.let(tirx.Select(step > int32(0), self.padded, int32(0)))
        self.starts = kernel.let(self.padded * tile.rows)
        self.scores = kernel.let(self.padded * (tile.rows + 1))
        self.reciprocals = kernel.let(self.padded * (2 * tile.rows + 1))
        self.values = kernel.let(self.padded * width)  # in packed
        self.pack(keys)
        self.place_mask(int32(0), int32(0), keys)
        with kernel.loop(tirx.floordiv(queries + (tile.rows - 1), int32(tile.rows)), "block") as block:
            first = kernel.let(tirx.Max(tirx.Min(block * tile.rows, queries - tile.rows), int32(0)))
            rows = [kernel.let(tirx.Min(first + r, queries - 1) * self.form.stride) for r in range(tile.rows)]
            for r, row in enumerate(rows):
                for c in range(0, width, tile.lanes):
                    kernel.store(
                        self.at["bytes"], r * width + c, kernel.load(self.at["q"], row + c, tile.lanes), tile.lanes
                    )
            with kernel.when(step > int32(0)), kernel.loop(tile.rows, "row") as r:
                self.place_mask(r, tirx.Min(first + r, queries - 1) * step, keys)
            with kernel.loop(panels, "panel") as panel:
                self.score(panel)
            with kernel.loop(tile.rows, "row") as r:
                self.softmax(r)
            with kernel.loop(width // tile.columns, "panel") as panel:
                self.mix(panel, rows)
        return kernel.function()

    def pack(self, keys: Expr) -> None:
        """Keys as [panels, width / group, columns, group], values as [panels of channels, keys / group, ...]."""
        kernel, tile, width, stride = self.kernel, self.tile, self.form.width, self.form.stride
        group, columns, packed = tile.group, tile.columns, self.at["packed"]
        with kernel.loop(self.padded, "key") as key:
            source = kernel.let(tirx.Min(key, keys - 1) * stride)
            place = tirx.floordiv(key, int32(columns)) * (width * columns) + tirx.floormod(key, int32(columns)) * group
            place = kernel.let(place)
            for c in range(0, width, group):
                some = self.signed(kernel.load(self.at["k"], source + c, group), group)
                kernel.store(packed, place + c * columns, some, group)
        with kernel.loop(tirx.floordiv(self.padded, int32(group)), "group") as g:
            rows = [kernel.let(tirx.Min(g * group + i, keys - 1) * stride) for i in range(group)]
            for c in range(0, width, tile.lanes):
                word = None
                for i, row in enumerate(rows):
                    part = cast(typed("int32", tile.lanes), kernel.load(self.at["v"], row + c, tile.lanes))
                    shift = spread(tirx.IntImm("int32", 32 // group * i), tile.lanes)
                    word = part if word is None else word | (part << shift)
                if group == 4:
                    codes = self.signed(reinterpret(typed("uint8", 4 * tile.lanes), word), 4 * tile.lanes)
                else:
                    codes = reinterpret(typed("int16", 2 * tile.lanes), word) - spread(_WIDE_MIDDLE, 2 * tile.lanes)
                panel, column = divmod(c, columns)
                at = self.values + panel * columns * self.padded + g * (columns * group) + column * group
                kernel.store(packed, at, codes, tile.lanes * group)
        with kernel.loop(tirx.floordiv(self.padded, int32(columns)), "panel") as panel:
            for v in range(0, columns, tile.lanes):
                total = kernel.local(tile.lanes, "int32")
                kernel.store(total, 0, spread(tirx.IntImm("int32", 0), tile.lanes), tile.lanes)
                for c in range(0, width, group):
                    w = kernel.load(packed, panel * (width * columns) + c * columns + v * group, tile.lanes * group)
                    x = spread(_MIDDLE if group == 4 else _WIDE_MIDDLE, group * tile.lanes)
                    kernel.store(total, 0, dot(tile, kernel.load(total, 0, tile.lanes), x, w), tile.lanes)
                negative = spread(tirx.IntImm("int32", 0), tile.lanes) - kernel.load(total, 0, tile.lanes)
                place = self.starts + panel * columns + v
                kernel.store(self.at["floats"], place, reinterpret(typed("float32", tile.lanes), negative), tile.lanes)

    def place_mask(self, r: Expr, source: Expr, keys: Expr) -> None:
        """A row of the mask as exponents of two; there are no keys beyond the last."""
        kernel, lanes = self.kernel, self.tile.lanes
        factor, start = float32(1 / math.log(2), lanes), kernel.let(r * self.padded)
        full = kernel.let(tirx.floordiv(keys, int32(lanes)))
        with kernel.loop(full, "v") as index:
            value = kernel.load(self.at["mask"], source + index * lanes, lanes) * factor
            kernel.store(self.at["floats"], start + index * lanes, value, lanes)
        with kernel.loop(self.padded - full * lanes, "v") as index:
            key = kernel.let(full * lanes + index)
            value = kernel.load(self.at["mask"], source + tirx.Min(key, keys - 1)) * float32(1 / math.log(2))
            kernel.store(self.at["floats"], start + key, tirx.Select(key < keys, value, float32(-math.inf)))

    def signed(self, value: Expr, n: int) -> Expr:
        """Bytes less 128, in the type of the packed ones."""
        if self.tile.group == 4:
            return reinterpret(typed("int8", n), value ^ spread(_MIDDLE, n))
        return cast(typed("int16", n), value) - spread(_WIDE_MIDDLE, n)

    def score(self, panel: Expr) -> None:
        """The scores of a block of queries and a panel of keys, as exponents of two."""
        kernel, tile, width = self.kernel, self.tile, self.form.width
        columns, lanes, group = tile.columns, tile.lanes, tile.group
        vectors = range(0, columns, lanes)
        floats = self.at["floats"]
        sums = kernel.local(tile.rows * columns, "int32")
        starts = [
            kernel.let(
                reinterpret(typed("int32", lanes), kernel.load(floats, self.starts + panel * columns + v, lanes))
            )
            for v in vectors
        ]
        for r in range(tile.rows):
            for v, start in zip(vectors, starts, strict=True):
                kernel.store(sums, r * columns + v, start, lanes)
        with kernel.loop(width // group, "g") as g:
            place = panel * (width * columns) + g * (columns * group)
            loaded = [kernel.let(kernel.load(self.at["packed"], place + v * group, lanes * group)) for v in vectors]
            self.products(sums, lambda r: r * width + g * group, loaded)
        factor = kernel.let(spread(kernel.load(self.at["factor"], 0) * float32(1 / math.log(2)), lanes))
        for v in vectors:
            for r in range(tile.rows):
                mask = kernel.load(floats, r * self.mask_step + panel * columns + v, lanes)
                score = cast(typed("float32", lanes), kernel.load(sums, r * columns + v, lanes)) * factor + mask
                kernel.store(floats, self.scores + r * self.padded + panel * columns + v, score, lanes)

    def products(self, sums: Any, place: Any, loaded: list[Expr]) -> None:
        """Add the products of a group of every row of `bytes` with the loaded columns."""
        kernel, tile = self.kernel, self.tile
        for r in range(tile.rows):
            value = spread_codes(kernel, tile, self.at["bytes"], place(r))
            for index, column in enumerate(loaded):
                at = r * tile.columns + index * tile.lanes
                old = kernel.load(sums, at, tile.lanes)
                kernel.store(sums, at, dot(tile, old, value, column), tile.lanes)

    def softmax(self, r: Expr) -> None:
        """Scores of a row -> bytes, and the reciprocal of their sum."""
        kernel, lanes = self.kernel, self.tile.lanes
        floats = self.at["floats"]
        start = kernel.let(self.scores + r * self.padded)
        target = kernel.let(self.tile.rows * self.form.width + r * self.padded)
        count = tirx.floordiv(self.padded, int32(2 * lanes))
        high = kernel.local(2 * lanes)
        for c in (0, lanes):
            kernel.store(high, c, float32(-math.inf, lanes), lanes)
        with kernel.loop(count, "v") as index:
            for c in (0, lanes):
                value = kernel.load(floats, start + index * (2 * lanes) + c, lanes)
                kernel.store(high, c, tirx.Max(value, kernel.load(high, c, lanes)), lanes)
        self.fold(high, tirx.Max)
        top = kernel.let(tirx.Max(kernel.load(high, 0), float32(-1e30)))  # no key at all: every code is 0
        shift = kernel.let(spread(top - float32(math.log2(255)), lanes))
        total = kernel.local(2 * lanes)
        for c in (0, lanes):
            kernel.store(total, c, float32(0.0, lanes), lanes)
        magic = float32(_MAGIC, lanes)
        with kernel.loop(count, "v") as index:
            for c in (0, lanes):
                at = index * (2 * lanes) + c
                power = kernel.let(tirx.Max(kernel.load(floats, start + at, lanes) - shift, float32(_LOWEST, lanes)))
                whole = kernel.let(power + magic)
                rest = kernel.let(power - (whole - magic))
                value = float32(_EXP2[-1], lanes)
                for coefficient in reversed(_EXP2[:-1]):
                    value = value * rest + float32(coefficient, lanes)
                bits = reinterpret(typed("int32", lanes), kernel.let(value))
                bits = bits + (reinterpret(typed("int32", lanes), whole) << spread(tirx.IntImm("int32", 23), lanes))
                code = kernel.let(reinterpret(typed("float32", lanes), bits) + magic)
                kernel.store(total, c, kernel.load(total, c, lanes) + (code - magic), lanes)
                byte = cast(typed("uint8", lanes), reinterpret(typed("int32", lanes), code))
                kernel.store(self.at["bytes"], target + at, byte, lanes)
        self.fold(total, lambda a, b: a + b)
        sum_ = tirx.Max(kernel.load(total, 0), float32(1.0))
        kernel.store(floats, self.reciprocals + r, float32(1.0) / sum_)

    def fold(self, partial: Any, combine: Any) -> None:
        """Two vectors to one value, in place 0."""
        kernel, size = self.kernel, 2 * self.tile.lanes
        while size > 1:
            size //= 2
            a, b = kernel.load(partial, 0, size), kernel.load(partial, size, size)
            kernel.store(partial, 0, combine(a, b), size)

    def mix(self, panel: Expr, rows: list[Expr]) -> None:
        """A panel of channels of the result of a block of queries."""
        kernel, tile, width = self.kernel, self.tile, self.form.width
        columns, lanes, group = tile.columns, tile.lanes, tile.group
        vectors = range(0, columns, lanes)
        sums = kernel.local(tile.rows * columns, "int32")
        for at in range(0, tile.rows * columns, lanes):
            kernel.store(sums, at, spread(tirx.IntImm("int32", 0), lanes), lanes)
        start = kernel.let(self.values + panel * columns * self.padded)
        with kernel.loop(tirx.floordiv(self.padded, int32(group)), "g") as g:
            place = start + g * (columns * group)
            loaded = [kernel.let(kernel.load(self.at["packed"], place + v * group, lanes * group)) for v in vectors]
            self.products(sums, lambda r: tile.rows * width + r * self.padded + g * group, loaded)
        for r, row in enumerate(rows):
            reciprocal = kernel.let(spread(kernel.load(self.at["floats"], self.reciprocals + r), lanes))
            for v in vectors:
                value = cast(typed("float32", lanes), kernel.load(sums, r * columns + v, lanes)) * reciprocal
                column = panel * columns + v
                round_to_bytes(kernel, self.at, kernel.let(value), row + column, column, lanes)


__all__ = ["ATTENTION_PARAMETERS", "AttentionForm", "attention_int8", "attention_tile", "scratch"]
