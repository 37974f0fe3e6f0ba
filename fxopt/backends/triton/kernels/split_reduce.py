"""The sum of the partial results of a split product, in a fixed order, with the epilogue."""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.epilogue import finished


@triton.jit(do_not_specialize=["M", "SPLITS"])
def split_reduce(
    PARTS, BIAS, OTHER, Y, M, N, SPLITS,
    BN: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """Program (m, n): PARTS float32 [SPLITS, M, N] -> Y [M, N], BN columns of a row."""
    m = tl.program_id(0).to(tl.int64) + tl.zeros((1,), tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (n < N)[None, :]
    y = tl.zeros((1, BN), tl.float32)
    for split in range(SPLITS):
        y += tl.load(PARTS + (split * M + m)[:, None] * N + n[None, :], mask=mask, other=0.0)
    y = finished(y, m, n, mask, BIAS, OTHER, N, HAS_BIAS, ACT, COMBINE)
    tl.store(Y + m[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=mask)
