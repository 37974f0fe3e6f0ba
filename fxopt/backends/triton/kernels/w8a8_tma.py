"""The same as `w8a8` with tensor descriptors: on sm_90 and later the hardware copies whole tiles (TMA)."""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.int8_parts import store_int8, tile_of


@triton.jit(do_not_specialize=["M"])
def w8a8_tma(
    A, B, SA, ZERO, SB, SUMS, BIAS, OTHER, Y, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PER_ROW: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """A, B: descriptors of int8 [M, K] and [N, K] with blocks [BM, BK] and [BN, BK]; what is outside reads as zero."""
    pm, pn = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    acc = tl.zeros((BM, BN), tl.int32)
    for start in range(0, K, BK):
        x = A.load([pm * BM, start])
        w = B.load([pn * BN, start])
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    m = pm * BM + tl.arange(0, BM)
    n = pn * BN + tl.arange(0, BN)
    store_int8(
        acc, SA, ZERO, SB, SUMS, BIAS, OTHER, Y, m, n, M, N, PER_ROW, HAS_ZERO, HAS_BIAS, ACT, COMBINE
    )  # fmt: skip
