"""Histograms of streamed values, and the ranges that clip them best.

Sources: Migacz, "8-bit inference with TensorRT" (2017) for the entropy; Krishnamoorthi (2018) for clipping in general.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

BINS = 2048
_STEPS = 64  # shrunk ranges that are tried


@dataclass
class Histogram:
    """Counts of BINS bins of equal width over low ... high; both grow with the values, whole bins being merged."""

    low: float = 0.0
    high: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def add(self, value: Tensor, low: float, high: float) -> None:
        """Count the elements of `value`, which lie in low ... high."""
        if self.high == self.low:
            self.low, self.high = min(low, 0.0), max(high, 0.0)
            if self.high == self.low:
                self.high = 1.0
        self._cover(low, high)
        counts = torch.histc(value.float().flatten(), BINS, self.low, self.high)
        self.counts += counts.double()

    def _cover(self, low: float, high: float) -> None:
        """Double the range to the side that is too short, merging pairs of bins."""
        while low < self.low or high > self.high:
            merged = self.counts.reshape(-1, 2).sum(1)
            width, self.counts = self.high - self.low, torch.zeros(BINS, dtype=torch.float64)
            if low < self.low:
                self.low -= width
                self.counts[BINS // 2 :] = merged
            else:
                self.high += width
                self.counts[: BINS // 2] = merged

    def centres(self) -> Tensor:
        """The middle of each bin."""
        width = (self.high - self.low) / BINS
        return self.low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)


def percentile(found: Histogram, share: float = 0.9999) -> tuple[float, float]:
    """The range that leaves (1 - share) / 2 of the values out at each end."""
    total = found.counts.cumsum(0) / found.counts.sum()
    tail = (1 - share) / 2
    width = (found.high - found.low) / BINS
    first = int((total > tail).nonzero()[0])
    last = int((total >= 1 - tail - 1e-15).nonzero()[0])
    return found.low + first * width, found.low + (last + 1) * width


def least_squares(found: Histogram, low: float, high: float, levels: int = 256) -> tuple[float, float]:
    """The range low * s ... high * s, s <= 1, of the smallest mean squared error after rounding to the levels."""
    centres, best = found.centres(), (float("inf"), low, high)
    for start, end in _shrunk(low, high):
        scale = (end - start) / (levels - 1) or 1.0
        rounded = (torch.round((centres - start) / scale).clamp(0, levels - 1)) * scale + start
        error = float(((rounded - centres).square() * found.counts).sum())
        if error < best[0]:
            best = (error, start, end)
    return best[1:]


def least_divergence(found: Histogram, low: float, high: float, levels: int = 256) -> tuple[float, float]:
    """The range of the smallest Kullback-Leibler divergence between the clipped values and their rounded form."""
    centres, best = found.centres(), (float("inf"), low, high)
    for start, end in _shrunk(low, high):
        inside = (centres >= start) & (centres <= end)
        if int(inside.sum()) < levels // 2:
            continue
        expected = found.counts * inside
        first, last = (int(index) for index in inside.nonzero().flatten()[[0, -1]])
        expected[first] += found.counts[:first].sum()
        expected[last] += found.counts[last + 1 :].sum()
        level = ((centres - start) / (end - start) * levels).floor().clamp(0, levels - 1).long()
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, found.counts * inside)
        filled = ((found.counts > 0) & inside).double()
        members = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
        spread = mass[level] / members[level].clamp(min=1) * filled
        error = _divergence(expected, spread)
        if error < best[0]:
            best = (error, start, end)
    return best[1:]


def _shrunk(low: float, high: float) -> list[tuple[float, float]]:
    shares = [1 - index / (_STEPS * 1.25) for index in range(_STEPS)]
    return [(low * share, high * share) for share in shares]


def _divergence(expected: Tensor, found: Tensor) -> float:
    p, q = expected / expected.sum(), found / found.sum().clamp(min=1e-300)
    used = p > 0
    return float((p[used] * (p[used] / q[used].clamp(min=1e-12)).log()).sum())
