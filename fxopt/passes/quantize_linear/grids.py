"""Quantisation grids: which numbers the codes stand for.

Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018); Frantar et al., "GPTQ"
(2022) for groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ir.ops.linear_nbits import group_count
from fxopt.passes.histogram import Histogram, least_divergence, least_squares, percentile
from fxopt.passes.stats import ValueStats


def quantize_weight(weight: Tensor, sums: int = 32) -> tuple[Tensor, Tensor]:
    """Codes int8 (shape of the weight) and scales float32 [out]: weight = codes * scales per output channel.

    Args:
        weight: float [out, in] or [out, in, *kernel].
        sums: bits in which kernels add products first. Where x86 lacks VNNI, vpmaddubsw adds the products of two
            neighbours in saturating 16 bits; with 16, two neighbouring codes of one sign add up to 128 at most, and
            255 * 128 fits. That is exact, and finer than codes of seven bits (-63 ... 63). With 7, codes have these
            seven bits: WebAssembly's relaxed dot product takes no others on one side.
    """
    rows = weight.float().reshape(weight.shape[0], -1)
    highest = 63 if sums == 7 else 127
    largest = rows.abs().amax(1)
    if sums == 16:
        largest = torch.maximum(largest, _largest_pair(weight.float()))  # rounding adds at most one to 127
    scales = largest / highest
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = torch.round(rows / scales[:, None]).clamp(-highest, highest).to(torch.int8)
    return codes.reshape(weight.shape).contiguous(), scales


def _largest_pair(weight: Tensor) -> Tensor:
    """The largest sum [out] of two neighbours of one sign, in every order in which kernels read a weight.

    Along the inputs of one position of the kernel, along all of them with the channel last, and with the channel first.
    """
    last = weight.movedim(1, -1)
    orders = (last, last.flatten(1), weight.flatten(1)) if weight.dim() > 2 else (weight,)
    return torch.stack([_pairs(order).flatten(1).amax(1) for order in orders]).amax(0)


def _pairs(rows: Tensor) -> Tensor:
    """The sums of elements 0 and 1, 2 and 3, ... of the last axis, of the positive and of the negative ones alone."""
    padded = torch.nn.functional.pad(rows, (0, rows.shape[-1] % 2))
    signed = torch.stack([padded.clamp(min=0), -padded.clamp(max=0)], 1)
    return signed.reshape(*signed.shape[:-1], -1, 2).sum(-1)


RANGES = ("minmax", "percentile", "entropy", "mse")


def static_range(seen: ValueStats, method: str = "minmax") -> tuple[float, int]:
    """Scale and zero point that map the observed range, zero included, onto 0 ... 255; clipped by `method`."""
    low, high = min(seen.minimum, 0.0), max(seen.maximum, 0.0)
    if method != "minmax" and seen.histogram is not None:
        low, high = _clipped(seen.histogram, low, high, method)
    return affine(low, high)


def _clipped(found: Histogram, low: float, high: float, method: str) -> tuple[float, float]:
    if method == "percentile":
        start, end = percentile(found)
        return max(low, min(start, 0.0)), min(high, max(end, 0.0))
    return (least_divergence if method == "entropy" else least_squares)(found, low, high)


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point that map low ... high, which hold 0, onto 0 ... 255."""
    scale = (high - low) / 255 or 1.0
    scale = float(torch.tensor(scale, dtype=torch.float32).item())
    return scale, max(0, min(255, round(-low / scale)))


@dataclass(frozen=True)
class Grid:
    """Codes 0 ... 2 ** bits - 1 of a weight [out, in] in groups of inputs: (code - zero) * scale."""

    bits: int
    group: int
    scales: Tensor  # float32 [out, groups]
    zeros: Tensor  # float32 [out, groups], whole numbers

    def codes(self, columns: Tensor, groups: Tensor) -> Tensor:
        """The nearest codes of weight columns [out, n] that belong to the groups [n]; float, whole numbers."""
        scales, zeros = self.scales[:, groups], self.zeros[:, groups]
        return (torch.round(columns / scales) + zeros).clamp(0, (1 << self.bits) - 1)

    def values(self, codes: Tensor, groups: Tensor) -> Tensor:
        """What codes [out, n] stand for."""
        return (codes - self.zeros[:, groups]) * self.scales[:, groups]

    def groups(self, columns: int) -> Tensor:
        """The group of each of the inputs."""
        return torch.arange(columns) // self.group


def group_grid(weight: Tensor, bits: int, group: int, symmetric: bool, search: bool = True) -> Grid:
    """The grid of each output and group of inputs of a weight [out, in].

    Symmetric: the zero is 2 ** (bits - 1) and the largest magnitude is a code's value. Asymmetric: smallest and largest
    value, zero included. With `search`, ranges shrunk to 80 ... 100 % are tried and the one of the smallest sum of
    |error| ** 2.4 is taken.
    """
    out, columns = weight.shape
    count = group_count(columns, group)
    padded = torch.nn.functional.pad(weight, (0, count * group - columns)).reshape(out, count, group)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    scales, zeros = _range(low, high, bits, symmetric)
    if search:
        scales, zeros = _shrunk(padded, low, high, scales, zeros, bits, symmetric)
    return Grid(bits, group, scales, zeros)


def _range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    if symmetric:
        half = 1 << (bits - 1)
        largest = torch.maximum(-low, high)
        negative = -low >= high  # the code -half stands for the larger side: its sign is that of the scale
        scales = torch.where(negative, largest / half, -largest / half)
        return torch.where(scales == 0, torch.ones_like(scales), scales), torch.full_like(scales, half)
    scales = (high - low) / ((1 << bits) - 1)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales, torch.round(-low / scales).clamp(0, (1 << bits) - 1)


def _shrunk(
    padded: Tensor, low: Tensor, high: Tensor, scales: Tensor, zeros: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    best = torch.full_like(scales, float("inf"))
    found, found_zeros = scales, zeros
    for percent in (100, 97, 94, 91, 88, 85, 82):
        tried, tried_zeros = _range(low * (percent / 100), high * (percent / 100), bits, symmetric)
        codes = (torch.round(padded / tried[..., None]) + tried_zeros[..., None]).clamp(0, (1 << bits) - 1)
        error = ((codes - tried_zeros[..., None]) * tried[..., None] - padded).abs().pow(2.4).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        found, found_zeros = torch.where(better, tried, found), torch.where(better, tried_zeros, found_zeros)
    return found, found_zeros
