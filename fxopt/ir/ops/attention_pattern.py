"""Attention in which every head sees keys by a pattern: everything, a diagonal, many diagonals, stripes, nothing.

A list of blocks per head may narrow that down further.

Source: the patterns of Chen et al., "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video
Diffusion Transformers" (2025), in one formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fxopt.errors import InvalidInput
from fxopt.ir.op import op
from fxopt.ir.target import Cost

NUMBERS = 5  # of a pattern
EVER = 1 << 28  # a period or width that no length reaches
BLOCK = 64  # of which `blocks` has lists
_PAIRS = 1 << 25  # of queries and keys that are multiplied at once
Pattern = tuple[int, int, int, int, int]  # slope, offset, period, width, sink


def dense() -> Pattern:
    """Every key."""
    return (0, 0, EVER, EVER, 0)


def diagonal(window: int, sink: int = 0) -> Pattern:
    """Keys at most `window` away, and the first `sink` ones."""
    return (1, -window, EVER, 2 * window + 1, sink)


def diagonals(window: int, period: int, sink: int = 0) -> Pattern:
    """Keys at most `window` away from the query's place in any frame of `period` tokens."""
    return (1, -window, period, 2 * window + 1, sink)


def stripes(first: int, width: int, period: int = EVER, sink: int = 0) -> Pattern:
    """`width` keys from `first` on, again every `period`, for all queries."""
    return (0, first, period, width, sink)


def nothing() -> Pattern:
    """No key: the head's output is zero."""
    return (0, 0, EVER, 0, 0)


def patterns_of(numbers: Sequence[int]) -> list[Pattern]:
    """The patterns of a flat list, one per head.

    Raises:
        InvalidInput: the list has no whole number of patterns, or one has no legal slope or period.
    """
    if len(numbers) % NUMBERS:
        raise InvalidInput(f"{len(numbers)} numbers are no patterns of {NUMBERS}")
    found: list[Pattern] = []
    for start in range(0, len(numbers), NUMBERS):
        slope, offset, period, width, sink = (int(number) for number in numbers[start : start + NUMBERS])
        if slope not in (0, 1) or period < 1:
            raise InvalidInput(
                f"pattern {start // NUMBERS} has slope {slope} and period {period}; expected 0 or 1, and >= 1"
            )
        found.append((slope, offset, period, width, sink))
    return found


def check_heads(patterns: Sequence[int], heads: int) -> None:
    """Every head must have a pattern.

    Raises:
        InvalidInput: there are more or fewer patterns, or they are none.
    """
    count = len(patterns_of(patterns))
    if count != heads:
        raise InvalidInput(f"{count} patterns for {heads} heads")


def check_blocks(blocks: Tensor, heads: int, length: int) -> None:
    """Every head must have its list of blocks.

    Raises:
        InvalidInput: the shape is another one.
    """
    count = -(-length // BLOCK)
    if blocks.shape != (heads, count, count):
        raise InvalidInput(f"blocks have shape {list(blocks.shape)}; expected {[heads, count, count]}")


def seen_by(pattern: Pattern, queries: Tensor, keys: Tensor) -> Tensor:
    """Which of the keys (numbers [m]) each of the queries (numbers [n]) sees, [n, m]."""
    slope, offset, period, width, sink = pattern
    distance = torch.remainder(keys[None] - slope * queries[:, None] - offset, period)
    return (distance < width) | (keys < sink)[None]


def blocks_seen(pattern: Pattern, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs of blocks see each other at all, and which surely whole: bool [blocks, blocks] each.

    Args:
        queries, keys: first and last number of each block, [blocks, 2]; in between, all occur.
    """
    slope, offset, period, width, sink = pattern
    low = keys[None, :, 0] - slope * queries[:, None, 1] - offset
    high = keys[None, :, 1] - slope * queries[:, None, 0] - offset
    inside = torch.remainder(low, period)
    spread = high - low
    some = (width > 0) & ((inside < width) | (inside + spread >= period)) | (keys[None, :, 0] < sink)
    whole = (inside + spread < width) | (width >= period) | (keys[None, :, 1] < sink)
    return some, whole & some


def seen(
    patterns: Sequence[int], length: int, blocks: Tensor | None = None, rows: tuple[int, int] | None = None
) -> Tensor:
    """Which keys each query of every head sees, bool [heads, length, length]; of queries `rows[0]` to `rows[1]` only.

    Raises:
        InvalidInput: the patterns are not legal, or `blocks` has another shape than they ask for.
    """
    every = patterns_of(patterns)
    places = torch.arange(length, device=None if blocks is None else blocks.device)
    queries = places if rows is None else places[rows[0] : rows[1]]
    found = torch.stack([seen_by(pattern, queries, places) for pattern in every])
    if blocks is None:
        return found
    check_blocks(blocks, len(every), length)
    return found & blocks[:, queries // BLOCK].repeat_interleave(BLOCK, 2)[:, :, :length]


@op
def attention_pattern(
    q: Tensor, k: Tensor, v: Tensor, patterns: Sequence[int], scale: float, blocks: Tensor | None = None
) -> Tensor:
    """softmax(q @ k.T * scale, over the keys that are seen) @ v, in the type of q; rows that see nothing give zeros.

    Args:
        q, k, v: float [batch, heads, length, width].
        patterns: slope, offset, period, width and sink of every head: query i sees key j where
            (j - slope * i - offset) mod period < width, or j < sink.
        blocks: bool [heads, n, n], n = length / 64 rounded up: and only where its block of 64 x 64 is true.
    """
    check_heads(patterns, q.shape[1])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, length = q.shape[1:3]
    whole = not isinstance(length, int) or length * length * heads <= _PAIRS
    step = max(1, length if whole else _PAIRS // (length * heads))
    parts = []
    for start in range(0, 1 if whole else length, step):
        rows = None if whole else (start, min(start + step, length))
        visible = seen(patterns, length, blocks, rows).to(q.device)
        queries = q if rows is None else q[:, :, start : start + step]
        scores = torch.matmul(queries.to(wide), k.to(wide).transpose(-1, -2)) * scale
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        parts.append(torch.matmul(weights, v.to(wide)).to(q.dtype))
    return parts[0] if whole else torch.cat(parts, 2)


@attention_pattern.cost
def _(
    q: Tensor, k: Tensor, v: Tensor, patterns: Sequence[int], scale: float, blocks: Tensor | None = None
) -> Cost:
    """The work in slices of dense attention.

    Bytes are those of operands, result and lists of blocks, and of what is copied to bring keys together or to renumber
    tokens. Masks are not in it: how long their slices take was measured with them. Lists of which only the shape is
    known leave nothing out.
    """
    from fxopt.ir.graph import hint
    from fxopt.ir.pattern_work import work_of

    batch, heads, length, width = (hint(dim) for dim in q.shape)
    known = None if blocks is None or blocks.is_meta or isinstance(blocks, FakeTensor) else blocks
    work = work_of(patterns, length, known)
    dense_macs = 2.0 * batch * heads * length * length * width
    moved = (4 * heads * length + 2 * work.copied) * batch * width * q.dtype.itemsize
    moved += 0 if blocks is None else blocks.numel()
    form = (
        ("op", "attention_pattern"), ("patterns", tuple(map(int, patterns))), ("lists", blocks is not None),
        ("sizes", (batch, heads, length, width)), ("work", work), ("dense_macs", dense_macs),
    )  # fmt: skip
    macs = dense_macs * work.share
    return Cost(2 * macs, moved, str(q.dtype).removeprefix("torch."), "attention.pattern", 1, macs, form=form)


@attention_pattern.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    every = [dense(), diagonal(5), diagonals(2, 16), stripes(3, 4, 12), nothing(), diagonal(9, sink=2)]
    for batch, length, width in ((2, 48, 8), (1, 37, 16), (0, 16, 8), (1, 1, 8)):
        q, k, v = (torch.randn(batch, len(every), length, width, generator=generator) for _ in range(3))
        yield q, k, v, [number for pattern in every for number in pattern], width**-0.5
    q, k, v = (torch.randn(1, 2, 130, 8, generator=generator) for _ in range(3))
    yield q, k, v, [*dense(), *diagonal(70)], 0.3, torch.rand(2, 3, 3, generator=generator) < 0.6
