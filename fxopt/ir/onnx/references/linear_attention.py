"""Recurrent sequence mixers of opset 27: LinearAttention and CausalConvWithState."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.attention import merge_heads, split_heads
from fxopt.ir.onnx.references.common import at_least_float32, first, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("LinearAttention")
def linear_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    chunk_size: int = 64,
    kv_num_heads: int = 1,
    q_num_heads: int = 1,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> Any:
    """S = exp(decay) * S + k (x) beta * (v - S' k), y = scale * q' S per step; also the last state S.

    Without decay the factor is 1; without beta ("linear", "gated") the state adds k (x) v.
    """
    require(isinstance(query.shape[1], int), "LinearAttention over a symbolic number of steps has no torch reference")
    q = at_least_float32(split_heads(query, q_num_heads))
    k = at_least_float32(split_heads(key, kv_num_heads))
    v = at_least_float32(split_heads(value, kv_num_heads))
    if past_state is None:
        state = k.new_zeros(k.shape[0], k.shape[1], k.shape[3], v.shape[3])
    else:
        state = at_least_float32(past_state)
    factor = None if decay is None else torch.exp(at_least_float32(split_heads(decay, kv_num_heads)))
    rate = None if beta is None else at_least_float32(split_heads(beta, beta.shape[-1]))
    repeats = q_num_heads // kv_num_heads
    outputs = []
    for step in range(query.shape[1]):
        if factor is not None:
            state = state * factor[:, :, step].unsqueeze(-1)
        new = v[:, :, step]
        if rate is not None:
            new = rate[:, :, step] * (new - (k[:, :, step].unsqueeze(-2) @ state).squeeze(-2))
        state = state + k[:, :, step].unsqueeze(-1) * new.unsqueeze(-2)
        seen = state.repeat_interleave(repeats, 1)
        outputs.append((q[:, :, step].unsqueeze(-2) @ seen).squeeze(-2))
    y = torch.stack(outputs, 2) * (scale or 1 / math.sqrt(q.shape[3]))
    return first(
        call, merge_heads(y).to(query.dtype), state.to(query.dtype if past_state is None else past_state.dtype)
    )


@operators.reference("CausalConvWithState")
def causal_conv_with_state(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past_state: Tensor | None = None,
    activation: str = "none",
) -> Any:
    """The depthwise convolution of [past_state, x] along the last axis, activated; also the last k - 1 inputs."""
    reach = weight.shape[2] - 1
    past = x.new_zeros(x.shape[0], x.shape[1], reach) if past_state is None else past_state
    padded = torch.cat([past, x], 2)
    y = F.conv1d(padded, weight, bias, groups=weight.shape[0])
    if str(activation) in ("silu", "swish"):
        y = F.silu(y)
    return first(call, y, padded.narrow(2, padded.shape[2] - reach, reach))
