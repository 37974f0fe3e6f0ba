"""Attention whose heads look where they are told to: queries and keys with planted patterns."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
_SHARP = 40.0  # the score of what is looked at; all else is near 0


def _bump(places: Tensor, around: int, sharp: float) -> Tensor:
    """Features whose products are `_SHARP` for equal places of a ring, and fall off within a few."""
    waves = torch.arange(1, WIDTH // 2 + 1)
    weights = torch.exp(-((waves * sharp) ** 2) / 2)
    angles = 2 * math.pi * places[:, None] * waves / around
    features = torch.cat([angles.cos(), angles.sin()], 1) * weights.sqrt().repeat(2)
    return features * math.sqrt(_SHARP / float(weights.sum()))


def planted(name: str, length: int, frame: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys [length, 64], whose products are scores of the mode `name`."""
    places, generator = torch.arange(length), torch.Generator().manual_seed(len(name))
    if name == "diagonal":
        return (_bump(places, 2 * length, 0.02),) * 2
    if name == "multi-diagonal":
        return (_bump(places % frame, 2 * frame, 0.05),) * 2
    if name == "stripe":
        keys = torch.zeros(length, WIDTH)
        keys[length // 2 : length // 2 + length // 32, 0] = _SHARP
        return F.one_hot(torch.zeros(length, dtype=torch.long), WIDTH).float(), keys
    if name == "sink+local":
        queries, keys = planted("diagonal", length)
        extra = torch.randn(WIDTH, generator=generator)
        extra /= extra.norm()
        queries = queries - (queries @ extra)[:, None] * extra + extra * math.sqrt(_SHARP)
        keys = keys - (keys @ extra)[:, None] * extra
        keys[:4] += extra * math.sqrt(_SHARP)
        return queries, keys
    if name == "blocks":
        count = length // 64
        codes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[:count] * _SHARP**0.5
        order = torch.randperm(count, generator=generator)
        return codes.repeat_interleave(64, 0), codes[order].repeat_interleave(64, 0)
    return (torch.randn(length, WIDTH, generator=generator) * 0.1,) * 2  # full, skip


class Planted(nn.Module):
    """A layer of a transformer whose heads have these modes on the inputs of `sample`; scores are q @ k.T."""

    def __init__(self, modes: list[str], length: int, frame: int = 0, order: tuple[int, ...] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        heads = len(modes)
        self.length, self.heads = length, heads
        self.shared = 16  # random channels of the input
        features = [torch.cat(planted(name, length, frame), 1) for name in modes]
        self.codes = torch.cat(features, 1)  # [length, heads * 128]
        size = self.codes.shape[1] + self.shared
        channels = heads * WIDTH
        self.q, self.k, self.v, self.o = (nn.Linear(size, channels) for _ in range(4))
        self.o = nn.Linear(channels, size)
        with torch.no_grad():
            for index, name in enumerate(modes):
                rows = slice(index * WIDTH, (index + 1) * WIDTH)
                for which, linear in enumerate((self.q, self.k)):
                    linear.weight[rows] = 0
                    linear.bias[rows] = 0
                    start = index * 2 * WIDTH + which * WIDTH
                    linear.weight[rows, start : start + WIDTH] = torch.eye(WIDTH)
                self.v.weight[rows] = 0
                self.v.weight[rows, -self.shared :] = torch.randn(WIDTH, self.shared)
                self.v.bias[rows] = 30.0 if name == "full" else 0.0
                if name == "full":
                    self.v.weight[rows] *= 20
                if name == "skip":
                    self.o.weight[:, rows] = 0

    def samples(self, count: int) -> list[Tensor]:
        """Inputs [1, length, size]."""
        generator = torch.Generator().manual_seed(3)
        return [
            torch.cat([self.codes, torch.randn(self.length, self.shared, generator=generator)], 1)[None]
            for _ in range(count)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, size]"""
        q, k, v = (
            linear(x).view(-1, self.length, self.heads, WIDTH).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        made = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        result: Tensor = self.o(made.transpose(1, 2).reshape(-1, self.length, self.heads * WIDTH)) + x * 0.01
        return result
