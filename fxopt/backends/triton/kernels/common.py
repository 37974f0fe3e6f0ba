"""What kernels share: products that the interpreter gets right, and numbers that it lacks."""

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # decided when the process starts
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 sums. The interpreter multiplies the bits of bfloat16, so it gets float32."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def round_half_even(x):
    """To the nearest integer, ties to even, as torch.round; float32 of a magnitude below 2 ** 22."""
    nearest = tl.floor(x + 0.5)
    is_tie = nearest - x == 0.5
    is_odd = nearest - 2.0 * tl.floor(nearest * 0.5) == 1.0
    return tl.where(is_tie & is_odd, nearest - 1.0, nearest)


@triton.jit
def tanh(x):
    """The hyperbolic tangent."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0
