"""How far outputs are from the original's: noise to signal, relative L2, cosine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OutputError:
    """Error of the worst float output over all samples (dimensionless)."""

    noise_to_signal: float  # |y - y0|^2 / |y0 - mean(y0)|^2
    relative_l2: float  # |y - y0| / |y0|
    cosine: float  # mean over samples of the cosine between y and y0
    samples: int


def noise_to_signal(reference: torch.Tensor, value: torch.Tensor) -> float:
    """|value - reference|^2 / |reference - mean(reference)|^2 in float64; 0 for two equal constants."""
    reference, value = reference.double(), value.double()
    noise = (value - reference).square().sum().item()
    signal = (reference - reference.mean()).square().sum().item() if reference.numel() else 0.0
    if noise == 0.0:
        return 0.0
    return noise / signal if signal > 0.0 else float("inf")


def output_error(reference: Sequence[Sequence[torch.Tensor]], results: Iterable[Sequence[torch.Tensor]]) -> OutputError:
    """The error of `results` [sample][output] against `reference`; integer outputs are compared as numbers too.

    Results are taken one sample after the other, so they need not all be there at once.
    """
    sums: dict[int, _Sums] = {}
    for before, after in zip(reference, results, strict=True):
        for index, value in enumerate(before):
            if isinstance(value, torch.Tensor):
                sums.setdefault(index, _Sums()).add(value.double(), after[index].double())
    worst = OutputError(0.0, 0.0, 1.0, len(reference))
    for found in sums.values():
        error = found.error(len(reference))
        if error.noise_to_signal > worst.noise_to_signal:
            worst = error
    return worst


@dataclass
class _Sums:
    """What the error of one output is computed from, summed over samples; equal infinities are no noise."""

    noise: float = 0.0
    energy: float = 0.0
    total: float = 0.0
    count: int = 0
    cosine: float = 0.0
    is_comparable: bool = True

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """One sample: the reference and the result in float64."""
        if a.shape != b.shape:
            self.is_comparable = False
            return
        b = torch.where(a == b, torch.nan_to_num(a), b)
        a = torch.nan_to_num(a)
        self.noise += (b - a).square().sum().item()
        self.energy += a.square().sum().item()
        self.total += a.sum().item()
        self.count += a.numel()
        self.cosine += torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()

    def error(self, samples: int) -> OutputError:
        """The error over all of them."""
        if not self.is_comparable or math.isnan(self.noise):
            return OutputError(float("inf"), float("inf"), 0.0, samples)
        if self.noise == 0.0:
            return OutputError(0.0, 0.0, 1.0, samples)
        mean = self.total / max(1, self.count)
        signal = self.energy - self.count * mean * mean
        return OutputError(
            self.noise / signal if signal > 0.0 else float("inf"),
            (self.noise / self.energy) ** 0.5 if self.energy > 0.0 else float("inf"),
            self.cosine / samples,
            samples,
        )
