"""y = x @ dequantised(words).T for weights of 4 bits, x in 16-bit floats: the weight is the left operand.

So on sm_90 weights go from registers into the tensor cores without a detour through shared memory, and on sm_80 a batch
of one fills an eighth of an instruction, not a sixteenth.
"""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.linear_parts import eight_planes, store_linear
from fxopt.backends.triton.kernels.planes import group_row, planes4


@triton.jit(do_not_specialize=["M", "TILES"])
def w4a16(
    X, Q, S, Z, F, BIAS, OTHER, Y, M, N, K, NP, stride_x, TILES,
    GROUP: tl.constexpr, IS_SHIFT: tl.constexpr, HAS_OFFSET: tl.constexpr, JOINED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, EVEN_K: tl.constexpr, IS_SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """Program (m, n, split): rows n * BN ... of the weight, rows m * BM ... of x, TILES tiles of 128 inputs.

    X [M, K], rows `stride_x` apart; Q, S, Z, F as in `formats.Packed`, NP rows, GROUP inputs per scale (0: all);
    Y [M, N], or, with IS_SPLIT, float32 [splits, M, N] without epilogue.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * TILES
    last = tl.minimum(first + TILES, tl.cdiv(K, 128))
    words = Q + (first.to(tl.int64) * NP + n)[:, None] * 16 + tl.arange(0, 16)[None, :]
    here = (m < M)[None, :]
    x = X + m.to(tl.int64)[None, :] * stride_x + (first * 128 + tl.arange(0, 128 if JOINED else 16))[:, None]
    row = group_row(first, 128, GROUP) * NP + n
    acc = tl.zeros((BN, BM), tl.float32)
    for t in range(first, last):
        p = tl.load(words, eviction_policy="evict_first")
        w0, w1, w2, w3, w4, w5, w6, w7 = planes4(p, IS_SHIFT, X.dtype.element_ty)
        left = K - t * 128
        acc = eight_planes(
            acc, w0, w1, w2, w3, w4, w5, w6, w7, x, here, left, S, Z, row, NP,
            0, GROUP, HAS_OFFSET, JOINED, EVEN_K,
        )  # fmt: skip
        words += NP * 16
        x += 128
        if GROUP > 128:
            row = group_row(t + 1, 128, GROUP) * NP + n
        elif GROUP > 0:
            row += 128 // GROUP * NP
    store_linear(acc, F, BIAS, OTHER, Y, m, n, M, N, IS_SPLIT, HAS_BIAS, ACT, COMBINE)
