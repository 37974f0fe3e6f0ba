"""Attention of the domain `com.microsoft` that projects its input itself, or whose tokens are packed."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.attention import merge_heads, split_heads
from fxopt.ir.onnx.references.common import first, require
from fxopt.ir.onnx.references.contrib_matmul import matmul_integer_to_float
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")


def mask_scores(mask: Tensor, batch: Any, total: Any, fill: float, like: Tensor) -> Tensor:
    """What a mask in one of its forms adds to the scores: 0 for keys that count, `fill` for the others.

    The forms: [batch] ends (exclusive), [2 * batch] ends then starts, [batch, keys], [batch, queries, keys].

    Raises:
        MissingReference: the mask has another form.
    """
    require(mask.dim() <= 3, f"an attention mask of rank {mask.dim()} has no torch reference")
    if mask.dim() == 1:
        position = torch.arange(total, device=mask.device)
        keep = position < mask[:batch].unsqueeze(1)
        if bool(mask.shape[0] != batch):
            require(bool(mask.shape[0] == 2 * batch), "an attention mask of cumulative lengths has no torch reference")
            keep = keep & (position >= mask[batch:].unsqueeze(1))
        keep = keep[:, None, None, :]
    else:
        keep = (mask != 0)[:, None, None, :] if mask.dim() == 2 else (mask != 0)[:, None]
    return torch.where(keep, 0.0, fill).to(like.dtype)


def causal_scores(q: Tensor, k: Tensor) -> Tensor:
    """What causality adds to the scores: minus infinity for keys after the query, whose last row is the last key."""
    past = k.shape[2] - q.shape[2]
    rows = torch.arange(q.shape[2], device=q.device)[:, None] + past
    ahead = torch.arange(k.shape[2], device=q.device) > rows
    return torch.where(ahead, -math.inf, 0.0).to(q.dtype)


def total_of(*parts: Tensor | None) -> Tensor | None:
    """The sum of those that are there."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    result = given[0]
    for part in given[1:]:
        result = result + part
    return result


def _attend(
    call: Call,
    projected: Tensor,
    sizes: list[int] | None,
    heads: int,
    mask: Tensor | None,
    past: Tensor | None,
    attention_bias: Tensor | None,
    unidirectional: int,
    scale: float | None,
    fill: float,
) -> Any:
    """Attention of the projections [batch, length, q | k | v], and the keys and values [2, batch, heads, ...]."""
    third = projected.shape[-1] // 3
    q, k, v = (split_heads(part, heads) for part in torch.split(projected, sizes or [third] * 3, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    added = None if mask is None else mask_scores(mask, q.shape[0], k.shape[2], fill, q)
    bias = total_of(added, attention_bias, causal_scores(q, k) if unidirectional else None)
    y = merge_heads(F.scaled_dot_product_attention(q, k, v, bias, scale=scale or None))
    return first(call, y, torch.stack([k, v]) if call.outputs > 1 else None)


@operators.reference("Attention")
def attention(
    call: Call,
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    num_heads: int = 1,
    qkv_hidden_sizes: list[int] | None = None,
    unidirectional: int = 0,
    scale: float | None = None,
    mask_filter_value: float = -10000.0,
    do_rotary: int = 0,
    rotary_embedding_dim: int = 0,
    past_present_share_buffer: int = 0,
) -> Any:
    """Multi-head attention of x @ weights + bias = [q | k | v], and the grown keys and values."""
    require(not do_rotary, "Attention with rotary embedding has no torch reference")
    require(not past_present_share_buffer, "Attention with a shared buffer has no torch reference")
    projected = torch.matmul(x, weights)
    if bias is not None:
        projected = projected + bias
    settings = (unidirectional, scale, mask_filter_value)
    return _attend(call, projected, qkv_hidden_sizes, num_heads, mask_index, past, attention_bias, *settings)


@operators.reference("QAttention")
def q_attention(
    call: Call,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    mask_index: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    weight_zero_point: Tensor | None = None,
    past: Tensor | None = None,
    num_heads: int = 1,
    unidirectional: int = 0,
    scale: float | None = None,
    mask_filter_value: float = -10000.0,
    do_rotary: int = 0,
    past_present_share_buffer: int = 0,
) -> Any:
    """Attention whose projection is an exact product of 8-bit numbers; the rest is in floating point."""
    require(not do_rotary, "QAttention with rotary embedding has no torch reference")
    require(not past_present_share_buffer, "QAttention with a shared buffer has no torch reference")
    projected = matmul_integer_to_float(
        call, x, weight, x_scale.reshape(()), weight_scale, x_zero_point, weight_zero_point, bias
    )
    return _attend(call, projected, None, num_heads, mask_index, past, None, unidirectional, scale, mask_filter_value)


@operators.reference("DecoderMaskedSelfAttention")
def decoder_masked_self_attention(
    call: Call,
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    mask_index: Tensor | None,
    past: Tensor,
    attention_bias: Tensor | None = None,
    *others: Any,
    num_heads: int = 1,
    scale: float | None = None,
    mask_filter_value: float = -10000.0,
    do_rotary: int = 0,
    past_present_share_buffer: int = 0,
) -> Any:
    """Attention of one new token after the past ones."""
    require(not do_rotary, "DecoderMaskedSelfAttention with rotary embedding has no torch reference")
    require(not past_present_share_buffer, "DecoderMaskedSelfAttention with a shared buffer has no torch reference")
    projected = torch.matmul(x, weights) + bias
    return _attend(call, projected, None, num_heads, mask_index, past, attention_bias, 0, scale, mask_filter_value)


def padded(tokens: Tensor, token_offset: Tensor) -> Tensor:
    """[tokens, ..] as [batch * length, ..] with every token at its offset and zeros elsewhere."""
    rows = tokens.new_zeros([token_offset.shape[0] * token_offset.shape[1], *tokens.shape[1:]])
    where = token_offset.reshape(-1)[: tokens.shape[0]].to(torch.int64)
    return rows.index_copy(0, where, tokens)


def packed(rows: Tensor, token_offset: Tensor, count: Any) -> Tensor:
    """The inverse of `padded`: the first `count` tokens."""
    return rows.index_select(0, token_offset.reshape(-1)[:count].to(torch.int64))


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_offset: Tensor,
    cumulative: Tensor,
    attention_bias: Tensor | None,
    heads: int,
    scale: float | None,
) -> Tensor:
    """Attention within every sequence of [tokens, hidden] projections, without a key of another sequence."""
    batch, length = token_offset.shape
    query, key, value = (
        split_heads(padded(part, token_offset).reshape(batch, length, part.shape[-1]), heads) for part in (q, k, v)
    )
    lengths = cumulative[1:] - cumulative[:-1]
    mask = mask_scores(lengths, batch, length, -math.inf, query)
    y = merge_heads(F.scaled_dot_product_attention(query, key, value, total_of(mask, attention_bias), scale=scale))
    return packed(y.reshape(batch * length, y.shape[-1]), token_offset, q.shape[0])


@operators.reference("PackedAttention")
def packed_attention(
    call: Call,
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    token_offset: Tensor,
    cumulative_sequence_length: Tensor,
    attention_bias: Tensor | None = None,
    num_heads: int = 1,
    qkv_hidden_sizes: list[int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the tokens [tokens, hidden] of sequences of different lengths, without padding."""
    projected = torch.matmul(x, weights) + bias
    third = projected.shape[-1] // 3
    q, k, v = torch.split(projected, qkv_hidden_sizes or [third] * 3, -1)
    return attend_packed(q, k, v, token_offset, cumulative_sequence_length, attention_bias, num_heads, scale or None)


@operators.reference("PackedMultiHeadAttention")
def packed_multi_head_attention(
    call: Call,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    token_offset: Tensor,
    cumulative_sequence_length: Tensor,
    attention_bias: Tensor | None = None,
    num_heads: int = 1,
    scale: float | None = None,
    mask_filter_value: float = -10000.0,
) -> Tensor:
    """MultiHeadAttention of the tokens [tokens, hidden] of sequences of different lengths, without padding."""
    if key is None or value is None:
        q, k, v = (part.flatten(1) for part in query.unbind(2))
    else:
        q, k, v = query, key, value
    if bias is not None:
        q_bias, k_bias, v_bias = torch.split(bias, [q.shape[-1], k.shape[-1], v.shape[-1]])
        q, k, v = q + q_bias, k + k_bias, v + v_bias
    return attend_packed(q, k, v, token_offset, cumulative_sequence_length, attention_bias, num_heads, scale or None)
