"""What is between the product of queries, keys and values and attention: norm, bias, rotary embedding, heads.

The product is that of the raw rows x: a root-mean-square norm only scales them, so it is applied to the sums. Partial
sums of a split product are added here.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["ROWS", "SPLITS"])
def qkv_rope(
    PARTS, X, BIAS, COS, SIN, OUT_Q, OUT_K, OUT_V, ROWS, SPLITS, K, stride_x, LENGTH, cos_b, cos_s, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROTATED: tl.constexpr,
    NORM: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, head): row = batch * LENGTH + position, head of HEADS queries, KV_HEADS keys, KV_HEADS values.

    PARTS float32 [SPLITS, ROWS, (HEADS + 2 * KV_HEADS) * D]; X [ROWS, K], the input, with NORM; COS, SIN [batch,
    LENGTH, D], batches cos_b and positions cos_s apart; outputs [batch, heads, LENGTH, D]. With ROTATED, y[d] = x[d] *
    cos[d] - x[d + D / 2] * sin[d], and + x[d - D / 2] in the second half. HALF is the power of two that holds D / 2.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    batch = row // LENGTH
    position = row % LENGTH
    d = tl.arange(0, HALF)
    here = d < D // 2
    n = head * D + d
    width = (HEADS + 2 * KV_HEADS) * D
    low = tl.zeros((HALF,), tl.float32)
    high = tl.zeros((HALF,), tl.float32)
    for split in range(SPLITS):
        at = PARTS + (split * ROWS + row) * width + n
        low += tl.load(at, mask=here, other=0.0)
        high += tl.load(at + D // 2, mask=here, other=0.0)
    if NORM:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            x = tl.load(X + row * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        low *= scale
        high *= scale
    if HAS_BIAS:
        low += tl.load(BIAS + n, mask=here, other=0.0).to(tl.float32)
        high += tl.load(BIAS + n + D // 2, mask=here, other=0.0).to(tl.float32)
    if ROTATED:
        if head < HEADS + KV_HEADS:
            at = batch * cos_b + position * cos_s + d
            cos_low = tl.load(COS + at, mask=here, other=0.0).to(tl.float32)
            cos_high = tl.load(COS + at + D // 2, mask=here, other=0.0).to(tl.float32)
            sin_low = tl.load(SIN + at, mask=here, other=0.0).to(tl.float32)
            sin_high = tl.load(SIN + at + D // 2, mask=here, other=0.0).to(tl.float32)
            turned = low * cos_low - high * sin_low
            high = high * cos_high + low * sin_high
            low = turned
    if head < HEADS:
        out = OUT_Q + ((batch * HEADS + head) * LENGTH + position) * D + d
    elif head < HEADS + KV_HEADS:
        out = OUT_K + ((batch * KV_HEADS + head - HEADS) * LENGTH + position) * D + d
    else:
        out = OUT_V + ((batch * KV_HEADS + head - HEADS - KV_HEADS) * LENGTH + position) * D + d
    tl.store(out, low.to(OUT_Q.dtype.element_ty), mask=here)
    tl.store(out + D // 2, high.to(OUT_Q.dtype.element_ty), mask=here)
