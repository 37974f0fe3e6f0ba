"""Attention of few queries over many keys: the keys are split over programs, each with its own maximum and sum.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.common import dot

_NOTHING = tl.constexpr(-1.0e30)


@triton.jit(do_not_specialize=["KEYS", "PER_SPLIT"])
def decode_attention(
    Q, K, V, MASK, OUT, STATS, KEYS, PER_SPLIT, ROWS, KV_HEADS, QUERIES, scale,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, m_b, m_h, m_q, m_s,
    D: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Program (batch * kv head, split): ROWS = queries * heads per kv head rows, keys split * PER_SPLIT ...

    Q [batch, heads, QUERIES, D], K and V [batch, KV_HEADS, KEYS, D]. `scale` includes log2(e). MASKED: 0 no mask, 1 a
    boolean one (true: seen), 2 one that is added; its strides may be zero. OUT float32 [splits, batch * KV_HEADS, ROWS,
    D], STATS float32 [2, splits, batch * KV_HEADS, ROWS]: the sums, not divided yet, their maxima and weights.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    batch = (pair // KV_HEADS).to(tl.int64)
    kv = (pair % KV_HEADS).to(tl.int64)
    r = tl.arange(0, BQ)
    d = tl.arange(0, D2)
    head = kv * (ROWS // QUERIES) + r // QUERIES
    query = r % QUERIES
    there = (r < ROWS)[:, None]
    width = (d < D)[None, :]
    q = tl.load(
        Q + batch * q_b + head[:, None] * q_h + query[:, None] * q_s + d[None, :], mask=there & width, other=0.0
    )  # fmt: skip
    keys = K + batch * k_b + kv * k_h
    values = V + batch * v_b + kv * v_h
    acc = tl.zeros((BQ, D2), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    largest = tl.full((BQ,), _NOTHING, tl.float32)
    last = tl.minimum(KEYS, (split + 1) * PER_SPLIT)
    for start in range(split * PER_SPLIT, last, BK):
        j = start + tl.arange(0, BK)
        inside = j < last
        at = j.to(tl.int64)
        kt = tl.load(keys + at[None, :] * k_s + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        scores = dot(q, kt, tl.zeros((BQ, BK), tl.float32)) * scale
        seen = there & inside[None, :]
        if MASKED:
            mask = MASK + batch * m_b + head[:, None] * m_h + query[:, None] * m_q + at[None, :] * m_s
            if MASKED == 1:
                seen = seen & (tl.load(mask, mask=seen, other=0) != 0)
            else:
                scores += tl.load(mask, mask=seen, other=0.0).to(tl.float32) * 1.4426950408889634
        scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(values + at[:, None] * v_s + d[None, :], mask=inside[:, None] & width, other=0.0)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None])
        largest = now
    row = (split * tl.num_programs(0) + pair).to(tl.int64) * ROWS + r
    tl.store(OUT + row[:, None] * D + d[None, :], acc, mask=there & width)
    statistics = tl.num_programs(1) * tl.num_programs(0) * ROWS
    tl.store(STATS + row, largest, mask=r < ROWS)
    tl.store(STATS + statistics + row, total, mask=r < ROWS)
