"""GroupQueryAttention of the domain `com.microsoft`, with its key-value cache, in floating point."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.lane import to_scalar, to_tensor
from fxopt.ir.onnx.references.attention import attend, merge_heads, rotate, split_heads
from fxopt.ir.onnx.references.common import along, first, larger, pad_with, require
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
    *others: Any,
    num_heads: int = 1,
    kv_num_heads: int = 1,
    scale: float = 0.0,
    softcap: float = 0.0,
    do_rotary: int = 0,
    rotary_interleaved: int = 0,
    local_window_size: int = -1,
    causal: int = 1,
    **settings: Any,
) -> Any:
    """Causal softmax(scale * q @ k') @ v with shared key-value heads, and the cache with the new keys and values.

    Entry b has seqlens_k[b] + 1 keys in all; new ones are written after the past ones, at the rotary position.
    """
    require(bool(causal) and attention_bias is None, "GroupQueryAttention with a bias, or not causal")
    require(all(other is None for other in others), "GroupQueryAttention with sinks, scales or norms")
    ignored: dict[str, tuple[Any, ...]] = {"smooth_softmax": (-1, 0), "qk_output": (0,), "sliding_window_cache": (0,)}
    ignored |= {"k_quant_type": ("NONE",), "v_quant_type": ("NONE",)}
    require(all(settings.get(name, known[0]) in known for name, known in ignored.items()), "special attention")
    require(call.outputs < 4, "GroupQueryAttention with the output of scores")
    x: Tensor = to_tensor(query)
    if key is None:
        size = x.shape[2] // (num_heads + 2 * kv_num_heads)
        x, key, value = torch.split(x, [num_heads * size, kv_num_heads * size, kv_num_heads * size], 2)
    q, k, v = split_heads(x, num_heads), split_heads(key, kv_num_heads), split_heads(value, kv_num_heads)
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
    allowed = distance <= 0
    if local_window_size >= 0:
        allowed = allowed & (distance > -local_window_size)
    return first(call, merge_heads(attend(q, keys, values, allowed, scale or None, softcap)), keys, values)
