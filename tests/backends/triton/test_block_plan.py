"""The lists of blocks cover what is seen, nothing twice, and whole blocks are whole."""

from __future__ import annotations

import pytest
import torch

from fxopt.backends.triton.block_plan import block_plan, may_renumber
from fxopt.errors import InvalidInput
from fxopt.ir.ops.attention_pattern import (
    Pattern,
    attention_pattern,
    blocks_seen,
    dense,
    diagonal,
    diagonals,
    nothing,
    patterns_of,
    seen_by,
    stripes,
)  # fmt: skip
from fxopt.ir.pattern_work import Tile, work_of

PATTERNS = [
    dense(), nothing(), diagonal(0), diagonal(9), diagonal(5, sink=3), diagonals(2, 16), diagonals(1, 7), stripes(3, 4),
    stripes(0, 2, 5), stripes(60, 30), (1, 20, 31, 4, 0), (0, -3, 12, 5, 1),
]  # fmt: skip


def tokens(length: int, frames: int, frame: int) -> torch.Tensor:
    """The token of every number."""
    u = torch.arange(length)
    return u % frames * frame + u // frames


@pytest.mark.parametrize("length", [1, 16, 64, 77])
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (32, 8), (8, 32)])
def test_plans_cover_exactly_what_is_seen(length: int, queries: int, keys: int) -> None:
    numbers = tuple(number for pattern in PATTERNS for number in pattern)
    plan = block_plan(numbers, length, queries, keys)
    assert sorted(plan.work.tolist()) == list(range(len(PATTERNS) * plan.blocks))
    work = (plan.first[1:] - plan.first[:-1])[plan.work.long()]
    assert bool((work[1:] <= work[:-1]).all())
    for head, pattern in enumerate(PATTERNS):
        slope, _, _, _, _, frames, frame, _ = plan.parameters[head].tolist()
        assert slope == pattern[0]
        order = tokens(length, frames, frame)
        assert sorted(order.tolist()) == list(range(length))
        seen = seen_by(pattern, order, order)
        for block in range(plan.blocks):
            row = head * plan.blocks + block
            first, middle, last = int(plan.first[row]), int(plan.partial[row]), int(plan.first[row + 1])
            listed, whole = plan.columns[first:last].tolist(), plan.columns[first:middle].tolist()
            assert len(set(listed)) == len(listed)
            rows = seen[block * queries : (block + 1) * queries]
            for column in range(-(-length // keys)):
                part = rows[:, column * keys : (column + 1) * keys]
                assert not bool(part.any()) or column in listed
                assert column not in whole or (bool(part.all()) and part.shape[1] == keys)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_intervals_find_exactly_the_blocks(pattern: Pattern) -> None:
    starts = torch.arange(0, 90, 10)
    blocks = torch.stack([starts, starts + 9], 1)
    some, whole = blocks_seen(pattern, blocks, blocks)
    seen = seen_by(pattern, torch.arange(90), torch.arange(90)).reshape(9, 10, 9, 10)
    assert torch.equal(some, seen.any(3).any(1))
    assert not bool((whole & ~seen.all(3).all(1)).any())


def test_renumbering_joins_diagonals() -> None:
    """Many diagonals touch every block; with neighbours at one place of all frames, a band is left."""
    pattern, length = diagonals(2, 64), 512
    assert may_renumber(pattern, length) and not may_renumber(pattern, 500) and not may_renumber(diagonal(3), length)
    plan = block_plan(pattern, length, 64, 64)
    assert plan.parameters[0, 5:7].tolist() == [8, 64]
    assert plan.density == pytest.approx(0.375, abs=0.05)


def test_no_heads() -> None:
    plan = block_plan((), 64, 16, 16)
    assert plan.density == 0.0 and not len(plan.columns)
    assert work_of((), 64, tile=Tile(64, 64)).share == work_of(dense(), 0, tile=Tile(64, 64)).share == 0.0


def test_wrong_patterns() -> None:
    with pytest.raises(InvalidInput, match="7 numbers are no patterns of 5"):
        patterns_of(range(7))
    with pytest.raises(InvalidInput, match="pattern 1 has slope 2 and period 4"):
        patterns_of([*dense(), 2, 0, 4, 1, 0])
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(InvalidInput, match="1 patterns for 2 heads"):
        attention_pattern(q, q, q, list(dense()), 1.0)


def test_the_operator_is_masked_attention() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, len(PATTERNS), 40, 8) for _ in range(3))
    numbers = [number for pattern in PATTERNS for number in pattern]
    places = torch.arange(40)
    mask = torch.stack([seen_by(pattern, places, places) for pattern in PATTERNS])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
    expected = expected * mask.any(-1, keepdim=True)
    torch.testing.assert_close(attention_pattern(q, k, v, numbers, 0.3), expected)


@pytest.mark.parametrize(("frames", "height", "width", "window"), [(16, 16, 16, 32), (8, 16, 16, 64), (16, 16, 32, 48)])
def test_renumbered_diagonals_look_at_few_blocks_more_than_they_see(
    frames: int, height: int, width: int, window: int
) -> None:
    length, frame = frames * height * width, height * width
    elements = (2 * window + 1) / frame
    found = block_plan(diagonals(window, frame), length, 64, 64)
    assert elements <= found.density <= 1.2 * elements
    assert found.density == work_of(diagonals(window, frame), length, tile=Tile(64, 64)).share
