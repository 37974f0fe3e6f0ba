"""Element-wise functions of one tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fxopt.ir.onnx.lane import HostArray
from fxopt.ir.onnx.references.common import WIDE_UNSIGNED, in_int64
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitwiseNot": in_int64(torch.bitwise_not),
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}


def _declare(op_type: str, function: Callable[[Tensor], Tensor]) -> None:
    @operators.reference(op_type)
    def unary(call: Call, x: Tensor, consumed_inputs: list[int] | None = None) -> Tensor:
        """f(x), element by element; `consumed_inputs` (opset 1) has no meaning here."""
        return function(x)

    unary.__doc__ = f"{op_type}(x), element by element."


for _op_type, _function in _FUNCTIONS.items():
    _declare(_op_type, _function)


@operators.reference("Abs")
def absolute(call: Call, x: Tensor, consumed_inputs: list[int] | None = None) -> Tensor:
    """|x|; unsigned integers are their own absolute value."""
    return x if x.dtype in WIDE_UNSIGNED else x.abs()


@operators.reference("Sign")
def sign(call: Call, x: Tensor) -> Tensor:
    """-1, 0 or 1 by the sign of x."""
    return (x != 0).to(x.dtype) if x.dtype in WIDE_UNSIGNED else torch.sign(x)


@operators.reference("IsInf")
def is_inf(call: Call, x: Tensor, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """True where x is an infinity of a detected sign."""
    never = torch.zeros_like(x, dtype=torch.bool)
    positive = torch.isposinf(x) if detect_positive else never
    negative = torch.isneginf(x) if detect_negative else never
    return positive | negative


@operators.host("Not")
def host_not(call: Call, x: HostArray) -> HostArray:
    """not x, on host booleans."""
    result: HostArray = np.logical_not(x.astype(bool))
    return result


@operators.host("Neg")
def host_neg(call: Call, x: HostArray, consumed_inputs: list[int] | None = None) -> HostArray:
    """-x, on host integers."""
    return np.asarray(-x, dtype=x.dtype)
