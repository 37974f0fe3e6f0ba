"""Attention of the domain `com.microsoft` on projections, and RotaryEmbedding."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.attention import merge_heads, rotate, split_heads
from fxopt.ir.onnx.references.common import first, require
from fxopt.ir.onnx.references.contrib_self_attention import causal_scores, mask_scores, total_of
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
    """softmax(scale * q @ k' + bias) @ v per head, with heads in the last axis; the grown key and value; the weights.

    Query, key and value may come as one [batch, length, heads, 3, size], key and value as one with 2.
    """
    require(past_sequence_length is None and cache_indirection is None, "MultiHeadAttention with shared buffers")
    query, key, value = _unpacked(query, key, value)
    q_bias, k_bias, v_bias = _bias_parts(bias, query, value)
    q, k, v = _heads(query, q_bias, num_heads), _heads(key, k_bias, num_heads), _heads(value, v_bias, num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    added = None
    if key_padding_mask is not None:
        added = mask_scores(key_padding_mask, q.shape[0], k.shape[2], mask_filter_value, q)
    mask = total_of(added, attention_bias, causal_scores(q, k) if unidirectional else None)
    return _attended(call, q, k, v, mask, scale)


def _unpacked(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value on their own, heads in the last axis where they were packed."""
    if key is None:
        require(query.dim() == 5, f"packed query, key and value of rank {query.dim()} have no torch reference")
        q, k, v = (part.flatten(2) for part in query.unbind(3))
        return q, k, v
    if value is None:
        require(key.dim() == 5, f"packed key and value of rank {key.dim()} have no torch reference")
        k, v = (part.flatten(2) for part in key.unbind(3))
        return query, k, v
    return query, key, value


def _attended(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Any:
    """Attention with heads on their own axis; the keys and values; the scores before the softmax."""
    y = merge_heads(F.scaled_dot_product_attention(q, k, v, mask, scale=scale or None))
    if call.outputs < 4:
        return first(call, y, k, v)
    scores = torch.matmul(q, k.transpose(2, 3)) * (scale or 1 / math.sqrt(q.shape[3]))
    return y, k, v, scores if mask is None else scores + mask


@operators.reference("DecoderMaskedMultiHeadAttention")
def decoder_masked_multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    mask_index: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    beam_width: Tensor | None = None,
    cache_indirection: Tensor | None = None,
    bias: Tensor | None = None,
    num_heads: int = 1,
    scale: float | None = None,
    mask_filter_value: float = -10000.0,
    output_qk: int = 0,
    past_present_share_buffer: int = 0,
) -> Any:
    """MultiHeadAttention of one new token, on its own keys after the past ones, or on those of another sequence."""
    require(not past_present_share_buffer, "DecoderMaskedMultiHeadAttention with shared buffers")
    require(cache_indirection is None, "DecoderMaskedMultiHeadAttention with beams has no torch reference")
    if key is None:
        query, key, value = query.chunk(3, -1)
    assert value is not None
    q_bias, k_bias, v_bias = _bias_parts(bias, query, value)
    q, k, v = _heads(query, q_bias, num_heads), _heads(key, k_bias, num_heads), _heads(value, v_bias, num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    added = None if mask_index is None else mask_scores(mask_index, q.shape[0], k.shape[2], mask_filter_value, q)
    return _attended(call, q, k, v, total_of(added, attention_bias), scale)


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
