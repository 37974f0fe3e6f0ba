"""Which blocks of keys each block of queries looks at in pattern-sparse attention: made on the host, once per shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fxopt.ir.ops.attention_pattern import patterns_of
from fxopt.ir.pattern_work import Tile, has_frames, tiles_seen

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
    found = [(pattern, tiles_seen(pattern, length, Tile(queries, keys))) for pattern in patterns_of(patterns)]
    parameters = [[*pattern, tiles.frames, tiles.frame, 0] for pattern, tiles in found]
    blocks = -(-length // queries)
    first, partial, columns = [0], [], []
    for _, tiles in found:
        for row in range(blocks):
            full = tiles.whole[row].nonzero().flatten()
            rest = (tiles.some[row] & ~tiles.whole[row]).nonzero().flatten()
            partial.append(first[-1] + len(full))
            first.append(partial[-1] + len(rest))
            columns += [full, rest]
    counts = torch.tensor(first)
    work = torch.argsort(counts[1:] - counts[:-1], descending=True, stable=True)
    listed = torch.cat(columns) if columns else torch.zeros(0)
    pairs = len(found) * blocks * -(-length // keys)

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
    return any(has_frames(pattern, length) for pattern in patterns_of(patterns))

