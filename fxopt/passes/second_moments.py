"""What GPTQ and SparseGPT share: the inverse of the inputs' second moments, and the sweep over a weight's columns.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022),
algorithm 1; Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023),
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128  # columns whose updates are gathered before the rest of the weight is touched
DAMPING = 0.01  # of the mean of H's diagonal, added to it
_MOST_DAMPING = 1e3
_RUN = 16

Look = Callable[[slice, Tensor], None]  # columns, and their values [out, n] with all updates so far
Replace = Callable[[int, Tensor], Tensor]  # a column, and its values [out] -> what they become


def damped_factor(hessian: Tensor) -> tuple[Tensor, float]:
    """The lower Cholesky factor of the damped H [in, in], and the damping: `DAMPING`, or more until there is one.

    Raises:
        ValueError: no damping helps.
    """
    mean = float(torch.diagonal(hessian).mean())
    damping = DAMPING
    while damping <= _MOST_DAMPING:
        damped = hessian.clone()
        torch.diagonal(damped).add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and bool(torch.isfinite(lower).all()):
            return lower, damping
        damping *= 10
    raise ValueError("the second moments of the activations are not finite or not positive")


def upper_factor(hessian: Tensor) -> tuple[Tensor, float]:
    """U, upper triangular, with U.T U the inverse of the damped H [in, in]; and the damping.

    Read from the last input to the first, the Cholesky factorisation is H = R R.T with R upper triangular: U is the
    inverse of R, and that of H is never computed.

    Raises:
        ValueError: no damping helps.
    """
    lower, damping = damped_factor(hessian.flip(0, 1))
    upper = lower.flip(0, 1)
    del lower
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True), damping


def sweep(
    weight: Tensor,
    upper: Tensor,
    replace: Replace,
    *,
    block: int = BLOCK,
    run: int = _RUN,
    before_block: Look | None = None,
    before_run: Look | None = None,
) -> None:
    """Replace the columns of `weight` [out, in] one by one, in place; the error of each goes to the columns after it.

    Args:
        upper: of `upper_factor`, in the type of the weight.
        replace: called for every column in order.
        block: columns whose errors reach the rest of the weight together.
        run: columns of a block whose errors reach the rest of the block together.
        before_block: called before the first column of each block.
        before_run: called before the first column of each run.
    """
    columns = weight.shape[1]
    for start in range(0, columns, block):
        end = min(start + block, columns)
        here = weight[:, start:end].t().contiguous()  # one row per column: what the loops touch is adjacent
        errors = torch.empty_like(here)
        if before_block is not None:
            before_block(slice(start, end), here.t())
        for first in range(start, end, run):
            last = min(first + run, end)
            part = here[first - start : last - start]
            part -= upper[start:first, first:last].t() @ errors[: first - start]
            if before_run is not None:
                before_run(slice(first, last), part.t())
            for column in range(first, last):
                old = part[column - first]
                new = replace(column, old)
                error = (old - new) / upper[column, column]
                part[column - first + 1 :] -= upper[column, column + 1 : last, None] * error
                errors[column - start] = error
                part[column - first] = new
        weight[:, start:end] = here.t()
        weight[:, end:] -= errors.t() @ upper[start:end, end:]
