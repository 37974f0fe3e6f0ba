"""softmax(q @ k.T * scale + mask) @ v, one query block at a time; the scores never leave a scratch of a few rows.

All keys of a query are scored before the softmax, so that no running rescaling is needed; memory is linear in the
number of keys (as in Rabe & Staats, 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fxopt.backends.tvm.emit import Expr, Kernel, each, float32, int32, spread, tail
from fxopt.backends.tvm.kernels.approximations import exp_below_one
from fxopt.backends.tvm.kernels.rows import add, reduce_row
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine

_QUERIES = 4  # queries that share the loads of keys and values


Strides = tuple[int, int, int]


@dataclass(frozen=True)
class Placed:
    """Where an operand lies: strides of batch, head and row (the last axis is contiguous), offset, elements in all."""

    strides: Strides
    offset: int
    count: int


@dataclass(frozen=True)
class Attention:
    """q [batch, heads, queries, width], k [batch, key_heads, keys, width], v [..., keys, value_width].

    The result lies as [batch, queries, heads, value_width].
    """

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    scale: float
    placed: tuple[Placed, Placed, Placed]  # q, k, v
    causal: bool = False
    mask: Literal["", "float32", "bool"] = ""
    mask_strides: tuple[int, int, int] = (0, 0, 0)  # of batch, head, query; keys are contiguous
    mask_size: int = 0

    @property
    def scratch(self) -> int:
        """Floats: scores of some queries, and the keys of one head transposed."""
        return _QUERIES * self.keys + self.width * self.keys


def attention(name: str, size: Attention, machine: Machine) -> Any:
    """`void NAME(q, k, v, [mask], scratch, y)`.

    A float mask is added to the scores; a bool one (as bytes) keeps the keys where it is true. A query without any key
    gives zeros, as in torch and in ONNX.
    """
    kernel = Kernel(name)
    q, k, v = (kernel.buffer(key, place.count) for key, place in zip("qkv", size.placed, strict=True))
    mask = (
        kernel.buffer("mask", size.mask_size, "float32" if size.mask == "float32" else "uint8") if size.mask else None
    )
    scratch = kernel.buffer("scratch", size.scratch)
    y = kernel.buffer("y", size.batch * size.heads * size.queries * size.value_width)
    emitter = _Emitter(kernel, size, machine, q, k, v, mask, scratch, y)
    shared = size.heads // size.key_heads
    with kernel.loop(size.batch, "b") as b, kernel.loop(size.key_heads, "kh") as key_head:
        emitter.transpose(b, key_head)
        with kernel.loop(shared, "h") as h:
            head = kernel.let(key_head * shared + h)
            full, rest = divmod(size.queries, _QUERIES)
            with kernel.loop(full, "q") as block:
                emitter.block(b, head, key_head, block * _QUERIES, _QUERIES)
            if rest:
                emitter.block(b, head, key_head, int32(full * _QUERIES), rest)
    return kernel.function()


@dataclass(frozen=True)
class _Emitter:
    kernel: Kernel
    size: Attention
    machine: Machine
    q: Any
    k: Any
    v: Any
    mask: Any
    scratch: Any
    y: Any

    def start(self, operand: int, batch: Expr, head: Expr) -> Expr:
        """Where a head's rows of q (0), k (1) or v (2) begin."""
        place = self.size.placed[operand]
        return self.kernel.let(batch * place.strides[0] + head * place.strides[1] + place.offset)

    def transpose(self, b: Expr, key_head: Expr) -> None:
        """The keys of one head as [width, keys] behind the scores: scores are then sums along lanes of keys."""
        size, kernel = self.size, self.kernel
        start, step = self.start(1, b, key_head), size.placed[1].strides[2]
        with kernel.loop(size.width, "d") as d:
            place = kernel.let(d * size.keys + _QUERIES * size.keys)

            def copy(at: Expr, lanes: int) -> None:
                value = kernel.load(self.k, start + at * step + d, lanes, step)
                kernel.store(self.scratch, place + at, value, lanes)

            each(kernel, size.keys, self.machine.lanes, copy)

    def block(self, b: Expr, head: Expr, key_head: Expr, query: Expr, count: int) -> None:
        """Scores, softmax and the weighted sum of the values for `count` queries."""
        size, kernel = self.size, self.kernel
        first = kernel.let(self.start(0, b, head) + query * size.placed[0].strides[2])
        lanes = self.machine.lanes
        each_pair = 2 * lanes if size.keys >= 2 * lanes else lanes
        each(kernel, size.keys, each_pair, lambda at, n: self.scores(first, query, (b, head), at, n, count))
        shares = kernel.local(count)
        for i in range(count):
            total = self.exponentials(i * size.keys)
            none = tirx.EQ(total, float32(0.0))
            kernel.store(shares, i, tirx.Select(none, float32(0.0), float32(1.0) / total))
        values = self.start(2, b, key_head)
        result = kernel.let(((b * size.queries + query) * size.heads + head) * size.value_width)
        each(kernel, size.value_width, each_pair, lambda at, n: self.weighted(result, values, at, n, count, shares))

    def exponentials(self, start: int) -> Expr:
        """e**(score - largest) in the place of a row of scores; returns their sum, 0 when all are -inf.

        A NaN among the scores may get lost in the maximum; its exponential is NaN all the same.
        """
        kernel, keys, scratch = self.kernel, self.size.keys, self.scratch

        def score(at: Expr, n: int) -> Expr:
            return kernel.let(kernel.load(scratch, at + start, n))

        lowest = -3.4028234663852886e38  # not -inf, from which subtracting it gives NaN
        high = reduce_row(kernel, self.machine, keys, lowest, lambda a, b: tirx.Max(b, a), score)

        def exponential(at: Expr, n: int) -> Expr:
            value = exp_below_one(kernel, kernel.let(score(at, n) - spread(high, n)), n)
            kernel.store(scratch, at + start, value, n)
            return value

        return reduce_row(kernel, self.machine, keys, 0.0, add, exponential)

    def scores(self, first: Expr, query: Expr, where: tuple[Expr, Expr], at: Expr, lanes: int, count: int) -> None:
        """`count` queries times `lanes` keys."""
        size, kernel = self.size, self.kernel
        sums = kernel.local(count * lanes)
        pieces = tail(lanes, self.machine.lanes)
        for i in range(count):
            for offset, n in pieces:
                kernel.store(sums, i * lanes + offset, float32(0.0, n), n)
        with kernel.loop(size.width, "d") as d:
            place = d * size.keys + _QUERIES * size.keys
            keys = [kernel.let(kernel.load(self.scratch, place + at + offset, n)) for offset, n in pieces]
            for i in range(count):
                value = kernel.let(kernel.load(self.q, first + i * size.placed[0].strides[2] + d))
                for (offset, n), key in zip(pieces, keys, strict=True):
                    old = kernel.load(sums, i * lanes + offset, n)
                    kernel.store(sums, i * lanes + offset, old + spread(value, n) * key, n)
        for i in range(count):
            for offset, n in pieces:
                score = kernel.load(sums, i * lanes + offset, n) * float32(size.scale, n)
                score = self.masked(kernel.let(score), where, query + i, at + offset, n)
                kernel.store(self.scratch, i * size.keys + at + offset, score, n)

    def masked(self, score: Expr, where: tuple[Expr, Expr], query: Expr, key: Expr, lanes: int) -> Expr:
        """The scores with what is masked at -inf."""
        size, kernel = self.size, self.kernel
        none = float32(-math.inf, lanes)
        if size.mask:
            b, h, q = size.mask_strides
            value = kernel.load(self.mask, where[0] * b + where[1] * h + query * q + key, lanes)
            if size.mask == "float32":
                score = score + value
            else:
                score = tirx.Select(tirx.NE(value, spread(tirx.IntImm("uint8", 0), lanes)), score, none)
        if size.causal:
            keys = key if lanes == 1 else tirx.Ramp(key, int32(1), lanes)
            score = tirx.Select(keys <= spread(query, lanes), score, none)
        return score

    def weighted(self, result: Expr, values: Expr, at: Expr, lanes: int, count: int, shares: Any) -> None:
        """`count` results of `lanes` columns, by the sums of their exponentials."""
        size, kernel = self.size, self.kernel
        sums = kernel.local(count * lanes)
        pieces = tail(lanes, self.machine.lanes)
        for i in range(count):
            for offset, n in pieces:
                kernel.store(sums, i * lanes + offset, float32(0.0, n), n)
        with kernel.loop(size.keys, "key") as key:
            row = values + key * size.placed[2].strides[2] + at
            loaded = [kernel.let(kernel.load(self.v, row + offset, n)) for offset, n in pieces]
            for i in range(count):
                weight = kernel.let(kernel.load(self.scratch, key + i * size.keys))
                for (offset, n), value in zip(pieces, loaded, strict=True):
                    old = kernel.load(sums, i * lanes + offset, n)
                    kernel.store(sums, i * lanes + offset, old + spread(weight, n) * value, n)
        for i in range(count):
            for offset, n in pieces:
                place = result + i * (size.heads * size.value_width) + at + offset
                value = kernel.load(sums, i * lanes + offset, n) * spread(kernel.load(shares, i), n)
                kernel.store(self.y, place, value, n)
