"""The static memory plan: offsets in one arena such that values that live at the same time do not overlap.

Greedy by size (Pisarchyk & Lee, "Efficient memory management for deep neural net inference", 2020): the largest first,
each at the lowest offset that is free during its whole life.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64


@dataclass(frozen=True)
class Life:
    """A value of `size` bytes that is written at step `first` and read last at step `last`."""

    size: int
    first: int
    last: int

    def meets(self, other: Life) -> bool:
        """Whether both live at one step."""
        return self.first <= other.last and other.first <= self.last


def plan(lives: Sequence[Life]) -> tuple[list[int], int]:
    """Offsets (multiples of 64), in the order given, and the size of the arena.

    >>> plan([Life(100, 0, 1), Life(100, 1, 2), Life(64, 2, 3)])
    ([0, 128, 0], 256)
    """
    offsets = [0] * len(lives)
    placed: list[int] = []
    for index in sorted(range(len(lives)), key=lambda i: (-lives[i].size, lives[i].first)):
        taken = sorted((offsets[other], lives[other].size) for other in placed if lives[other].meets(lives[index]))
        start = 0
        for offset, size in taken:
            if start + lives[index].size <= offset:
                break
            start = max(start, _aligned(offset + size))
        offsets[index] = start
        placed.append(index)
    return offsets, max((_aligned(offsets[i] + lives[i].size) for i in range(len(lives))), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
