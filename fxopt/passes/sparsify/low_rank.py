"""Two thin matrices beside a pruned weight that take back the most of its error.

The error of the outputs is tr(D H D.T) with D the change of the weight and H the second moments of the inputs. Of all
matrices of rank r, P D is the best to subtract from D, where P projects onto the r leading eigenvectors of D H D.T
(Eckart, Young and Mirsky's theorem for D H**(1/2)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.passes.second_moments import damped_factor
from fxopt.passes.sparsify.methods import checked_diagonal


def low_rank(weight: Tensor, sparse: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`left` [out, rank] and `right` [rank, in], of the type of the weight: sparse + left @ right is near the weight.

    Args:
        weight: float [out, in].
        sparse: what it became [out, in].
        moments: H [in, in], proportional to the sum of x x.T over the calibration rows.
        rank: 0: both are empty.

    Raises:
        ValueError: the rank exceeds that of the weight, or the moments do not fit or are not finite.
    """
    out, columns = weight.shape
    if not 0 <= rank <= min(out, columns):
        raise ValueError(f"rank {rank} of a weight {out}x{columns}: expected 0 to {min(out, columns)}")
    kind = checked_diagonal(weight, moments).dtype
    hessian = moments.to(kind)
    change = weight.to(kind) - sparse.to(kind)
    if out <= columns:
        left = _leading(change @ hessian @ change.t(), rank)
    else:  # the same by the smaller of the two Gram matrices
        root = change @ damped_factor(hessian)[0]
        left = torch.linalg.qr(root @ _leading(root.t() @ root, rank)).Q
    return left.to(weight.dtype), (left.t() @ change).to(weight.dtype)


def _leading(symmetric: Tensor, rank: int) -> Tensor:
    """The eigenvectors [n, rank] of the largest eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors[:, len(vectors) - rank :]
