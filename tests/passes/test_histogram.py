"""Histograms of streamed values: nothing is lost, and ranges are those of the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.passes.histogram import BINS, Histogram, least_divergence, least_squares, percentile


def histogram(*parts: torch.Tensor) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part, float(part.min()), float(part.max()))
    return made


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=6))
def test_every_value_is_counted_in_its_place(parts: list[tuple[float, float]]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(200, generator=generator) * scale + shift for shift, scale in parts]
    made = histogram(*values)
    assert made.counts.sum() == 200 * len(values)
    together = torch.cat(values).double()
    assert made.low <= together.min() and together.max() <= made.high
    width = (made.high - made.low) / BINS
    for threshold in (0.25, 0.5, 0.9):
        exact = together.quantile(threshold)
        below = made.counts[made.centres() <= exact + width].sum()
        assert below >= threshold * 200 * len(values) - 1


def test_percentile_leaves_outliers_out() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1)).clamp(-4, 4)
    low, high = percentile(histogram(torch.cat([values, torch.tensor([80.0])])), 0.999)
    assert -3.6 < low < -3.1 and 3.1 < high < 3.6
    assert percentile(histogram(values), 1.0) == pytest.approx((-4, 4), abs=0.01)


def test_the_least_squares_range_is_the_best_of_those_tried() -> None:
    """Found on the histogram; checked on the values themselves."""
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(2))
    values[0] = 60.0
    low, high = least_squares(histogram(values), float(values.min()), 60.0, levels=16)

    def error(high: float, low: float) -> float:
        scale = (high - low) / 15
        return float(((((values - low) / scale).round().clamp(0, 15) * scale + low) - values).square().mean())

    assert high < 20
    best = min(error(60.0 * share, float(values.min()) * share) for share in torch.linspace(0.05, 1, 200).tolist())
    assert error(high, low) <= 1.5 * best


def test_without_outliers_nothing_is_cut() -> None:
    values = torch.rand(50_000, generator=torch.Generator().manual_seed(3))
    for choose in (least_squares, least_divergence):
        low, high = choose(histogram(values), 0.0, 1.0)
        assert low == 0.0 and high > 0.97


def test_divergence_prefers_the_bulk() -> None:
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(4))
    values[0] = 100.0
    _, high = least_divergence(histogram(values), float(values.min()), 100.0)
    assert 3 < high < 90


def test_constant_values() -> None:
    for constant in (0.0, 3.0, -2.0):
        made = histogram(torch.full((10,), constant))
        assert made.counts.sum() == 10
        low, high = percentile(made)
        assert low <= constant <= high
