"""ARMOR: a sparse core between two block-diagonal matrices, fitted together.

The weight is approximated by A S B, S sparse N:M, A and B of blocks d x d on the diagonal. The loss weighs each input
by the second moment h of its activations: sum (W' - A S B)**2 h, over sum W'**2 h, of the normalised weight W'. Steps
of Adam on A, B and S alternate with exact solutions of one group of M per pair of blocks.
Source: Liu et al., "ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization" (2025); Liu et
al., "NoWag: A Unified Framework for Shape Preserving Compression of Large Language Models" (2025), of the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb, isfinite

import torch
from torch import Tensor

from fxopt.ir.sparsity import Pattern
from fxopt.passes.sparsify.methods import checked_diagonal

_LEAST_NORM = 1e-5
_MOST_SUPPORTS = 100
_RIDGE = 1e-9
_PATIENCE = 100  # steps without a gain of _GAIN after which it ends
_GAIN = 1e-6


@dataclass(frozen=True)
class Wrapped:
    """A weight as left @ core @ right, where left and right have their blocks on the diagonal.

    Attributes:
        left: [out / d, d, d].
        core: [out, in], sparse.
        right: [in / d, d, d].
        losses: of the start and after each step; the factors are those of the smallest.
    """

    left: Tensor
    core: Tensor
    right: Tensor
    losses: tuple[float, ...]

    def dense(self) -> Tensor:
        """The weight [out, in] that the factors stand for."""
        return _product(self.left, self.core, self.right)


def armor(
    weight: Tensor,
    moments: Tensor,
    pattern: Pattern,
    *,
    block: int,
    steps: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> Wrapped:
    """The three factors in the type of the weight; in its loss the result is never worse than a plain mask.

    Args:
        weight: float [out, in].
        moments: the diagonal [in] of the second moments of the inputs, or the matrix, of which no more is used.
        pattern: N:M.
        block: d.
        steps: at most; it ends when the loss no longer falls.
        seed: of the choice of the groups that are solved exactly.

    Raises:
        ValueError: the shapes do not divide, the pattern has no few supports, or something is not finite.
    """
    h = checked_diagonal(weight, moments)
    _check(weight, pattern, block)
    mean = float(h.mean())
    h = h / mean if mean > 0 else torch.ones_like(h)
    target, rows, columns = normalised(weight.to(h.dtype))
    with torch.enable_grad():
        (left, core, right), losses = _fit(target, h, pattern, block, steps, learning_rate, seed)
    return Wrapped(
        (left * rows.reshape(-1, block, 1)).to(weight.dtype),
        core.to(weight.dtype),
        (right * columns.reshape(-1, 1, block)).to(weight.dtype),
        losses,
    )


def normalised(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight [out, in] divided by the norms of its columns, then of its rows; and the norms [out] and [in]."""
    columns = weight.norm(dim=0) + _LEAST_NORM
    weight = weight / columns
    rows = weight.norm(dim=1) + _LEAST_NORM
    return weight / rows[:, None], rows, columns


def _check(weight: Tensor, pattern: Pattern, block: int) -> None:
    refusal = pattern.refusal(*weight.shape)
    if refusal:
        raise ValueError(refusal)
    if not pattern.is_counted or pattern.outputs > 1 or comb(pattern.of, pattern.kept) > _MOST_SUPPORTS:
        raise ValueError(f"the sparse core of ARMOR is N:M with at most {_MOST_SUPPORTS} choices, not {pattern}")
    if block < 1 or any(size % block for size in weight.shape) or block % pattern.of:
        raise ValueError(
            f"blocks of {block}: expected a divisor of {weight.shape[0]} outputs and {weight.shape[1]} inputs that is "
            f"a multiple of {pattern.of}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight has infinite or NaN values")


_Factors = tuple[Tensor, Tensor, Tensor]


def _fit(
    target: Tensor, h: Tensor, pattern: Pattern, d: int, steps: int, learning_rate: float, seed: int
) -> tuple[_Factors, tuple[float, ...]]:
    """The factors of the smallest loss, and all losses."""
    generator = torch.Generator().manual_seed(seed)
    kept = pattern.mask(target.square() * h, 0)
    left, right = (torch.eye(d, dtype=target.dtype).repeat(size // d, 1, 1) for size in target.shape)
    core = target * kept
    factors = best = (left, core, right)
    adam = torch.optim.Adam([factor.requires_grad_() for factor in factors], lr=learning_rate)
    weights = h / (target.square() * h).sum().clamp(min=torch.finfo(h.dtype).tiny)
    losses: list[float] = []
    least, gained, gained_at = float("inf"), float("inf"), 0
    for step in range(steps + 1):
        loss = (_product(left, core, right) - target).square().mul(weights).sum()
        losses.append(loss.item())
        if losses[-1] < least:
            least, best = losses[-1], (left.detach().clone(), core.detach().clone(), right.detach().clone())
        if least < gained * (1 - _GAIN):
            gained, gained_at = least, step
        if step == steps or step - gained_at >= _PATIENCE or not isfinite(losses[-1]):
            break
        adam.zero_grad()
        torch.autograd.backward(loss)
        assert core.grad is not None
        choice = _sampled(core.grad, d, pattern.of, generator)
        core.grad.mul_(kept)
        adam.step()
        with torch.no_grad():
            core.mul_(kept)
            solve_groups(left, core, right, kept, target, h, pattern, choice)
    return best, tuple(losses)


def _product(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """The block-diagonal left [p, d, d] times core [p d, q d] times the block-diagonal right [q, d, d]."""
    p, d, _ = left.shape
    rows = (left @ core.reshape(p, d, -1)).reshape(p * d, -1, d)
    return (rows.transpose(0, 1) @ right).transpose(0, 1).reshape(core.shape)


def _sampled(gradient: Tensor, d: int, size: int, generator: torch.Generator) -> Tensor:
    """For each block d x d one of its d * d / size groups, int64 [p, q]: by the L1 norm of the gradient in it."""
    p, q = (length // d for length in gradient.shape)
    norms = gradient.abs().reshape(p, d, q, d // size, size).sum(-1).transpose(1, 2).reshape(p * q, -1)
    norms += torch.finfo(norms.dtype).tiny
    return torch.multinomial(norms, 1, generator=generator).reshape(p, q)


def solve_groups(
    left: Tensor,
    core: Tensor,
    right: Tensor,
    kept: Tensor,
    target: Tensor,
    h: Tensor,
    pattern: Pattern,
    choice: Tensor,
) -> None:
    """Give one group of M of every block of the core its best support and values, in place; all else is fixed.

    A group's part of a block of the product is a s B: a column of left's block, the group's values s, and M rows B of
    right's block. With R the error of the block without it, both weighted by the roots of h, the best values of
    a support are -(B B.T)**-1 B R.T a / |a|**2.

    Args:
        kept: bool [out, in], where the core may be non-zero; changed with it.
        target: [out, in], which the product should be.
        h: weights [in] of the columns.
        choice: of each block [p, q], which of its groups, row by row.
    """
    d, size = left.shape[-1], pattern.of
    p, q = len(left), len(right)
    i, j = torch.arange(p)[:, None], torch.arange(q)
    row, group = choice // (d // size), choice % (d // size)
    root = h.sqrt()
    a = left[i, :, row]
    b = right[j[:, None], group[..., None] * size + torch.arange(size)] * root.reshape(q, 1, d)
    place = i, row, j, group
    values, supports = (stored.view(p, d, q, d // size, size) for stored in (core, kept))
    old = values[place]
    error = ((_product(left, core, right) - target) * root).reshape(p, d, q, d)
    norm = a.square().sum(-1)
    pull = torch.einsum("pqd,pdqe->pqe", a, error) - norm[..., None] * torch.einsum("pqm,pqme->pqe", old, b)
    f, gram = torch.einsum("pqme,pqe->pqm", b, pull), b @ b.mT

    choices = torch.tensor(list(combinations(range(size), pattern.kept)))
    some_f, some_gram = f[..., choices], gram[..., choices[:, :, None], choices[:, None, :]]
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(h.dtype).tiny
    damped = some_gram + ridge[..., None, None, None] * torch.eye(pattern.kept, dtype=h.dtype)
    solved = -torch.linalg.solve_ex(damped, some_f)[0] / norm[..., None, None]
    losses = _change(solved, some_f, some_gram, norm[..., None]).nan_to_num(nan=float("inf"))
    least, which = losses.min(-1)
    better = least < _change(old, f, gram, norm)
    support = torch.zeros_like(old, dtype=torch.bool).scatter_(-1, choices[which], True)
    new = torch.zeros_like(old).scatter_(-1, choices[which], solved[i, j, which])
    values[place] = torch.where(better[..., None], new, old)
    supports[place] = torch.where(better[..., None], support, supports[place])


def _change(s: Tensor, f: Tensor, gram: Tensor, norm: Tensor) -> Tensor:
    """What the values s [..., n] of a group add to the loss: 2 s f + |a|**2 s G s."""
    return 2 * (s * f).sum(-1) + norm * torch.einsum("...n,...nm,...m->...", s, gram, s)
