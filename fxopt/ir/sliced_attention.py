"""Pattern-sparse attention as dense attention over slices: what is not seen is neither loaded nor multiplied.

Queries are taken some at a time with the ranges of keys that any of them sees. Neighbouring heads that see the same
share the slices. Where many diagonals are one band after tokens are renumbered (place by place instead of frame by
frame), they are; attention does not depend on the order of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    seen,
    seen_by,
)

ROWS = 128  # queries of a piece: of fewer, calls cost more than they leave out
_GAP = 32  # keys between two ranges that are taken along


@dataclass(frozen=True, eq=False)
class Piece:
    """Queries `start` to `stop` with the keys of `ranges`.

    `mask` is bool [queries, keys], None where all are seen; `empty` is bool [queries, 1], true where a query sees no
    key, None where each sees some.
    """

    start: int
    stop: int
    ranges: tuple[tuple[int, int], ...]
    mask: Tensor | None
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
    """The plan of all heads, for so many tokens."""
    packed = None if blocks is None else bytes(blocks.to(torch.uint8).flatten().tolist())
    return _slices(tuple(map(int, patterns)), length, packed)


def share(patterns: Sequence[int], length: int, blocks: Tensor | None = None) -> float:
    """Of all pairs of a query and a key, those that are multiplied."""
    groups = slices(patterns, length, blocks)
    return sum(group.pairs for group in groups) / max(1, groups[-1].stop * length**2) if groups else 0.0


def sliced_attention(
    q: Tensor, k: Tensor, v: Tensor, patterns: Sequence[int], scale: float, blocks: Tensor | None = None
) -> Tensor:
    """`fxopt::attention_pattern` without the work for what is not seen; arguments and errors as there."""
    check_heads(patterns, q.shape[1])
    if blocks is not None:
        check_blocks(blocks, q.shape[1], q.shape[2])
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    added: dict[int, Tensor] = {}  # pieces share masks: each is converted once
    for group in slices(patterns, q.shape[2], blocks):
        heads = slice(group.start, group.stop)
        taken = [x[:, heads] for x in (q, k, v)]
        if group.order is not None:
            taken = [x.index_select(2, group.order) for x in taken]
        queries, keys, values = taken
        result = out[:, heads] if group.order is None else torch.zeros_like(queries)
        for piece in group.pieces:
            rows = slice(piece.start, piece.stop)
            some_keys, some_values = (_ranges(x, piece.ranges) for x in (keys, values))
            mask = None
            if piece.mask is not None:
                if id(piece.mask) not in added:
                    added[id(piece.mask)] = _scores(piece.mask, q.dtype)
                mask = added[id(piece.mask)]
            made = F.scaled_dot_product_attention(queries[:, :, rows], some_keys, some_values, mask, scale=scale)
            result[:, :, rows] = made if piece.empty is None else made.masked_fill(piece.empty, 0.0)
        if group.order is not None:
            out[:, heads] = result.index_select(2, torch.argsort(group.order))
    return out


def _ranges(x: Tensor, ranges: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [x[:, :, low:high] for low, high in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Large negative numbers instead of minus infinity: rows without keys are no NaN."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, max(-1e30, torch.finfo(dtype).min))


@lru_cache(maxsize=128)
def _slices(patterns: tuple[int, ...], length: int, packed: bytes | None) -> tuple[HeadGroup, ...]:
    every = patterns_of(patterns)
    lists = None
    if packed is not None:
        count = -(-length // BLOCK)
        lists = torch.tensor(list(packed), dtype=torch.bool).reshape(len(every), count, count)
    found: list[HeadGroup] = []
    for head, pattern in enumerate(every):
        last = found[-1] if found else None
        same = head > 0 and pattern == every[head - 1]
        if same and last is not None and (lists is None or torch.equal(lists[head], lists[head - 1])):
            found[-1] = HeadGroup(last.start, head + 1, last.order, last.pieces)
            continue
        order = renumbered(pattern, length) if lists is None or bool(lists[head].all()) else None
        if order is None:
            own = patterns[head * NUMBERS : (head + 1) * NUMBERS]
            visible = seen(own, length, None if lists is None else lists[head : head + 1])[0]
        else:
            visible = seen_by(pattern, order, order)
        found.append(HeadGroup(head, head + 1, order, _pieces(visible)))
    return tuple(found)


def renumbered(pattern: Pattern, length: int) -> Tensor | None:
    """The order of tokens in which many diagonals are one band; None where the pattern is something else."""
    slope, _, period, width, _ = pattern
    if slope != 1 or not width or width >= period or not period < length or length % period:
        return None
    return torch.arange(length).reshape(length // period, period).t().flatten()


def _pieces(visible: Tensor) -> tuple[Piece, ...]:
    """One piece where everything is seen, else some queries at a time."""
    length = len(visible)
    if not length:
        return ()
    if bool(visible.all()):
        return (Piece(0, length, ((0, length),), None),)
    if bool((visible == visible[:1]).all()):
        steps = [(0, length)]
    else:
        steps = [(start, min(start + ROWS, length)) for start in range(0, length, ROWS)]
    masks: dict[bytes, Tensor] = {}
    made = []
    for start, stop in steps:
        rows = visible[start:stop]
        ranges = _runs(rows.any(0))
        if not ranges:
            continue
        kept = torch.cat([rows[:, low:high] for low, high in ranges], 1)
        mask = empty = None
        if not bool(kept.all()):
            key = bytes(kept.shape[1].to_bytes(8, "little")) + kept.contiguous().numpy().tobytes()
            mask = masks.setdefault(key, kept)
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
