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

BLOCK = 128  # columns whose updates are gathered before the rest of the weight is touched
DAMPING = 0.01  # of the mean of H's diagonal, added to it
_MOST_DAMPING = 1e3


@dataclass(frozen=True)
class Rounded:
    """Codes uint8 [out, in] and the damping that the factorisation needed."""

    codes: Tensor
    damping: float


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Round to nearest: codes uint8 [out, in]."""
    wide = Grid(grid.bits, grid.group, grid.scales.double(), grid.zeros.double())
    return wide.codes(weight.double(), grid.groups(weight.shape[1])).to(torch.uint8)


def gptq(weight: Tensor, moments: Tensor, grid: Grid, *, act_order: bool = True) -> Rounded:
    """Round `weight` [out, in] to the grid so that the error of x @ weight.T is small.

    Args:
        moments: H [in, in], proportional to the sum of x x.T over the calibration rows. Inputs that were always 0 are
            rounded to nearest.
        act_order: round the inputs with the largest moments first.
    """
    columns = weight.shape[1]
    hessian = moments.clone()
    dead = torch.diagonal(hessian) == 0
    hessian[dead, dead] = 1
    order = torch.arange(columns)
    if act_order:
        order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
        hessian = hessian[order][:, order]
    upper, damping = _factor(hessian)
    groups = grid.groups(columns)[order]
    grid = Grid(grid.bits, grid.group, grid.scales.to(hessian.dtype), grid.zeros.to(hessian.dtype))
    left = weight.to(hessian.dtype)[:, order].clone()
    codes = torch.empty_like(left)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty(weight.shape[0], end - start, dtype=left.dtype)
        for column in range(start, end):
            here = slice(column, column + 1)
            codes[:, here] = grid.codes(left[:, here], groups[here])
            error = (left[:, here] - grid.values(codes[:, here], groups[here])) / upper[column, column]
            left[:, column + 1 : end] -= error * upper[column, column + 1 : end]
            errors[:, column - start : column - start + 1] = error
        left[:, end:] -= errors @ upper[start:end, end:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return Rounded(result.to(torch.uint8), damping)


def _factor(hessian: Tensor) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the damped inverse; the damping is raised until the matrix is positive definite."""
    mean = float(torch.diagonal(hessian).mean())
    damping = DAMPING
    while True:
        damped = hessian.clone()
        torch.diagonal(damped).add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper, damping
        damping *= 10
        if damping > _MOST_DAMPING:
            raise ValueError("the second moments of the activations are not finite or not positive")
