"""The range of a whole tensor as scale and zero point of codes 0 ... 255, in two launches."""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.common import round_half_even


@triton.jit(do_not_specialize=["COUNT", "EACH"])
def range_parts(X, PARTS, COUNT, EACH, BLOCK: tl.constexpr):
    """Program: EACH elements of X; PARTS float32 [2, programs] receives their minimum and maximum, zero included."""
    pid = tl.program_id(0)
    first = pid.to(tl.int64) * EACH
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, EACH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        here = (at < EACH) & (first + at < COUNT)
        x = tl.load(X + first + at, mask=here, other=0.0).to(tl.float32)
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
    tl.store(PARTS + pid, tl.min(low, 0))
    tl.store(PARTS + tl.num_programs(0) + pid, tl.max(high, 0))


@triton.jit(do_not_specialize=["PROGRAMS"])
def range_whole(PARTS, SCALE, ZERO, PROGRAMS, BLOCK: tl.constexpr):
    """One program; BLOCK holds PROGRAMS."""
    at = tl.arange(0, BLOCK)
    low = tl.min(tl.load(PARTS + at, mask=at < PROGRAMS, other=0.0), 0)
    high = tl.max(tl.load(PARTS + PROGRAMS + at, mask=at < PROGRAMS, other=0.0), 0)
    scale = (high - low) / 255.0
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(SCALE, scale)
    tl.store(ZERO, tl.clamp(round_half_even(-low / scale), 0.0, 255.0))
