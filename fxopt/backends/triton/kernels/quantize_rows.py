"""Activations to int8, a row per program: with a scale of the row's own, or a scale and zero point that are given."""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.common import round_half_even


@triton.jit
def quantize_rows(
    X, Q, SCALE, ZERO, K, KP, stride_x, OWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X [rows, K] -> Q int8 [rows, KP], filled up with codes of zero.

    OWN: symmetric, SCALE [rows] receives max|x| / 127. Otherwise SCALE and ZERO are float32 numbers in memory, codes
    0 ... 255 that are stored minus 128.
    """
    r = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if OWN:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            x = tl.load(X + r * stride_x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x))
        scale = tl.max(largest, 0) / 127.0
        scale = tl.where(scale == 0.0, 1.0, scale)
        tl.store(SCALE + r, scale)
        for start in range(0, KP, BLOCK):
            x = tl.load(X + r * stride_x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            code = tl.clamp(round_half_even(x / scale), -127.0, 127.0)
            tl.store(Q + r * KP + start + k, code.to(tl.int8), mask=start + k < KP)
    else:
        scale = tl.load(SCALE)
        zero = tl.load(ZERO)
        for start in range(0, KP, BLOCK):
            x = tl.load(X + r * stride_x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            # Clamped first: rounding is right for small numbers only.
            code = tl.clamp(round_half_even(tl.clamp(x / scale, -512.0, 512.0)) + zero, 0.0, 255.0) - 128.0
            tl.store(Q + r * KP + start + k, code.to(tl.int8), mask=start + k < KP)
