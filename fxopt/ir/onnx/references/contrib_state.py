"""Recurrent networks and sequence mixers with a state, of the domain `com.microsoft`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.ir.onnx.references.common import require
from fxopt.ir.onnx.references.linear_attention import causal_conv_with_state, linear_attention
from fxopt.ir.onnx.references.quantize import dynamic_quantize_linear
from fxopt.ir.onnx.references.recurrent import lstm
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")


@operators.reference("LinearAttention")
def linear_attention_windowed(call: Call, *inputs: Any, state_window: int = 0, **attributes: Any) -> Any:
    """LinearAttention of ONNX; windows of states are not covered."""
    require(not state_window, "LinearAttention with a window of states has no torch reference")
    return linear_attention(call, *inputs, **attributes)


@operators.reference("CausalConvWithState")
def causal_conv(
    call: Call, *inputs: Any, activation: str = "none", ndim: int = 1, dilation: int = 1, **settings: int
) -> Any:
    """CausalConvWithState of ONNX, over one axis with the channels first."""
    require(ndim == 1 and dilation == 1, "CausalConvWithState over several axes or with dilation")
    ordinary = all(value == (-1 if name == "state_channels_last" else 0) for name, value in settings.items())
    require(ordinary, "CausalConvWithState with channels last or special states has no torch reference")
    return causal_conv_with_state(call, *inputs, activation=activation)


def _fake_quantized(x: Tensor) -> Tensor:
    """x after DynamicQuantizeLinear and back."""
    y, scale, zero_point = dynamic_quantize_linear(Call(11, 3), x)
    real: Tensor = (y.to(torch.int32) - zero_point.to(torch.int32)).to(scale.dtype) * scale
    return real


def _real(weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The weight [directions, inputs, gates] as real numbers [directions, gates, inputs]."""
    spread = [-1, 1, 1] if scale.dim() == 1 else [scale.shape[0], 1, -1]
    shifted = weight.to(torch.int32) - zero_point.to(torch.int32).reshape(spread)
    return (shifted.to(scale.dtype) * scale.reshape(spread)).transpose(1, 2)


@operators.reference("DynamicQuantizeLSTM")
def dynamic_quantize_lstm(
    call: Call,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    initial_h: Tensor | None,
    initial_c: Tensor | None,
    peephole: Tensor | None,
    w_scale: Tensor,
    w_zero_point: Tensor,
    r_scale: Tensor,
    r_zero_point: Tensor,
    **options: Any,
) -> Any:
    """LSTM with 8-bit weights; the input as a whole, and the hidden state at every step, are rounded to 8 bits."""
    weights = (_real(w, w_scale, w_zero_point), _real(r, r_scale, r_zero_point))
    states = (lengths, initial_h, initial_c, peephole)
    rounded = {"seen": _fake_quantized, **options}
    return lstm(Call(14, call.outputs), _fake_quantized(x), *weights, bias, *states, **rounded)
