"""Which tile sizes, warps and stages a kernel is launched with: tables per chip and Triton version, made statically."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fxopt.backends.triton.chips import Chip
from fxopt.backends.triton.formats import Packed


@dataclass(frozen=True)
class Config:
    """How a linear is cut: BM rows of x, BN rows of the weight."""

    bm: int
    bn: int
    warps: int
    stages: int
    joined: bool = True


def linear_config(chip: Chip, packed: Packed, rows: Tensor) -> Config:
    count = len(rows)
    bm = 16 if count <= 16 else 32 if count <= 32 else 64
    if packed.layout.bits == 2:
        return Config(bm, 128, 8, 3, True)
    return Config(bm, 128, 4 if bm < 64 else 8, 4 if bm < 64 else 3, True)


def splits_for(chip: Chip, config: Config, rows: int, packed: Packed) -> int:
    programs = -(-rows // config.bm) * (packed.words.shape[1] // config.bn)
    tiles = -(-packed.columns // packed.layout.tile)
    wanted = max(1, 2 * chip.multiprocessors // programs)
    return max(1, min(wanted, tiles // 4, 8))
