"""What follows a linear in the same kernel: bias, activation, and a second operand that is added or multiplied.

`ACT`: 0 nothing, 1 ReLU, 2 GELU, 3 GELU by tanh, 4 SiLU. `COMBINE`: 0 nothing, 1 add, 2 multiply.
"""

import triton
import triton.language as tl

from fxopt.backends.triton.kernels.common import tanh


@triton.jit
def activated(y, ACT: tl.constexpr):
    """The activation of float32 values."""
    if ACT == 1:
        y = tl.where(y < 0.0, 0.0, y)  # keeps NaN
    elif ACT == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACT == 3:
        y = 0.5 * y * (1.0 + tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
    elif ACT == 4:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def finished(y, m, n, mask, BIAS, OTHER, N, HAS_BIAS: tl.constexpr, ACT: tl.constexpr, COMBINE: tl.constexpr):
    """The values [m, n] of a linear without bias, float32, after its epilogue; OTHER is [M, N], contiguous, m int64."""
    if HAS_BIAS:
        y += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = activated(y, ACT)
    if COMBINE:
        other = tl.load(OTHER + m[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
        y = y + other if COMBINE == 1 else y * other
    return y
