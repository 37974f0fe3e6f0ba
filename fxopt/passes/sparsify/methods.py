"""Which weights become zero, and what that changes in the others: magnitude, Wanda, SparseGPT.

H is 2 / n times the sum of x x.T over the n calibration rows of a linear's input (`SequentialRun.moments`); only its
proportions matter. Sums are in float64 up to `WIDE_COLUMNS` inputs, in float32 above.
Sources: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023), of Wanda; Frantar and
Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ir.sparsity import Pattern
from fxopt.passes.quantize_linear.grids import Grid
from fxopt.passes.second_moments import BLOCK, DAMPING, sweep, upper_factor
from fxopt.passes.sequential import WIDE_COLUMNS

_NAMED = 8  # inputs that a note lists


@dataclass(frozen=True)
class Pruned:
    """A weight [out, in] of the type it had, with zeros where the pattern has them.

    Attributes:
        notes: what the user should know: inputs that were always 0, a raised damping.
        codes: uint8 [out, in], where it was rounded to a grid: `weight` is what they stand for.
    """

    weight: Tensor
    notes: tuple[str, ...] = ()
    codes: Tensor | None = None


def magnitude(weight: Tensor, pattern: Pattern, sparsity: float) -> Pruned:
    """Remove the weights of the smallest squares; those of a block are added.

    Args:
        weight: float [out, in].
        sparsity: share of blocks to remove from the whole weight; N:M has its own.

    Raises:
        ValueError: the weight does not fit the pattern or is not finite, or the sparsity is not in 0 ... 1.
    """
    _check(weight, pattern, sparsity)
    scores = weight.to(_wide_type(weight), copy=True).square_()
    return Pruned(_masked(weight, pattern.mask(scores, sparsity)))


def wanda(weight: Tensor, moments: Tensor, pattern: Pattern, sparsity: float) -> Pruned:
    """Remove the weights that contribute least to the outputs: of the smallest w**2 H_jj; those of a block are added.

    Args:
        weight: float [out, in].
        moments: H [in, in], or its diagonal [in].
        sparsity: share of blocks to remove, of every output (or outputs that share blocks) alike; N:M has its own.

    Raises:
        ValueError: as of `magnitude`, or the moments do not fit, are not finite or are negative.
    """
    _check(weight, pattern, sparsity)
    diagonal = checked_diagonal(weight, moments)
    scores = weight.to(diagonal.dtype, copy=True).square_().mul_(diagonal)
    return Pruned(_masked(weight, pattern.mask(scores, sparsity, per_row=True)), _dead_note(diagonal == 0))


def sparsegpt(
    weight: Tensor, moments: Tensor, pattern: Pattern, sparsity: float, *, grid: Grid | None = None
) -> Pruned:
    """Remove weights column by column and let those after them make up for it: of the smallest w**2 / U_jj**2.

    U is the upper Cholesky factor of the inverse of the damped H. N:M is chosen at every M-th column, from weights that
    already make up for all columns before; blocks and unstructured zeros are chosen at every 128th column, from the
    next 128 columns as a whole. Inputs that were always 0 lose their weights first.

    Args:
        weight: float [out, in].
        moments: H [in, in].
        sparsity: share of blocks to remove, of every 128 columns alike; N:M has its own.
        grid: what is kept is rounded to it as GPTQ does, in the same sweep; `sparsegpt_rounded` makes one that fits.

    Raises:
        ValueError: as of `wanda`, or no damping makes H positive definite.
    """
    _check(weight, pattern, sparsity)
    dead = checked_diagonal(weight, moments) == 0
    hessian = moments.to(_wide_type(weight), copy=True)
    hessian[dead, dead] = 1
    upper, damping = upper_factor(hessian)
    del hessian
    notes = _dead_note(dead)
    if damping > DAMPING:
        raised = f"damping raised to {damping:g} of their mean"
        notes += (f"the second moments of its input are not positive definite; {raised}",)
    importance = torch.where(dead, 0.0, torch.diagonal(upper).square().reciprocal())
    kept = torch.ones_like(weight, dtype=torch.bool)
    codes = None if grid is None else torch.empty_like(weight, dtype=torch.uint8)

    def choose(columns: slice, values: Tensor) -> None:
        kept[:, columns] = pattern.mask(values.square().mul_(importance[columns]), sparsity)

    def replace(column: int, values: Tensor) -> Tensor:
        values = torch.where(kept[:, column], values, 0.0)
        if grid is None or codes is None:
            return values.to(weight.dtype).to(values.dtype)  # what this rounds off is made up for, too
        group = torch.tensor([column // grid.group])
        found = grid.codes(values[:, None], group)
        codes[:, column] = found[:, 0].to(torch.uint8)
        return grid.values(found, group)[:, 0].to(values.dtype)

    left = weight.to(upper.dtype, copy=True)
    if pattern.is_counted:
        sweep(left, upper, replace, block=max(BLOCK // pattern.of, 1) * pattern.of, run=pattern.of, before_run=choose)
    else:
        sweep(left, upper, replace, before_block=choose)
    return Pruned(left.to(weight.dtype), notes, codes)


def sparsegpt_rounded(
    weight: Tensor, moments: Tensor, pattern: Pattern, sparsity: float, make: Callable[[Tensor], Grid]
) -> tuple[Pruned, Grid]:
    """SparseGPT jointly with rounding to a grid, and the grid.

    It is made of what a sweep without rounding keeps, which is larger than the weight because it stands for more.

    Args:
        make: a weight [out, in] -> its grid, such as `group_grid`.

    Raises:
        ValueError: as of `sparsegpt`.
    """
    grid = make(sparsegpt(weight, moments, pattern, sparsity).weight)
    return sparsegpt(weight, moments, pattern, sparsity, grid=grid), grid


def checked_diagonal(weight: Tensor, moments: Tensor) -> Tensor:
    """The diagonal [in] of the second moments of a weight's inputs.

    Args:
        moments: [in, in], or the diagonal.

    Raises:
        ValueError: they do not fit the weight, are not finite, or their diagonal is negative.
    """
    columns = weight.shape[1]
    if moments.shape not in ((columns,), (columns, columns)):
        raise ValueError(f"second moments {list(moments.shape)} do not fit a weight of {columns} inputs")
    if not bool(torch.isfinite(moments).all()):
        raise ValueError("the second moments of its input are infinite or NaN")
    diagonal = moments if moments.dim() == 1 else torch.diagonal(moments)
    if bool((diagonal < 0).any()):
        raise ValueError("the second moments of its input have a negative diagonal")
    return diagonal.to(_wide_type(weight))


def _check(weight: Tensor, pattern: Pattern, sparsity: float) -> None:
    refusal = pattern.refusal(*weight.shape)
    if refusal:
        raise ValueError(refusal)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity {sparsity:g}: expected a share from 0 to 1")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight has infinite or NaN values")


def _wide_type(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.shape[1] <= WIDE_COLUMNS else torch.float32


def _masked(weight: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, weight, torch.zeros((), dtype=weight.dtype))


def _dead_note(dead: Tensor) -> tuple[str, ...]:
    """Which inputs were 0 in every calibration row."""
    which = dead.nonzero().flatten().tolist()
    if not which:
        return ()
    named = ", ".join(map(str, which[:_NAMED])) + (", ..." if len(which) > _NAMED else "")
    count = "1 input was" if len(which) == 1 else f"{len(which)} inputs were"
    return (f"{count} 0 in every calibration row ({named}); what they are multiplied with is removed first",)
