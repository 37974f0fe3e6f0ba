"""From a weight matrix to packed codes of few bits: round to nearest, or GPTQ where second moments are given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxopt.ir.graph import label
from fxopt.ir.masks import mark_of
from fxopt.ir.ops.linear_nbits import group_count
from fxopt.ir.packing import pack, packed_width
from fxopt.passes.quantize_linear.gptq import Rounded, gptq, nearest
from fxopt.passes.quantize_linear.grids import Grid, group_grid
from fxopt.passes.second_moments import DAMPING
from fxopt.passes.stats import Stats

_SLAB = 1 << 21  # elements
_MIDDLE = 128.0  # the unsigned code of 0


@dataclass(frozen=True)
class Rounding:
    """Codes of so many bits, in groups of inputs."""

    bits: int
    group: int
    symmetric: bool
    act_order: bool

    def packed(self, weight: Tensor, moments: Tensor | None, node: fx.Node, stats: Stats) -> tuple[Tensor, ...]:
        """Codes, scales and zeros (uint8) of a weight [out, in]; a few outputs at a time, which are independent.

        Args:
            moments: H [in, in] for GPTQ; None: round to nearest.
            node: whose weight it is, for notes.
        """
        grids = [group_grid(weight[rows], self.bits, self.group, self.symmetric) for rows in slabs(weight)]
        scales, zeros = (torch.cat([getattr(grid, name) for grid in grids]) for name in ("scales", "zeros"))
        if moments is not None:
            codes = self._gptq(weight, moments, Grid(self.bits, self.group, scales, zeros), node, stats)
            packed = pack(codes, self.bits)
        else:
            pairs = zip(slabs(weight), grids, strict=True)
            packed = torch.cat([pack(nearest(weight[rows], grid), self.bits) for rows, grid in pairs])
        return packed, scales, zeros.to(torch.uint8)

    def _gptq(self, weight: Tensor, moments: Tensor, grid: Grid, node: fx.Node, stats: Stats) -> Tensor:
        found = gptq(weight, moments, grid, act_order=self.act_order, kept=_kept(weight, node))
        return _noted(found, node, stats)

    def nearest(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """What the weight [out, in] becomes when it is rounded to nearest, as float32: some outputs at a time."""
        for rows in slabs(weight):
            part = weight[rows]
            grid = group_grid(part, self.bits, self.group, self.symmetric, search=False)
            yield rows, grid.values(nearest(part, grid).float(), grid.groups(part.shape[1]))

    def storage(self, out: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zeros of a weight [out, columns] without their data."""
        groups = group_count(columns, self.group)
        packed = torch.empty(out, packed_width(columns, self.bits), dtype=torch.uint8, device="meta")
        scales = torch.empty(out, groups, device="meta")
        return packed, scales, None if self.symmetric else torch.empty_like(scales, dtype=torch.uint8)

    def stored_bytes(self, out: int, columns: int) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(part.nbytes for part in self.storage(out, columns) if part is not None)


def eight_bit_codes(weight: Tensor, scales: Tensor, moments: Tensor, node: fx.Node, stats: Stats) -> Tensor:
    """GPTQ's codes int8 in -127 ... 127 of a weight [out, in], on the grid of `quantize_weight`.

    Args:
        scales: [out].
        moments: H [groups, in, in]; the outputs belong to the groups in order.
    """
    parts = []
    for rows, units, hessian in zip(weight.chunk(len(moments)), scales.chunk(len(moments)), moments, strict=True):
        grid = Grid(8, weight.shape[1], units[:, None], torch.full_like(units[:, None], _MIDDLE))
        codes = _noted(gptq(rows, hessian, grid, kept=_kept(rows, node)), node, stats)
        parts.append((codes.to(torch.int16) - int(_MIDDLE)).clamp(-127, 127).to(torch.int8))
    return torch.cat(parts)


def _kept(weight: Tensor, node: fx.Node) -> Tensor | None:
    """Which weights may be other than 0; None: all, where no zeros were promised."""
    return None if mark_of(node) is None else weight != 0


def _noted(found: Rounded, node: fx.Node, stats: Stats) -> Tensor:
    """The codes; a raised damping is said."""
    if found.damping > DAMPING:
        stats.notes.append(
            f"GPTQ at {label(node)!r}: the second moments of its input are not positive definite;"
            f" damping raised to {found.damping:g} of their mean"
        )
    return found.codes


def slabs(weight: Tensor) -> list[slice]:
    """The outputs of a weight [out, in], as many at a time as keep temporary values small."""
    step = max(1, _SLAB // max(1, weight.shape[1]))
    return [slice(start, start + step) for start in range(0, len(weight), step)]
