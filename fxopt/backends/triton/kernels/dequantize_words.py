"""Packed words to a whole weight in 16-bit floats, for products of so many rows that the weight hardly matters."""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.planes import group_row


@triton.jit
def dequantize_words(
    Q, S, Z, F, W, N, K, NP,
    GROUP: tl.constexpr, BITS: tl.constexpr, IS_SHIFT: tl.constexpr, HAS_OFFSET: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (tile, rows): W [N, K]; the other operands as those of `w4a16`."""
    PLANES: tl.constexpr = 32 // BITS
    TILE: tl.constexpr = 16 * PLANES
    t = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    c = tl.arange(0, 16)
    p = tl.load(Q + (t.to(tl.int64) * NP + n)[:, None] * 16 + c[None, :])
    factor = tl.load(F + n)[:, None]
    first = group_row(t, TILE, GROUP)
    for plane in tl.static_range(PLANES):
        code = (p >> (BITS * plane)) & ((1 << BITS) - 1)
        if IS_SHIFT:
            value = tl.where((code & 7) != 0, tl.exp2((code & 7).to(tl.float32) - 15.0), 0.0)
            value = tl.where((code & 8) != 0, -value, value)
        else:
            value = code.to(tl.float32) - (1 << (BITS - 1))
        row = (first + (plane * 16 // GROUP if GROUP > 0 else 0)) * NP + n if GROUP < TILE else first * NP + n
        value *= tl.load(S + row).to(tl.float32)[:, None]
        if HAS_OFFSET:
            value += tl.load(Z + row).to(tl.float32)[:, None]
        k = t * TILE + plane * 16 + c
        here = (n < N)[:, None] & (k < K)[None, :]
        tl.store(W + n.to(tl.int64)[:, None] * K + k[None, :], (value * factor).to(W.dtype.element_ty), mask=here)
