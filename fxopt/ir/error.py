"""How far outputs are from the original's: noise to signal, relative L2, cosine."""

from __future__ import annotations

from collections.abc import Sequence
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


def output_error(reference: Sequence[Sequence[torch.Tensor]], results: Sequence[Sequence[torch.Tensor]]) -> OutputError:
    """The error of `results` [sample][output] against `reference`; integer outputs are compared as numbers too."""
    worst = OutputError(0.0, 0.0, 1.0, len(reference))
    if not reference:
        return worst
    for index in range(len(reference[0])):
        pairs = [(r[index], v[index]) for r, v in zip(reference, results, strict=True)]
        if not isinstance(pairs[0][0], torch.Tensor):
            continue
        found = _one_output([(a.double(), b.double()) for a, b in pairs], len(reference))
        if found.noise_to_signal > worst.noise_to_signal:
            worst = found
    return worst


def _one_output(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], samples: int) -> OutputError:
    if any(a.shape != b.shape for a, b in pairs):
        return OutputError(float("inf"), float("inf"), 0.0, samples)
    same_infinite = [(torch.nan_to_num(a), torch.where(a == b, torch.nan_to_num(a), b)) for a, b in pairs]
    noise = sum((b - a).square().sum().item() for a, b in same_infinite)
    if noise != noise:
        return OutputError(float("inf"), float("inf"), 0.0, samples)
    energy = sum(a.square().sum().item() for a, _ in same_infinite)
    count = sum(a.numel() for a, _ in same_infinite)
    mean = sum(a.sum().item() for a, _ in same_infinite) / max(1, count)
    signal = energy - count * mean * mean
    cosines = [torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in same_infinite]
    if noise == 0.0:
        return OutputError(0.0, 0.0, 1.0, samples)
    return OutputError(
        noise / signal if signal > 0.0 else float("inf"),
        (noise / energy) ** 0.5 if energy > 0.0 else float("inf"),
        sum(cosines) / len(cosines),
        samples,
    )
