"""GPTQ: round a weight column by column and push each column's error onto those that are not rounded yet.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022),
equations 2 and 3 and algorithm 1, with group grids from the original weight ("static groups"), so that an order of the
columns by activation needs no index at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.passes.quantize_linear.grids import Grid
from fxopt.passes.second_moments import sweep, upper_factor


@dataclass(frozen=True)
class Rounded:
    """Codes uint8 [out, in] and the damping that the factorisation needed."""

    codes: Tensor
    damping: float


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Round to nearest: codes uint8 [out, in]."""
    wide = Grid(grid.bits, grid.group, grid.scales.double(), grid.zeros.double())
    return wide.codes(weight.double(), grid.groups(weight.shape[1])).to(torch.uint8)


def gptq(
    weight: Tensor, moments: Tensor, grid: Grid, *, act_order: bool = True, kept: Tensor | None = None
) -> Rounded:
    """Round `weight` [out, in] to the grid so that the error of x @ weight.T is small.

    Args:
        moments: H [in, in], proportional to the sum of x x.T over the calibration rows. Inputs that were always 0 are
            rounded to nearest.
        act_order: round the inputs with the largest moments first.
        kept: bool [out, in]; the other weights become exactly 0, and those after them make up for it.
    """
    columns = weight.shape[1]
    hessian = moments.clone()
    dead = torch.diagonal(hessian) == 0
    hessian[dead, dead] = 1
    order = torch.arange(columns)
    if act_order:
        order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
        hessian = hessian[order][:, order]
    upper, damping = upper_factor(hessian)
    groups = grid.groups(columns)[order]
    grid = Grid(grid.bits, grid.group, grid.scales.to(hessian.dtype), grid.zeros.to(hessian.dtype))
    left = weight.to(hessian.dtype)[:, order].clone()
    codes = torch.empty_like(weight, dtype=torch.uint8)

    def rounded(column: int, values: Tensor) -> Tensor:
        group = groups[column : column + 1]
        if kept is not None:
            values = torch.where(kept[:, order[column]], values, 0.0)
        found = grid.codes(values[:, None], group)
        codes[:, order[column]] = found[:, 0].to(torch.uint8)
        return grid.values(found, group)[:, 0]

    sweep(left, upper, rounded)
    return Rounded(codes, damping)
