"""Patterns of zeros: their texts, their masks, and what breaks them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import InvalidOption
from fxopt.ir.sparsity import Mark, Pattern

TEXTS = ("2:4", "1:4", "4:8", "8x2:4", "4x1:2", "1x1", "4x1", "8x1", "16x1")


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(text: str) -> None:
    assert str(Pattern.parse(text)) == text


def test_unstructured_is_blocks_of_one() -> None:
    assert Pattern.parse("unstructured") == Pattern.parse("1x1")


@pytest.mark.parametrize("text", ["", "4:2", "0:4", "4:4", "1x4", "0x1", "2:4x8", "24"])
def test_bad_texts(text: str) -> None:
    with pytest.raises(InvalidOption, match="sparsity pattern"):
        Pattern.parse(text)


@settings(max_examples=60, deadline=None)
@given(text=st.sampled_from(TEXTS), groups=st.integers(1, 3), runs=st.integers(1, 4), seed=st.integers(0, 99))
def test_masks_keep_the_best_and_hold_the_pattern(text: str, groups: int, runs: int, seed: int) -> None:
    pattern = Pattern.parse(text)
    generator = torch.Generator().manual_seed(seed)
    shape = groups * pattern.outputs, runs * pattern.of
    scores = torch.rand(shape, generator=generator) + 0.1
    mask = pattern.mask(scores, 0.5)
    weight = scores * mask
    assert pattern.violation(weight) == ""
    count = pattern.shared(scores).numel()
    expected = pattern.sparsity if pattern.is_counted else round(count * 0.5) / count
    assert pattern.zeros(weight) == pytest.approx(expected)
    totals = pattern.shared(scores)
    kept, lost = pattern.occupied(weight), ~pattern.occupied(weight)
    runs_of = totals.unflatten(1, (-1, pattern.of)) if pattern.is_counted else totals.reshape(1, 1, -1)
    kept_of = kept.reshape(runs_of.shape)
    lowest = runs_of.masked_fill(~kept_of, torch.inf).amin(-1)
    highest = runs_of.masked_fill(~lost.reshape(runs_of.shape), -torch.inf).amax(-1)
    assert bool((lowest >= highest).all())


def test_per_row_every_group_of_outputs_loses_as_much() -> None:
    pattern = Pattern.parse("4x1")
    scores = torch.rand(8, 10, generator=torch.Generator().manual_seed(0))
    scores[:4] += 10
    assert pattern.occupied(pattern.mask(scores, 0.3, per_row=True) * scores).sum(1).tolist() == [7, 7]
    assert pattern.occupied(pattern.mask(scores, 0.3) * scores).sum(1).tolist() == [10, 4]


def test_what_breaks_a_pattern_is_named() -> None:
    weight = torch.zeros(16, 8)
    weight[9, 4:7] = 1
    assert Pattern.parse("2:4").violation(weight) == ("output 9, inputs 4 to 7: 3 of 4 are not zero, 2:4 allows 2")
    weight[9, 6] = 0
    weight[10, 6] = 1
    assert Pattern.parse("2:4").violation(weight) == ""
    assert Pattern.parse("8x2:4").violation(weight).startswith("outputs 8 to 15, inputs 4 to 7: 3 of 4")
    assert "do not divide" in Pattern.parse("2:4").violation(torch.zeros(2, 6))
    assert Pattern.parse("4x1").refusal(6, 3) == "6 outputs do not divide by the 4 of the pattern 4x1"


def test_marks_of_blocks_remember_how_many_were_zero() -> None:
    weight = torch.ones(8, 4)
    weight[:4, :3] = 0
    mark = Mark.of(Pattern.parse("4x1"), weight)
    assert mark.zeros == pytest.approx(3 / 8)
    assert mark.violation(weight * 2) == ""
    weight[0, 0] = 1
    assert mark.violation(weight) == "25.0% of its 4x1 blocks are zero, 37.5% were"
