"""Attention in which every head sees keys by a pattern of its own; blocks that nobody sees are not touched.

Key j is seen by query i iff (j - SLOPE * i - OFFSET) mod PERIOD < WIDTH, or j < SINK. The host lists the blocks of keys
per head and block of queries, those that are seen whole first; only in the others is the pattern evaluated. Tokens are
renumbered by a head's FRAMES and FRAME (length of a frame): token u is number u % FRAMES * FRAME + u // FRAMES, so that
tokens at one place of all frames are neighbours and many diagonals become one band.
"""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.common import dot

_NOTHING = tl.constexpr(-1.0e30)
_PARAMETERS = tl.constexpr(8)  # of a head


@triton.jit
def token_of(u, FRAMES, FRAME, RENUMBERED: tl.constexpr):
    """The token of number u."""
    return u % FRAMES * FRAME + u // FRAMES if RENUMBERED else u


@triton.jit
def _block(
    acc, total, largest, q, keys, values, ti, u, S, SLOPE, OFFSET, PERIOD, WIDTH, SINK, FRAMES, FRAME, k_s, v_s, scale,
    D: tl.constexpr, D2: tl.constexpr, PARTIAL: tl.constexpr, RENUMBERED: tl.constexpr,
):  # fmt: skip
    """One block of keys, numbers u."""
    d = tl.arange(0, D2)
    inside = u < S
    tj = token_of(u, FRAMES, FRAME, RENUMBERED)
    at = tj.to(tl.int64)
    kt = keys + at[None, :] * k_s + d[:, None]
    if PARTIAL:
        k = tl.load(kt, mask=inside[None, :] & (d < D)[:, None], other=0.0)
    elif D == D2:
        k = tl.load(kt)
    else:
        k = tl.load(kt, mask=(d < D)[:, None], other=0.0)
    scores = dot(q, k, tl.zeros((q.shape[0], u.shape[0]), tl.float32)) * scale
    if PARTIAL:
        distance = (tj[None, :] - SLOPE * ti[:, None] - OFFSET) % PERIOD
        distance = tl.where(distance < 0, distance + PERIOD, distance)  # % truncates
        seen = ((distance < WIDTH) | (tj < SINK)[None, :]) & inside[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, 1))
    p = tl.exp2(scores - now[:, None])
    shrink = tl.exp2(largest - now)
    total = total * shrink + tl.sum(p, 1)
    vt = values + at[:, None] * v_s + d[None, :]
    if PARTIAL:
        v = tl.load(vt, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    elif D == D2:
        v = tl.load(vt)
    else:
        v = tl.load(vt, mask=(d < D)[None, :], other=0.0)
    return dot(p.to(v.dtype), v, acc * shrink[:, None]), total, now


@triton.jit
def pattern_attention(
    Q, K, V, Y, WORK, FIRST, PARTIAL, COLUMNS, PATTERNS, S, BLOCKS, HEADS, scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    D: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, RENUMBERED: tl.constexpr,
):  # fmt: skip
    """Program (work, batch): head * BLOCKS + block of queries, longest work first.

    Q, K, V [batch, HEADS, S, D]; Y the same, contiguous. `scale` includes log2(e). FIRST, PARTIAL int32 [work + 1]:
    where in COLUMNS the blocks of keys begin, and those of them that are seen in part; PATTERNS int32 [HEADS, 8].
    """
    work = tl.load(WORK + tl.program_id(0))
    batch = tl.program_id(1).to(tl.int64)
    h = work // BLOCKS
    head = h.to(tl.int64)
    pattern = PATTERNS + h * _PARAMETERS
    SLOPE = tl.load(pattern)
    OFFSET = tl.load(pattern + 1)
    PERIOD = tl.load(pattern + 2)
    WIDTH = tl.load(pattern + 3)
    SINK = tl.load(pattern + 4)
    FRAMES = tl.load(pattern + 5)
    FRAME = tl.load(pattern + 6)
    first = tl.load(FIRST + work)
    middle = tl.load(PARTIAL + work)
    last = tl.load(FIRST + work + 1)
    i = work % BLOCKS * BQ + tl.arange(0, BQ)
    d = tl.arange(0, D2)
    there = (i < S)[:, None] & (d < D)[None, :]
    ti = token_of(i, FRAMES, FRAME, RENUMBERED)
    q = tl.load(Q + batch * q_b + head * q_h + ti.to(tl.int64)[:, None] * q_s + d[None, :], mask=there, other=0.0)
    keys = K + batch * k_b + head * k_h
    values = V + batch * v_b + head * v_h
    acc = tl.zeros((BQ, D2), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    largest = tl.full((BQ,), _NOTHING, tl.float32)
    for t in range(first, middle):
        u = tl.load(COLUMNS + t) * BK + tl.arange(0, BK)
        acc, total, largest = _block(
            acc, total, largest, q, keys, values, ti, u, S, SLOPE, OFFSET, PERIOD, WIDTH, SINK, FRAMES, FRAME,
            k_s, v_s, scale, D, D2, False, RENUMBERED,
        )  # fmt: skip
    for t in range(middle, last):
        u = tl.load(COLUMNS + t) * BK + tl.arange(0, BK)
        acc, total, largest = _block(
            acc, total, largest, q, keys, values, ti, u, S, SLOPE, OFFSET, PERIOD, WIDTH, SINK, FRAMES, FRAME,
            k_s, v_s, scale, D, D2, True, RENUMBERED,
        )  # fmt: skip
    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # rows that see nothing are zero
    out = ((batch * HEADS + head) * S + ti.to(tl.int64)) * D
    tl.store(Y + out[:, None] + d[None, :], y.to(Y.dtype.element_ty), mask=there)
