"""What the kernels of linears with packed weights share: tiles of x, the product of eight planes, the store."""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.common import dot
from fxopt.backends.triton.kernels.epilogue import finished
from fxopt.backends.triton.kernels.planes import joined, scaled


@triton.jit
def input_tile(x, here, k, left, EVEN_K: tl.constexpr):
    """x transposed, [k, m]; `here` [1, m] says which rows there are, `left` how many inputs from the tile's first."""
    if EVEN_K:
        return tl.load(x, mask=here, other=0.0)
    else:
        return tl.load(x, mask=here & (k < left)[:, None], other=0.0)


@triton.jit
def eight_planes(
    acc, w0, w1, w2, w3, w4, w5, w6, w7, x, here, left, S, Z, row, NP,
    FIRST: tl.constexpr, GROUP: tl.constexpr, HAS_OFFSET: tl.constexpr, JOINED: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """acc [n, m] plus the product of 128 inputs, in planes that begin with plane FIRST of the tile.

    They are joined for one product (`x` points to 128 inputs), or multiplied one after the other (to 16 inputs). Either
    weights are scaled, or the sums of the 128 inputs are, or neither (GROUP 0); `row` is where scales and offsets of
    the tile's first group are.
    """
    SCALED: tl.constexpr = HAS_OFFSET or (GROUP > 0 and GROUP < 128)
    if SCALED:
        w0 = scaled(w0, S, Z, row, NP, FIRST, GROUP, HAS_OFFSET)
        w1 = scaled(w1, S, Z, row, NP, FIRST + 1, GROUP, HAS_OFFSET)
        w2 = scaled(w2, S, Z, row, NP, FIRST + 2, GROUP, HAS_OFFSET)
        w3 = scaled(w3, S, Z, row, NP, FIRST + 3, GROUP, HAS_OFFSET)
        w4 = scaled(w4, S, Z, row, NP, FIRST + 4, GROUP, HAS_OFFSET)
        w5 = scaled(w5, S, Z, row, NP, FIRST + 5, GROUP, HAS_OFFSET)
        w6 = scaled(w6, S, Z, row, NP, FIRST + 6, GROUP, HAS_OFFSET)
        w7 = scaled(w7, S, Z, row, NP, FIRST + 7, GROUP, HAS_OFFSET)
    part = acc if SCALED or GROUP == 0 else tl.zeros_like(acc)
    if JOINED:
        tile = input_tile(x, here, tl.arange(0, 128), left, EVEN_K)
        part = dot(joined(w0, w1, w2, w3, w4, w5, w6, w7), tile, part)
    else:
        c = tl.arange(0, 16)
        part = dot(w0, input_tile(x, here, c, left, EVEN_K), part)
        part = dot(w1, input_tile(x + 16, here, c + 16, left, EVEN_K), part)
        part = dot(w2, input_tile(x + 32, here, c + 32, left, EVEN_K), part)
        part = dot(w3, input_tile(x + 48, here, c + 48, left, EVEN_K), part)
        part = dot(w4, input_tile(x + 64, here, c + 64, left, EVEN_K), part)
        part = dot(w5, input_tile(x + 80, here, c + 80, left, EVEN_K), part)
        part = dot(w6, input_tile(x + 96, here, c + 96, left, EVEN_K), part)
        part = dot(w7, input_tile(x + 112, here, c + 112, left, EVEN_K), part)
    if SCALED or GROUP == 0:
        return part
    else:
        if GROUP == 128:
            row += (FIRST // 8) * NP
        return acc + part * tl.load(S + row).to(tl.float32)[:, None]


@triton.jit
def store_linear(
    acc, F, BIAS, OTHER, Y, m, n, M, N,
    IS_SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, COMBINE: tl.constexpr,
):  # fmt: skip
    """The sums [n, m] times their rows' factors into Y [M, N]; with IS_SPLIT, into partial sums [splits, M, N]."""
    y = tl.trans(acc * tl.load(F + n)[:, None])
    row = m.to(tl.int64)
    mask = (m < M)[:, None] & (n < N)[None, :]
    if IS_SPLIT:
        row += tl.program_id(2).to(tl.int64) * M
    else:
        y = finished(y, row, n, mask, BIAS, OTHER, N, HAS_BIAS, ACT, COMBINE)
    tl.store(Y + row[:, None] * N + n[None, :], y.to(Y.dtype.element_ty), mask=mask)
