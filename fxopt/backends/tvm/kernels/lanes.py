"""Vectors as lanes of 128 bits: what SSE and its successors do alike in every lane, and exchanges between lanes."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.backends.tvm.emit import Expr, Kernel, reinterpret, shuffle, typed

LANE = 16  # bytes


def interleaved(kernel: Kernel, a: Expr, b: Expr, dtype: str, count: int, *, high: bool) -> Expr:
    """In every lane the low (or high) halves of a and b, element by element: a0 b0 a1 b1 ...

    Args:
        dtype: of the elements that stay whole; a and b are vectors of `count` of them.
    """
    per_lane = LANE * 8 // _bits(dtype)
    half = per_lane // 2 if high else 0
    starts = [lane + half for lane in range(0, count, per_lane)]
    indices = [part + start + i for start in starts for i in range(per_lane // 2) for part in (0, count)]
    return kernel.let(shuffle([a, b], indices))


def as_elements(dtype: str, value: Expr, size: int) -> Expr:
    """A vector of `size` bytes as elements of a type."""
    return reinterpret(typed(dtype, size * 8 // _bits(dtype)), value)


def transposed_words(kernel: Kernel, rows: Sequence[Expr], count: int) -> list[Expr]:
    """Four vectors of `count` 32-bit integers: in every lane, element j of result i is element i of vector j."""
    (a, b, c, d), size = rows, 4 * count
    both = ((a, b), (c, d))
    pairs = [interleaved(kernel, x, y, "int32", count, high=high) for x, y in both for high in (False, True)]
    found = []
    for x, y in ((pairs[0], pairs[2]), (pairs[1], pairs[3])):
        x, y = (kernel.let(as_elements("int64", value, size)) for value in (x, y))
        for high in (False, True):
            quad = interleaved(kernel, x, y, "int64", count // 2, high=high)
            found.append(kernel.let(as_elements("int32", quad, size)))
    return found


def transposed_bytes(kernel: Kernel, rows: Sequence[Expr], size: int) -> list[Expr]:
    """Sixteen vectors of `size` bytes: in every lane, byte j of result i is byte i of vector j."""
    return transposed(kernel, rows, "uint8", size)


def transposed(kernel: Kernel, rows: Sequence[Expr], dtype: str, count: int = 0) -> list[Expr]:
    """As many vectors as a lane has elements: in every lane, element j of result i is element i of vector j.

    Rounds of interleaving a vector with the one half of them behind it.

    Args:
        count: elements of a vector; 0: one lane.
    """
    current, half = list(rows), len(rows) // 2
    for _ in range(half.bit_length()):
        current = [
            interleaved(kernel, current[i], current[i + half], dtype, count or len(rows), high=high)
            for i in range(half)
            for high in (False, True)
        ]
    return current


def exchanged_lanes(kernel: Kernel, rows: Sequence[Expr]) -> list[Expr]:
    """As many vectors of 32-bit integers as each has lanes: lane j of result i is lane i of vector j."""
    count = len(rows)
    if count == 2:
        return [kernel.let(shuffle(rows, [*range(4 * i, 4 * i + 4), *range(8 + 4 * i, 12 + 4 * i)])) for i in range(2)]

    def of_two(a: Expr, b: Expr, lanes: Sequence[int]) -> Expr:
        return kernel.let(shuffle([a, b], [4 * lane + i for lane in lanes for i in range(4)]))

    first, second = (0, 1, 4, 5), (2, 3, 6, 7)
    found = []
    for lanes in (first, second):
        x, y = of_two(rows[0], rows[1], lanes), of_two(rows[2], rows[3], lanes)
        found += [of_two(x, y, (0, 2, 4, 6)), of_two(x, y, (1, 3, 5, 7))]
    return found


def _bits(dtype: str) -> int:
    return int(dtype.lstrip("uint"))


__all__ = ["LANE", "as_elements", "exchanged_lanes", "interleaved", "transposed", "transposed_bytes",
           "transposed_words"]  # fmt: skip
