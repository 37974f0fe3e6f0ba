"""What the kernels of 8-bit products share: the order of programs, and the sums to floats."""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.epilogue import finished


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """The tile of a program: GROUP row tiles run through all columns together, so that operands stay in the cache."""
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = pid % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def store_int8(
    acc, SA, ZERO, SB, SUMS, BIAS, OTHER, Y, m, n, M, N,
    PER_ROW: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """Sums int32 [m, n] times the scales of x (SA [M], or one number) and of the weight (SB [N]), with the epilogue.

    HAS_ZERO: codes of x are moved by 128 and a zero point (ZERO, a number); the row sums of the weight make up for it.
    """
    mask = (m < M)[:, None] & (n < N)[None, :]
    if HAS_ZERO:
        moved = (128.0 - tl.load(ZERO)).to(tl.int32)
        acc += moved * tl.load(SUMS + n, mask=n < N, other=0)[None, :]
    if PER_ROW:
        scale = tl.load(SA + m, mask=m < M, other=0.0)[:, None]
    else:
        scale = tl.load(SA)
    y = acc.to(tl.float32) * (tl.load(SB + n, mask=n < N, other=0.0)[None, :] * scale)
    row = m.to(tl.int64)
    y = finished(y, row, n, mask, BIAS, OTHER, N, HAS_BIAS, ACT, COMBINE)
    tl.store(Y + row[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=mask)
