"""Pointwise functions that a product applies before it stores its result."""

from __future__ import annotations

from typing import Literal, get_args

from fxopt.backends.tvm.emit import Expr, Kernel, float32
from fxopt.backends.tvm.kernels import approximations
from fxopt.backends.tvm.library import tirx

Activation = Literal["", "relu", "relu6", "hardswish", "hardsigmoid", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def apply(kernel: Kernel, activation: Activation, x: Expr, lanes: int) -> Expr:
    """The function's value; "" leaves x as it is. NaN stays NaN."""
    if not activation:
        return x
    if activation == "relu":
        return tirx.Max(float32(0.0, lanes), x)
    if activation == "relu6":
        return _clip(x, 6.0, lanes)
    if activation == "hardsigmoid":
        return _clip(x + float32(3.0, lanes), 6.0, lanes) * float32(1 / 6, lanes)
    if activation == "hardswish":
        return x * _clip(x + float32(3.0, lanes), 6.0, lanes) * float32(1 / 6, lanes)
    return getattr(approximations, activation)(kernel, x, lanes)


def _clip(x: Expr, high: float, lanes: int) -> Expr:
    return tirx.Min(float32(high, lanes), tirx.Max(float32(0.0, lanes), x))  # in this order NaN stays
