"""Pattern-sparse attention as dense attention over slices: what is not seen is neither loaded nor multiplied.

Queries are taken some at a time with the ranges of keys that any of them sees. Neighbouring heads that see the same
share the slices. Where many diagonals are one band after tokens are renumbered (place by place instead of frame by
frame), they are; attention does not depend on the order of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.ops.attention_pattern import (
    BLOCK,
    NUMBERS,
    Pattern,
    check_blocks,
    check_heads,
    patterns_of,
    seen_by,
)

ROWS = 128  # queries of a piece: of fewer, calls cost more than they leave out
_GAP = 32  # keys between two ranges that are taken along
_KEPT = 1 << 20  # elements of a mask that is kept as what is added to scores


@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys are seen, bool [queries, keys]; [1, keys] where all queries see the same."""

    seen: Tensor
    _made: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def added(self, dtype: torch.dtype) -> Tensor:
        """What is added to scores; large negative numbers, not minus infinity: rows without keys are no NaN."""
        if dtype in self._made:
            return self._made[dtype]
        made = torch.zeros(self.seen.shape, dtype=dtype).masked_fill(~self.seen, max(-1e30, torch.finfo(dtype).min))
        if self.seen.numel() <= _KEPT:
            self._made[dtype] = made
        return made


@dataclass(frozen=True, eq=False)
class Piece:
    """Queries `start` to `stop` with the keys of `ranges`.

    `mask` is None where all are seen; `empty` is bool [queries, 1], true where a query sees no key, None where each
    sees some.
    """

    start: int
    stop: int
    ranges: tuple[tuple[int, int], ...]
    mask: Mask | None
    empty: Tensor | None = None

    @property
    def pairs(self) -> int:
        """Products of a query and a key."""
        return (self.stop - self.start) * sum(high - low for low, high in self.ranges)


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads `start` to `stop`, which see the same; `order` renumbers their tokens first (None: they stay)."""

    start: int
    stop: int
    order: Tensor | None
    pieces: tuple[Piece, ...]

    @property
    def pairs(self) -> int:
        """Products of a query and a key, over all heads."""
        return (self.stop - self.start) * sum(piece.pairs for piece in self.pieces)


def slices(patterns: Sequence[int], length: int, blocks: Tensor | None = None) -> tuple[HeadGroup, ...]:
    """The plan of all heads, for so many tokens; it is kept."""
    packed = None if blocks is None else bytes(blocks.to(torch.uint8).flatten().tolist())
    return _slices(tuple(map(int, patterns)), length, packed)


def sliced_attention(
    q: Tensor, k: Tensor, v: Tensor, patterns: Sequence[int], scale: float, blocks: Tensor | None = None
) -> Tensor:
    """`fxopt::attention_pattern` without the work for what is not seen; arguments and errors as there."""
    check_heads(patterns, q.shape[1])
    if blocks is not None:
        check_blocks(blocks, q.shape[1], q.shape[2])
    return run_slices(slices(patterns, q.shape[2], blocks), q, k, v, scale)


def run_slices(groups: Sequence[HeadGroup], q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention by a plan for all heads of q, k and v, float [batch, heads, length, width]."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for group in groups:
        heads = slice(group.start, group.stop)
        taken = [x[:, heads] for x in (q, k, v)]
        if group.order is not None:
            taken = [x.index_select(2, group.order) for x in taken]
        queries, keys, values = taken
        result = out[:, heads] if group.order is None else torch.zeros_like(queries)
        for piece in group.pieces:
            rows = slice(piece.start, piece.stop)
            some_keys, some_values = (_ranges(x, piece.ranges) for x in (keys, values))
            mask = None if piece.mask is None else piece.mask.added(q.dtype)
            made = F.scaled_dot_product_attention(queries[:, :, rows], some_keys, some_values, mask, scale=scale)
            result[:, :, rows] = made if piece.empty is None else made.masked_fill(piece.empty, 0.0)
        if group.order is not None:
            out[:, heads] = result.index_select(2, torch.argsort(group.order))
    return out


def _ranges(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [x[:, :, low:high] for low, high in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@lru_cache(maxsize=128)
def _slices(patterns: tuple[int, ...], length: int, packed: bytes | None) -> tuple[HeadGroup, ...]:
    lists = None
    if packed is not None:
        count = -(-length // BLOCK)
        lists = torch.tensor(list(packed), dtype=torch.bool).reshape(len(patterns) // NUMBERS, count, count)
    return planned(patterns_of(patterns), length, lists)


def planned(every: Sequence[Pattern], length: int, lists: Tensor | None = None) -> tuple[HeadGroup, ...]:
    """The plan of all heads, made anew; `lists` are the blocks of each, bool [heads, n, n]."""
    found: list[HeadGroup] = []
    for head, pattern in enumerate(every):
        last = found[-1] if found else None
        same = head > 0 and pattern == every[head - 1]
        if same and last is not None and (lists is None or torch.equal(lists[head], lists[head - 1])):
            found[-1] = HeadGroup(last.start, head + 1, last.order, last.pieces)
            continue
        order = renumbered(pattern, length) if lists is None or bool(lists[head].all()) else None
        numbers = torch.arange(length) if order is None else order
        listed = None if lists is None or order is not None else lists[head]
        found.append(HeadGroup(head, head + 1, order, _pieces(_Rows(pattern, numbers, listed))))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Which keys some queries see: all pairs at once would not fit for long sequences."""

    pattern: Pattern
    numbers: Tensor
    listed: Tensor | None

    def __getitem__(self, rows: slice) -> Tensor:
        """Bool [queries, keys]."""
        queries = self.numbers[rows]
        if self.pattern[3] >= self.pattern[2]:
            found = torch.ones(len(queries), len(self.numbers), dtype=torch.bool)
        else:
            found = seen_by(self.pattern, queries, self.numbers)
        if self.listed is None:
            return found
        wide = self.listed[queries // BLOCK].repeat_interleave(BLOCK, 1)
        return found & wide[:, : len(self.numbers)]

    @property
    def pieces(self) -> Iterator[tuple[int, int, Tensor]]:
        """Queries `start` to `stop` with what they see: all at once, as one row, where all see the same."""
        length = len(self.numbers)
        steps = [slice(start, min(start + ROWS, length)) for start in range(0, length, ROWS)]
        first = self[slice(0, 1)]
        same = self.pattern[0] == 0 and self.listed is None
        if same or all(bool((self[step] == first).all()) for step in steps):
            yield 0, length, first
            return
        for step in steps:
            yield step.start, step.stop, self[step]


def renumbered(pattern: Pattern, length: int) -> Tensor | None:
    """The order of tokens in which many diagonals are one band; None where the pattern is something else."""
    slope, _, period, width, _ = pattern
    if slope != 1 or not width or width >= period or not period < length or length % period:
        return None
    return torch.arange(length).reshape(length // period, period).t().flatten()


def _pieces(visible: _Rows) -> tuple[Piece, ...]:
    """One piece where all queries see the same, else some queries at a time."""
    if not len(visible.numbers):
        return ()
    masks: dict[bytes, Mask] = {}
    made = []
    for start, stop, rows in visible.pieces:
        ranges = _runs(rows.any(0))
        if not ranges:
            continue
        kept = torch.cat([rows[:, low:high] for low, high in ranges], 1)
        mask = empty = None
        if not bool(kept.all()):
            key = bytes(kept.shape[1].to_bytes(8, "little")) + kept.contiguous().numpy().tobytes()
            mask = masks.setdefault(key, Mask(kept))
            hidden = ~kept.any(-1, keepdim=True)
            empty = hidden if bool(hidden.any()) else None
        made.append(Piece(start, stop, ranges, mask, empty))
    return tuple(made)


def _runs(used: Tensor) -> tuple[tuple[int, int], ...]:
    """Ranges that hold everything that is used; short gaps are taken along."""
    places = used.nonzero().flatten()
    if not len(places):
        return ()
    jumps = (places[1:] - places[:-1] > _GAP).nonzero().flatten()
    starts = torch.cat([places[:1], places[jumps + 1]])
    stops = torch.cat([places[jumps], places[-1:]]) + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))
