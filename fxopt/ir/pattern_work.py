"""How much work attention with patterns is: counted here for all, in the tiles that the backend's kernel takes.

    work_of(patterns, 4096)                    # slices, as `ir/sliced_attention.py` takes them
    work_of(patterns, 4096, tile=Tile(64, 64)) # a kernel that skips tiles which nobody looks at
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.ops.attention_pattern import Pattern, blocks_seen, patterns_of
from fxopt.ir.sliced_attention import HeadGroup, slices


@dataclass(frozen=True)
class Tile:
    """What a kernel multiplies at once: so many queries with so many keys."""

    queries: int
    keys: int

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys}"


@dataclass(frozen=True)
class Work:
    """The work of one attention with patterns.

    Attributes:
        share: of all pairs of a query and a key, over all heads, those that are multiplied.
        calls: of kernels.
        whole: the part of `share` in heads that are one call for all queries.
        copied: tokens of single heads that are copied to bring them together or into another order.
    """

    share: float
    calls: int
    whole: float = 0.0
    copied: int = 0


@dataclass(frozen=True)
class Price:
    """Time over that of dense attention: sliced * sliced work + whole * other work + call * calls / dense work.

    Attributes:
        sliced: times as long as in dense attention that a pair of a query and a key takes, in slices or tiles.
        whole: the same where a head is one call for all queries.
        call: multiply-adds that dense attention does in the time which a call takes beside its products.
    """

    sliced: float
    whole: float
    call: float = 0.0

    @classmethod
    def of_break_even(cls, share: float) -> Price:
        """That of a kernel which takes as long as dense attention at this share of the work; 0: it never pays."""
        each = 1.0 / max(share, 1e-9)
        return cls(each, each)

    def over_dense(self, work: Work, macs: float) -> float:
        """The time over that of dense attention, which is so many multiply-adds."""
        pairs = self.sliced * (work.share - work.whole) + self.whole * work.whole if work.share else 0.0
        return pairs + self.call * work.calls / max(1.0, macs)


def work_of(patterns: Sequence[int], length: int, blocks: Tensor | None = None, tile: Tile | None = None) -> Work:
    """The work for so many tokens; arguments as those of `fxopt::attention_pattern`.

    Args:
        tile: of the kernel; None: slices of dense attention.

    Raises:
        InvalidInput: there are lists of blocks, and the kernel takes tiles.
    """
    if tile is None:
        return work_of_slices(slices(patterns, length, blocks), length)
    if blocks is not None:
        raise InvalidInput("kernels that take tiles have no lists of blocks")
    every = patterns_of(patterns)
    if not every or not length:
        return Work(0.0, 0)
    found = [tiles_seen(pattern, length, tile) for pattern in every]
    pairs = sum(int(tiles.some.sum()) for tiles in found)
    return Work(pairs / sum(tiles.some.numel() for tiles in found), 1)


def work_of_slices(groups: Sequence[HeadGroup], length: int) -> Work:
    """The work of a plan for so many tokens."""
    if not groups or not length:
        return Work(0.0, 0)
    every = groups[-1].stop * length**2
    copied = sum(
        (group.stop - group.start) * ((0 if group.order is None else 4 * length) + _joined(group)) for group in groups
    )
    whole = sum(group.pairs for group in groups if len(group.pieces) == 1)
    pairs, calls = sum(group.pairs for group in groups), sum(len(group.pieces) for group in groups)
    return Work(pairs / every, calls, whole / every, copied)


def _joined(group: HeadGroup) -> int:
    """Keys and values of one head that are copied to bring several ranges together."""
    every = [piece.ranges for piece in group.pieces if len(piece.ranges) > 1]
    return sum(2 * (high - low) for ranges in every for low, high in ranges)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Which tiles of queries and keys one head looks at, and which are surely seen whole: bool [queries, keys] each.

    Tokens are renumbered place by place where that leaves fewer: number u is token u % frames * frame + u // frames.
    Without that, `frames` is the length and `frame` is 1.
    """

    some: Tensor
    whole: Tensor
    frames: int
    frame: int


def tiles_seen(pattern: Pattern, length: int, tile: Tile) -> Tiles:
    """The tiles of a pattern; those that are not filled are never whole."""
    plain = Tiles(*_seen(pattern, length, tile, length, 1), length, 1)
    if not has_frames(pattern, length):
        return plain
    frames, frame = length // pattern[2], pattern[2]
    renumbered = Tiles(*_seen(pattern, length, tile, frames, frame), frames, frame)
    return renumbered if int(renumbered.some.sum()) < int(plain.some.sum()) else plain


def has_frames(pattern: Pattern, length: int) -> bool:
    """Whether tokens can be renumbered place by place for this pattern."""
    return pattern[0] == 1 and pattern[2] < length and length % pattern[2] == 0


def _seen(pattern: Pattern, length: int, tile: Tile, frames: int, frame: int) -> tuple[Tensor, Tensor]:
    """Which tiles of numbers see each other at all, and which whole.

    With frames, number u is at place u // frames of some frame, and the pattern's period is a frame: places decide.
    Sinks are in the first frame; a tile that may hold one counts as seen.
    """
    rows, columns = _ranges(length, tile.queries), _ranges(length, tile.keys)
    filled = columns[:, 1] - columns[:, 0] == tile.keys - 1
    if frame == 1:
        some, whole = blocks_seen(pattern, rows, columns)
    else:
        slope, offset, period, width, sink = pattern
        places, among = rows // frames, columns // frames
        some, whole = blocks_seen((slope, offset, period, width, 0), places, among)
        some = some | (among[None, :, 0] < sink)
    return some, whole & filled[None]


def _ranges(length: int, block: int) -> Tensor:
    starts = torch.arange(0, length, block)
    return torch.stack([starts, (starts + block - 1).clamp(max=length - 1)], 1)
