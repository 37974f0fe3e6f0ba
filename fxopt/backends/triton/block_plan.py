"""Which blocks of keys each block of queries looks at in pattern-sparse attention: made on the host, once per shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fxopt.ir.ops.attention_pattern import Pattern, blocks_seen, patterns_of

NUMBERS = 8  # of a head, as the kernel reads them


@dataclass(frozen=True)
class BlockPlan:
    """The work of all heads, longest first, as int32 tensors.

    Attributes:
        work: head * blocks + block of queries, [heads * blocks].
        first: where the key blocks of each (head, block) begin in `columns`, and the end, [heads * blocks + 1].
        partial: where those begin of which only a part is seen, [heads * blocks].
        parameters: slope, offset, period, width, sink, frames, length of a frame, 0 of each head, [heads, 8].
        density: share of pairs of blocks that are looked at.
    """

    work: Tensor
    first: Tensor
    partial: Tensor
    columns: Tensor
    parameters: Tensor
    blocks: int
    density: float


@lru_cache(maxsize=64)
def block_plan(patterns: tuple[int, ...], length: int, queries: int, keys: int, device: str = "cpu") -> BlockPlan:
    """The plan for blocks of so many queries and keys.

    A head of many diagonals is renumbered where that leaves fewer blocks.
    """
    parameters, lists = [], []
    for pattern in patterns_of(patterns):
        some, whole = _seen(pattern, length, queries, keys, length, 1)
        frames, frame = length, 1
        if _has_frames(pattern, length):
            renumbered = _seen(pattern, length, queries, keys, length // pattern[2], pattern[2])
            if int(renumbered[0].sum()) < int(some.sum()):
                (some, whole), frames, frame = renumbered, length // pattern[2], pattern[2]
        parameters.append([*pattern, frames, frame, 0])
        lists.append((some, whole))
    blocks = -(-length // queries)
    first, partial, columns = [0], [], []
    for some, whole in lists:
        for row in range(blocks):
            full, rest = whole[row].nonzero().flatten(), (some[row] & ~whole[row]).nonzero().flatten()
            partial.append(first[-1] + len(full))
            first.append(partial[-1] + len(rest))
            columns += [full, rest]
    counts = torch.tensor(first)
    work = torch.argsort(counts[1:] - counts[:-1], descending=True, stable=True)
    listed = torch.cat(columns) if columns else torch.zeros(0)
    pairs = len(lists) * blocks * -(-length // keys)

    def stored(numbers: Tensor) -> Tensor:
        return numbers.to(torch.int32).to(device)

    heads = torch.tensor(parameters).reshape(-1, NUMBERS)
    return BlockPlan(
        stored(work),
        stored(counts),
        stored(torch.tensor(partial)),
        stored(listed),
        stored(heads),
        blocks,
        len(listed) / pairs if pairs else 0.0,
    )


def may_renumber(patterns: tuple[int, ...], length: int) -> bool:
    """Whether some head could be renumbered: which kernel is used must not depend on the sizes of blocks."""
    return any(_has_frames(pattern, length) for pattern in patterns_of(patterns))


def _has_frames(pattern: Pattern, length: int) -> bool:
    return pattern[0] == 1 and pattern[2] < length and length % pattern[2] == 0


def _seen(pattern: Pattern, length: int, queries: int, keys: int, frames: int, frame: int) -> tuple[Tensor, Tensor]:
    """Which blocks of numbers see each other at all, and which whole; blocks that are not filled are never whole.

    With frames, number u is at place u // frames of some frame, and the pattern's period is a frame: places decide.
    Sinks are in the first frame; a block that may hold one counts as seen.
    """
    rows, columns = _ranges(length, queries), _ranges(length, keys)
    filled = columns[:, 1] - columns[:, 0] == keys - 1
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
