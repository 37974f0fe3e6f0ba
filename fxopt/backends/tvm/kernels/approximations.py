"""exp, erf, tanh, the logistic function and GELU for vectors of float32: polynomials, no calls of a C library.

The coefficients were fitted here to the functions in float64 (Lawson's reweighted least squares towards the smallest
largest relative error). Errors are those of the float32 results against float64. NaN goes through all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fxopt.backends.tvm.emit import Expr, Kernel, float32, reinterpret, spread, typed
from fxopt.backends.tvm.library import tirx

_EXP = (1.0, 1.0, 0.49999991059303284, 0.16666419804096222, 0.04166822507977486, 0.008374824188649654,
        0.0013836831785738468)  # fmt: skip
_ERF_END = 3.9  # from here on erf is 1 in float32
_ERF = (0.3625839650630951, -0.18101108074188232, 0.13469107449054718, -0.10953287780284882, 0.09067001938819885,
        -0.07379649579524994, 0.05790582299232483, -0.0428188294172287, 0.02913498319685459, -0.019435854628682137,
        0.013580788858234882, -0.007285657338798046, 0.0019058192847296596, -0.0013370574451982975,
        0.0019222067203372717, -0.0007665972807444632)  # fmt: skip
_BELL_END = 4.5  # from here on x * P(X < -x) counts as zero
_BELL = (0.012220983393490314, -0.07134827971458435, 0.1809415966272354, -0.24639590084552765, 0.1562293916940689,
         0.03712332993745804, -0.12835928797721863, 0.0498041957616806, 0.028839724138379097,
         -0.019055550917983055)  # fmt: skip
_BELL_TANH = (0.01208756398409605, -0.07192959636449814, 0.18273156881332397, -0.2449706792831421, 0.1503930240869522,
              0.03730842471122742, -0.12103019654750824, 0.04699331149458885, 0.025647016242146492,
              -0.017232561483979225)  # fmt: skip
_TANH = (-0.3333333432674408, 0.13333307206630707, -0.053959816694259644, 0.02177218534052372, -0.008352315984666348,
         0.0023005411494523287)  # fmt: skip
_TANH_SMALL = 0.625
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, which is then in the low bits
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # the first has few bits, so that its multiples are exact


def exp(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """e**x within 2 units in the last place; 0 below -86.6 (2**-125), infinity above 88.72."""
    low, high = -86.6, 88.7228
    clamped = kernel.let(tirx.Min(float32(high, lanes), tirx.Max(float32(low, lanes), x)))  # this order keeps NaN
    shifted = kernel.let(clamped * float32(1 / math.log(2), lanes) + float32(_ROUND, lanes))
    count = kernel.let(shifted - float32(_ROUND, lanes))
    rest = kernel.let((clamped - count * float32(_LN2_HIGH, lanes)) - count * float32(_LN2_LOW, lanes))
    power = polynomial(kernel, rest, _EXP, lanes)
    integers = typed("int32", lanes)
    bits = (reinterpret(integers, shifted) << _int(23, lanes)) + _int(126 << 23, lanes)  # 2**(count - 1)
    scaled = kernel.let(power * reinterpret(typed("float32", lanes), bits) * float32(2.0, lanes))
    bounded = tirx.Select(x > float32(high, lanes), float32(math.inf, lanes), scaled)
    return kernel.let(tirx.Select(x < float32(low, lanes), float32(0.0, lanes), bounded))


def exp_below_one(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """e**x as `exp` gives it for x <= 0, as softmax needs it: fewer operations."""
    low = -86.6
    clamped = kernel.let(tirx.Max(float32(low, lanes), x))  # this order keeps NaN
    shifted = kernel.let(clamped * float32(1 / math.log(2), lanes) + float32(_ROUND, lanes))
    count = kernel.let(shifted - float32(_ROUND, lanes))
    rest = kernel.let((clamped - count * float32(_LN2_HIGH, lanes)) - count * float32(_LN2_LOW, lanes))
    bits = (reinterpret(typed("int32", lanes), shifted) << _int(23, lanes)) + _int(127 << 23, lanes)  # 2**count
    scaled = polynomial(kernel, rest, _EXP, lanes) * reinterpret(typed("float32", lanes), bits)
    return kernel.let(tirx.Select(x < float32(low, lanes), float32(0.0, lanes), scaled))


def erf(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """The error function within 2.4e-7: x * P(x**2), with x cut at 3.9 on both sides."""
    end = float32(_ERF_END, lanes)
    cut = kernel.let(tirx.Min(end, tirx.Max(float32(-_ERF_END, lanes), x)))
    position = kernel.let(cut * cut * float32(2 / _ERF_END**2, lanes) - float32(1.0, lanes))
    half = len(_ERF) // 2  # two chains of sums, which do not wait for each other
    low, high = (polynomial(kernel, position, part, lanes) for part in (_ERF[:half], _ERF[half:]))
    power = position
    for _ in range(half.bit_length() - 1):
        power = kernel.let(power * power)
    return kernel.let(cut * (low + power * high))


def tanh(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """Within 3 units in the last place: a polynomial near zero, 1 - 2 / (e**2x + 1) elsewhere."""
    square = kernel.let(x * x)
    near = x + x * square * polynomial(kernel, square, _TANH, lanes)
    far = float32(1.0, lanes) - float32(2.0, lanes) / (exp(kernel, x + x, lanes) + float32(1.0, lanes))
    return kernel.let(tirx.Select(square < float32(_TANH_SMALL**2, lanes), near, far))


def sigmoid(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """1 / (1 + e**-x)."""
    one = float32(1.0, lanes)
    return kernel.let(one / (one + exp(kernel, float32(0.0, lanes) - x, lanes)))


def gelu(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """x * (1 + erf(x / sqrt(2))) / 2 (Hendrycks & Gimpel, 2016)."""
    half = x * float32(0.5, lanes)
    return kernel.let(half + half * erf(kernel, x * float32(math.sqrt(0.5), lanes), lanes))


def gelu_short(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """gelu(x) within 1.5e-5 (absolute) for every x, in half the operations: what is rounded to 8 bits needs no more.

    gelu(x) = max(x, 0) - a * P(X < -a) with a = |x| and X normal; the second term is a bell that ends at 4.5.
    """
    return _without_bell(kernel, x, _BELL, lanes)


def gelu_tanh_short(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """gelu_tanh(x) within 1.5e-5 (absolute), in the same way."""
    return _without_bell(kernel, x, _BELL_TANH, lanes)


def gelu_tanh(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """The approximation x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3))) / 2 of the same paper."""
    inner = (x + x * x * x * float32(0.044715, lanes)) * float32(math.sqrt(2 / math.pi), lanes)
    half = x * float32(0.5, lanes)
    return kernel.let(half + half * tanh(kernel, kernel.let(inner), lanes))


def silu(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """x * sigmoid(x)."""
    return kernel.let(x * sigmoid(kernel, x, lanes))


def _without_bell(kernel: Kernel, x: Expr, bell: Sequence[float], lanes: int) -> Expr:
    size = kernel.let(tirx.Min(tirx.Max(x, float32(0.0, lanes) - x), float32(_BELL_END, lanes)))
    position = kernel.let(size * float32(2 / _BELL_END, lanes) - float32(1.0, lanes))
    return kernel.let(tirx.Max(float32(0.0, lanes), x) - size * polynomial(kernel, position, bell, lanes))


def polynomial(kernel: Kernel, x: Expr, coefficients: Sequence[float], lanes: int) -> Expr:
    """sum(c_i * x**i), by Horner's rule."""
    value = float32(coefficients[-1], lanes)
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + float32(coefficient, lanes)
    return kernel.let(value)


def _int(value: int, lanes: int) -> Expr:
    return spread(tirx.IntImm("int32", value), lanes)
