"""y = x @ dequantised(words).T for weights of 2 bits, x in 16-bit floats: as `w4a16`, with tiles of 256 inputs."""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.linear_parts import eight_planes, store_linear
from fxopt.backends.triton.kernels.planes import group_row, planes2


@triton.jit(do_not_specialize=["M", "TILES"])
def w2a16(
    X, Q, S, Z, F, BIAS, OTHER, Y, M, N, K, NP, stride_x, TILES,
    GROUP: tl.constexpr, HAS_OFFSET: tl.constexpr, JOINED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    EVEN_K: tl.constexpr, IS_SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """Program (m, n, split); operands as those of `w4a16`. A tile is multiplied in two halves of 128 inputs."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * TILES
    last = tl.minimum(first + TILES, tl.cdiv(K, 256))
    words = Q + (first.to(tl.int64) * NP + n)[:, None] * 16 + tl.arange(0, 16)[None, :]
    here = (m < M)[None, :]
    x = X + m.to(tl.int64)[None, :] * stride_x + (first * 256 + tl.arange(0, 128 if JOINED else 16))[:, None]
    row = group_row(first, 256, GROUP) * NP + n
    acc = tl.zeros((BN, BM), tl.float32)
    for t in range(first, last):
        p = tl.load(words, eviction_policy="evict_first")
        w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, wa, wb, wc, wd, we, wf = planes2(p, X.dtype.element_ty)
        left = K - t * 256
        acc = eight_planes(
            acc, w0, w1, w2, w3, w4, w5, w6, w7, x, here, left, S, Z, row, NP,
            0, GROUP, HAS_OFFSET, JOINED, EVEN_K,
        )  # fmt: skip
        acc = eight_planes(
            acc, w8, w9, wa, wb, wc, wd, we, wf, x + 128, here, left - 128, S, Z, row, NP,
            8, GROUP, HAS_OFFSET, JOINED, EVEN_K,
        )  # fmt: skip
        words += NP * 16
        x += 256
        if GROUP > 256:
            row = group_row(t + 1, 256, GROUP) * NP + n
        elif GROUP > 0:
            row += 256 // GROUP * NP
    store_linear(acc, F, BIAS, OTHER, Y, m, n, M, N, IS_SPLIT, HAS_BIAS, ACT, COMBINE)
