"""Attention of the domain `com.microsoft`: MultiHeadAttention and RotaryEmbedding."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.attention import merge_heads, rotate, split_heads
from fxopt.ir.onnx.references.common import first, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")


def _heads(x: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """A projection plus its bias as [batch, heads, length, size]; one with 4 axes is so already."""
    if x.dim() == 4:
        return x
    return split_heads(x if bias is None else x + bias, heads)


def _bias_parts(bias: Tensor | None, q: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
    """The bias of query, key and value."""
    if bias is None:
        return None, None, None
    hidden = q.shape[-1]
    return bias[:hidden], bias[hidden : 2 * hidden], bias[2 * hidden :]


@operators.reference("MultiHeadAttention")
def multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    cache_indirection: Tensor | None = None,
    num_heads: int = 1,
    scale: float | None = None,
    mask_filter_value: float = -10000.0,
    unidirectional: int = 0,
) -> Any:
    """softmax(scale * q @ k' + bias) @ v per head, with heads in the last axis; also the grown key and value."""
    if key is None or value is None or query.dim() != 3:
        return _refuse("packed query, key and value")
    require(past_sequence_length is None and cache_indirection is None, "MultiHeadAttention with shared buffers")
    require(call.outputs < 4, "MultiHeadAttention with the output qk has no torch reference")
    q_bias, k_bias, v_bias = _bias_parts(bias, query, value)
    q, k, v = _heads(query, q_bias, num_heads), _heads(key, k_bias, num_heads), _heads(value, v_bias, num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    mask = attention_bias
    if key_padding_mask is not None:
        require(key_padding_mask.dim() == 2, "MultiHeadAttention with lengths as padding mask has no torch reference")
        padding = torch.where(key_padding_mask[:, None, None, :] != 0, 0.0, mask_filter_value).to(q.dtype)
        mask = padding if mask is None else mask + padding
    if unidirectional:
        past = k.shape[2] - q.shape[2]
        ahead = torch.arange(k.shape[2], device=q.device) > torch.arange(q.shape[2], device=q.device)[:, None] + past
        causal = torch.where(ahead, -math.inf, 0.0).to(q.dtype)
        mask = causal if mask is None else mask + causal
    y = merge_heads(F.scaled_dot_product_attention(q, k, v, mask, scale=scale or None))
    return first(call, y, k, v)


def _refuse(what: str) -> Any:
    require(False, f"MultiHeadAttention with {what} has no torch reference")


@operators.reference("RotaryEmbedding")
def rotary_embedding(
    call: Call,
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
    is_packed_batching: int = 0,
) -> Tensor:
    """x with (the first entries of) its heads turned by angles of the positions: a matrix, or one first position."""
    require(not is_packed_batching and scale == 1.0, "RotaryEmbedding of packed batches or with a scale")
    flat = x.dim() == 3
    if flat:
        size = cos_cache.shape[1] * 2
        heads = split_heads(x, num_heads if rotary_embedding_dim else x.shape[2] // size)
    else:
        heads = x
    if position_ids.dim() == 1:
        position_ids = (position_ids + torch.arange(heads.shape[2], device=x.device)).unsqueeze(0)
    cos = F.embedding(position_ids, cos_cache).unsqueeze(1)
    sin = F.embedding(position_ids, sin_cache).unsqueeze(1)
    width = rotary_embedding_dim or heads.shape[-1]
    turned = rotate(heads[..., :width], cos, sin, bool(interleaved))
    y = torch.cat([turned, heads[..., width:]], -1) if rotary_embedding_dim else turned
    return merge_heads(y) if flat else y
