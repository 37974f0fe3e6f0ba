"""log, sin, cos and roundings for vectors of float32; see `approximations` for how coefficients were fitted."""

from __future__ import annotations

import math
from collections.abc import Callable

from fxopt.backends.tvm.emit import Expr, Kernel, cast, float32, is_nan, reinterpret, spread, typed
from fxopt.backends.tvm.kernels.approximations import exp, polynomial, tanh
from fxopt.backends.tvm.library import tirx

_LOG = (0.3333331346511841, -0.25000008940696716, 0.2000211924314499, -0.1666799634695053, 0.14219552278518677,
        -0.1240558847784996, 0.11888162791728973, -0.11675654351711273, 0.06746643036603928)  # fmt: skip
_SIN = (-0.16666655242443085, 0.008332155644893646, -0.00019514630548655987)
_COS = (0.04166664555668831, -0.0013887309469282627, 2.4432411009911448e-05)
_HALF_PI = (1.5703125, 0.0004837512969970703, 7.549790126404332e-08)  # the first two have few bits
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_ROUND = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer
_WHOLE = 8388608.0  # 2**23: from here on floats are integers
_SMALLEST = 2.0**-126  # normal number


def log(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """The natural logarithm within 2 units in the last place; NaN below zero, -infinity at zero."""
    integers = typed("int32", lanes)
    small = kernel.let(x < float32(_SMALLEST, lanes))
    scaled = kernel.let(tirx.Select(small, x * float32(2.0**25, lanes), x))
    bits = kernel.let(reinterpret(integers, scaled))
    # The exponent that leaves a factor between sqrt(1/2) and sqrt(2).
    exponent = kernel.let((bits - _int(0x3F3504F3, lanes)) >> _int(23, lanes))
    rest = reinterpret(typed("float32", lanes), bits - (exponent << _int(23, lanes))) - float32(1.0, lanes)
    rest = kernel.let(rest)
    power = kernel.let(
        cast(typed("float32", lanes), exponent) - tirx.Select(small, float32(25.0, lanes), float32(0.0, lanes))
    )
    square = kernel.let(rest * rest)
    tail = kernel.let(rest * square * polynomial(kernel, rest, _LOG, lanes) + power * float32(_LN2_LOW, lanes))
    value = (rest - (float32(0.5, lanes) * square - tail)) + power * float32(_LN2_HIGH, lanes)
    value = tirx.Select(x < float32(0.0, lanes), float32(math.nan, lanes), kernel.let(value))
    value = tirx.Select(tirx.EQ(x, float32(0.0, lanes)), float32(-math.inf, lanes), value)
    unbounded = tirx.Or(tirx.EQ(x, float32(math.inf, lanes)), is_nan(x))
    return kernel.let(tirx.Select(unbounded, x, value))


def log1p(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """log(1 + x), exact to rounding near zero: log(u) * x / (u - 1) with u = 1 + x (Kahan)."""
    one = float32(1.0, lanes)
    sum_ = kernel.let(one + x)
    whole = kernel.let(log(kernel, sum_, lanes))
    near = kernel.let(whole * (x / (sum_ - one)))
    exact = tirx.Or(tirx.EQ(sum_, one), tirx.Or(tirx.EQ(x, float32(math.inf, lanes)), x <= float32(-1.0, lanes)))
    return kernel.let(tirx.Select(exact, tirx.Select(tirx.EQ(sum_, one), x, whole), near))


def expm1(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """e**x - 1: 2 t / (1 - t) with t = tanh(x / 2) near zero."""
    one = float32(1.0, lanes)
    half = kernel.let(tanh(kernel, kernel.let(x * float32(0.5, lanes)), lanes))
    near = float32(2.0, lanes) * half / (one - half)
    far = exp(kernel, x, lanes) - one
    return kernel.let(tirx.Select(tirx.abs(x) < one, near, far))


def sin(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """Within 1.2e-7 (absolute) for |x| up to 10,000, further off beyond."""
    return _wave(kernel, x, lanes, 0)


def cos(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """Within 1.2e-7 (absolute) for |x| up to 10,000, further off beyond."""
    return _wave(kernel, x, lanes, 1)


def _wave(kernel: Kernel, x: Expr, lanes: int, quarter: int) -> Expr:
    """sin(x + quarter * pi / 2), by quarters of the circle."""
    shifted = kernel.let(x * float32(2 / math.pi, lanes) + float32(_ROUND, lanes))
    count = kernel.let(shifted - float32(_ROUND, lanes))
    rest = x
    for part in _HALF_PI:
        rest = rest - count * float32(part, lanes)
    rest = kernel.let(rest)
    square = kernel.let(rest * rest)
    sine = rest + rest * square * polynomial(kernel, square, _SIN, lanes)
    cosine = float32(1.0, lanes) - float32(0.5, lanes) * square
    cosine = cosine + square * square * polynomial(kernel, square, _COS, lanes)
    number = kernel.let(reinterpret(typed("int32", lanes), shifted) + _int(quarter, lanes))
    odd = tirx.NE(tirx.bitwise_and(number, _int(1, lanes)), _int(0, lanes))
    value = kernel.let(tirx.Select(odd, cosine, sine))
    negative = tirx.NE(tirx.bitwise_and(number, _int(2, lanes)), _int(0, lanes))
    return kernel.let(tirx.Select(negative, float32(0.0, lanes) - value, value))


def sign(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """-1, 0 or 1; 0 for NaN."""
    zero = float32(0.0, lanes)
    signed = tirx.Select(x > zero, float32(1.0, lanes), tirx.Select(x < zero, float32(-1.0, lanes), zero))
    return kernel.let(signed)


def ceil(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """The smallest integer that is not smaller."""
    return kernel.let(float32(0.0, lanes) - tirx.floor(float32(0.0, lanes) - x))


def trunc(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """Towards zero."""
    down = tirx.floor(x)
    return kernel.let(tirx.Select(x < float32(0.0, lanes), ceil(kernel, x, lanes), down))


def round_half_even(kernel: Kernel, x: Expr, lanes: int) -> Expr:
    """To the nearest integer, halves to the even one."""
    size = kernel.let(tirx.abs(x))
    near = kernel.let((size + float32(_WHOLE, lanes)) - float32(_WHOLE, lanes))
    signed = tirx.Select(x < float32(0.0, lanes), float32(0.0, lanes) - near, near)
    return kernel.let(tirx.Select(size < float32(_WHOLE, lanes), signed, x))


FUNCTIONS: dict[str, Callable[[Kernel, Expr, int], Expr]] = {
    "log": log,
    "log1p": log1p,
    "expm1": expm1,
    "sin": sin,
    "cos": cos,
    "sign": sign,
    "ceil": ceil,
    "trunc": trunc,
    "round": round_half_even,
}


def _int(value: int, lanes: int) -> Expr:
    return spread(tirx.IntImm("int32", value), lanes)
