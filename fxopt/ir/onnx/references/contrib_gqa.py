"""GroupQueryAttention of the domain `com.microsoft`, with its key-value cache, in floating point."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.lane import to_scalar, to_tensor
from fxopt.ir.onnx.references.attention import attend, merge_heads, rotate, split_heads
from fxopt.ir.onnx.references.common import along, at_least_float32, first, larger, pad_with, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")


def _grown(past: Tensor | None, new: Tensor, positions: Tensor, length: Any) -> Tensor:
    """The cache, at least `length` long, with the new entries written at their positions and zeros after them."""
    if past is None:
        past = new.new_zeros(new.shape[0], new.shape[1], 0, new.shape[3])
    cache = pad_with(past, [0, 0, 0, larger(length - past.shape[2], 0)])
    cache = cache.scatter(2, positions[:, None, :, None].expand(new.shape), new)
    written = torch.arange(cache.shape[2], device=new.device) <= positions[:, -1:]
    return torch.where(written[:, None, :, None], cache, torch.zeros_like(cache))


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = at_least_float32(x)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight).to(x.dtype)


def _attend_with(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    bias: Tensor | None,
    sink: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention step by step, with a bias on the scores and a sink in the softmax."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(repeats, 1) for part in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * (scale or 1 / math.sqrt(q.shape[3]))
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + pad_with(bias, [0, larger(k.shape[2] - bias.shape[3], 0)])
    scores = scores.masked_fill(~allowed, -math.inf)
    if sink is not None:
        column = along(sink, 4, 1).to(scores.dtype).expand([*scores.shape[:3], 1])
        return torch.matmul(torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1], v)
    return torch.matmul(torch.softmax(scores, -1), v)


@operators.reference("GroupQueryAttention", raw=True)
def group_query_attention(
    call: Call,
    query: Any,
    key: Any = None,
    value: Any = None,
    past_key: Any = None,
    past_value: Any = None,
    seqlens_k: Any = None,
    total_sequence_length: Any = None,
    cos_cache: Any = None,
    sin_cache: Any = None,
    position_ids: Any = None,
    attention_bias: Any = None,
    head_sink: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    q_norm_weight: Any = None,
    k_norm_weight: Any = None,
    query_seqlens: Any = None,
    num_heads: int = 1,
    kv_num_heads: int = 1,
    scale: float = 0.0,
    softcap: float = 0.0,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    local_window_size: int = -1,
    causal: int = 1,
    smooth_softmax: int = -1,
    qk_norm_epsilon: float = 1e-6,
    q_norm_epsilon: float | None = None,
    k_norm_epsilon: float | None = None,
    **settings: Any,
) -> Any:
    """softmax(scale * q @ k' + bias) @ v with shared key-value heads, and the cache with the new keys and values.

    Entry b has seqlens_k[b] + 1 keys in all; new ones are written after the past ones, at the rotary position. A sink
    (one number per head, or 0 for `smooth_softmax`) is one more score, of a key without a value.
    """
    ignored: dict[str, tuple[Any, ...]] = {"qk_output": (0,), "sliding_window_cache": (0,)}
    ignored |= {"k_quant_type": ("NONE",), "v_quant_type": ("NONE",)}
    for name, value_ in settings.items():
        require(name in ignored and value_ in ignored[name], f"GroupQueryAttention with {name}={value_!r}")
    require(k_scale is None and v_scale is None, "GroupQueryAttention with a quantized cache has no torch reference")
    require(query_seqlens is None, "GroupQueryAttention with padded chunks of queries has no torch reference")
    require(call.outputs < 4, "GroupQueryAttention with the output of scores")
    x: Tensor = to_tensor(query)
    if key is None:
        size = x.shape[2] // (num_heads + 2 * kv_num_heads)
        x, key, value = torch.split(x, [num_heads * size, kv_num_heads * size, kv_num_heads * size], 2)
    q, k, v = split_heads(x, num_heads), split_heads(key, kv_num_heads), split_heads(value, kv_num_heads)
    if q_norm_weight is not None and k_norm_weight is not None:
        q = _rms_norm(q, q_norm_weight, q_norm_epsilon or qk_norm_epsilon)
        k = _rms_norm(k, k_norm_weight, k_norm_epsilon or qk_norm_epsilon)
    count, total = q.shape[2], to_scalar(total_sequence_length)
    before = to_tensor(seqlens_k).reshape(-1).to(torch.int64) + 1 - count
    if count == total:  # the first prompt, whose padding is on the right
        before = torch.zeros_like(before)
    positions = before.unsqueeze(1) + torch.arange(count, device=q.device)
    if do_rotary:
        where = positions if position_ids is None else to_tensor(position_ids)
        cos, sin = (F.embedding(where, cache).unsqueeze(1) for cache in (cos_cache, sin_cache))
        width = 2 * cos.shape[-1]
        q, k = (
            torch.cat([rotate(part[..., :width], cos, sin, bool(rotary_interleaved)), part[..., width:]], -1)
            for part in (q, k)
        )
    keys, values = _grown(past_key, k, positions, total), _grown(past_value, v, positions, total)
    distance = along(torch.arange(keys.shape[2], device=q.device), 4, 3) - positions[:, None, :, None]
    allowed = distance <= 0 if causal else along(torch.arange(keys.shape[2], device=q.device), 4, 3) < total
    if local_window_size >= 0:
        allowed = allowed & (distance > -local_window_size)
    if head_sink is None and smooth_softmax == 1:
        head_sink = q.new_zeros(num_heads)
    if attention_bias is None and head_sink is None:
        return first(call, merge_heads(attend(q, keys, values, allowed, scale or None, softcap)), keys, values)
    y = _attend_with(q, keys, values, allowed, to_tensor(attention_bias), to_tensor(head_sink), scale, softcap)
    return first(call, merge_heads(y), keys, values)
