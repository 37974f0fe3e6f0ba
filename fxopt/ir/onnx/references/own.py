"""Operators of our own custom-operator library, so that saved results can be read, run in torch and compared."""

from __future__ import annotations

from torch import Tensor

from fxopt.ir.onnx.registry import Call, Operators
from fxopt.ir.ops.linear_u8s8 import layer_norm_u8, linear_u8s8, quantize_u8

operators = Operators("fxopt")

_EPILOGUES = ("none", "relu", "gelu", "layer_norm", "gelu_tanh", "residual", "norm_codes")


@operators.reference("FusedLinearInt8")
def fused_linear_int8(
    call: Call,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor,
    inverse: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    x_zero: int = 0,
    y_zero: int = 0,
    epilogue: int = 0,
    floats: int = 1,
    codes: int = 0,
    eps: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_u8s8`, its codes (those of its layer norm with the epilogue "norm_codes"), or both."""
    kind = _EPILOGUES[epilogue]
    operands = (residual, gamma, beta) if kind == "layer_norm" else (residual, None, None)
    name = "residual" if kind == "norm_codes" else kind
    y = linear_u8s8.function(x, weight, scales, bias, x_zero, name, *operands, eps)
    if call.outputs == 1:
        return y
    assert inverse is not None
    if kind != "norm_codes":
        return y, quantize_u8.function(y, inverse, y_zero)
    assert gamma is not None and beta is not None
    return y, layer_norm_u8.function(y, gamma, beta, eps, inverse, y_zero)
