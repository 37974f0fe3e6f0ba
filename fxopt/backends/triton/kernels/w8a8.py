"""y = (codes of x @ codes of the weight.T) * scales, int8 with int32 sums."""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.int8_parts import store_int8, tile_of


@triton.jit(do_not_specialize=["M"])
def w8a8(
    A, B, SA, ZERO, SB, SUMS, BIAS, OTHER, Y, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr,
    PER_ROW: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """A int8 [M, K], B int8 [N, K], Y [M, N]; SWAP: the weight is the left operand, for few rows."""
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    m = pm * BM + tl.arange(0, BM)
    n = pn * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows behind the last are read as the first ones: no mask in the loop.
    rows = tl.where(m < M, m, 0).to(tl.int64)
    columns = tl.where(n < N, n, 0).to(tl.int64)
    if SWAP:
        a = A + rows[None, :] * K + k[:, None]
        b = B + columns[:, None] * K + k[None, :]
        acc = tl.zeros((BN, BM), tl.int32)
    else:
        a = A + rows[:, None] * K + k[None, :]
        b = B + columns[None, :] * K + k[:, None]
        acc = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        if EVEN_K:
            x = tl.load(a)
            w = tl.load(b)
        else:
            left = k < K - start
            x = tl.load(a, mask=left[:, None] if SWAP else left[None, :], other=0)
            w = tl.load(b, mask=left[None, :] if SWAP else left[:, None], other=0)
        if SWAP:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        a += BK
        b += BK
    sums = tl.trans(acc) if SWAP else acc
    store_int8(
        sums, SA, ZERO, SB, SUMS, BIAS, OTHER, Y, m, n, M, N, PER_ROW, HAS_ZERO, HAS_BIAS, ACT, COMBINE
    )  # fmt: skip
