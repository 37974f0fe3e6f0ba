"""Position biases, rotary embeddings of special models, and padding of token lists, of the domain `com.microsoft`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.lane import to_scalar, to_tensor
from fxopt.ir.onnx.references.attention import merge_heads, rotate, split_heads
from fxopt.ir.onnx.references.common import first, require
from fxopt.ir.onnx.references.contrib_self_attention import packed, padded
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")


@operators.reference("RelativePositionBias", raw=True)
def relative_position_bias(
    call: Call,
    bias_table: Any,
    query_length: Any,
    key_length: Any,
    max_distance: int = 128,
    is_bidirectional: int = 0,
) -> Tensor:
    """The bias of T5 by the bucket of key position minus query position, [1, heads, queries, keys].

    The table is declared as [buckets, heads] and stored heads first. Source: Raffel et al., arXiv 1910.10683.
    """
    table: Tensor = to_tensor(bias_table)
    buckets, heads = table.shape
    rows, columns = to_scalar(query_length), to_scalar(key_length)
    distance = torch.arange(columns, device=table.device) - torch.arange(rows, device=table.device).unsqueeze(1)
    offset = torch.zeros_like(distance)
    if is_bidirectional:
        buckets //= 2
        offset = (distance > 0).to(torch.int64) * buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).to(torch.float32) / exact) / math.log(max_distance / exact)
    far = exact + (growth * (buckets - exact)).to(torch.int64)
    bucket = offset + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
    return table.reshape(heads, table.shape[0])[:, bucket].unsqueeze(0)


@operators.reference("GatedRelativePositionBias")
def gated_relative_position_bias(
    call: Call,
    query_layer: Tensor,
    query_bias: Tensor,
    rel_pos: Tensor,
    weight: Tensor,
    bias: Tensor,
    eco_a: Tensor,
    token_offset: Tensor | None = None,
    num_heads: int = 1,
) -> Tensor:
    """rel_pos * (u * (r * eco_a - 1) + 2) with gates u and r of the query."""
    x = query_layer
    if token_offset is not None:
        x = padded(x, token_offset).reshape(*token_offset.shape, x.shape[-1])
    heads = split_heads(x + query_bias, num_heads)
    projected = torch.matmul(heads, weight) + bias
    gates = torch.sigmoid(projected.reshape([*projected.shape[:-1], 2, projected.shape[-1] // 2]).sum(-1))
    u, r = gates.chunk(2, -1)
    return (u * (r * eco_a - 1.0) + 2.0) * rel_pos


@operators.reference("GemmaRotaryEmbedding")
def gemma_rotary_embedding(
    call: Call, embedding: Tensor, q: Tensor, q_rot: Tensor, k: Tensor, k_rot: Tensor
) -> tuple[Tensor, Tensor]:
    """q * cos + q_rot * sin and k * cos + k_rot * sin, of the sine and cosine of the embedding."""
    sine, cosine = embedding.sin().to(q.dtype).unsqueeze(1), embedding.cos().to(q.dtype).unsqueeze(1)
    return q * cosine + q_rot * sine, k * cosine + k_rot * sine


@operators.reference("MRotaryEmbedding")
def m_rotary_embedding(
    call: Call,
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    mrope_section: list[int],
    mrope_layout: int = 0,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
    is_packed_batching: int = 0,
) -> Tensor:
    """Rotary embedding whose angles come from three positions (time, height, width), each for a part of the angles."""
    require(not is_packed_batching and scale == 1.0, "MRotaryEmbedding of packed batches or with a scale")
    half = cos_cache.shape[1]
    if mrope_layout:
        source = torch.zeros(half, dtype=torch.int64)
        for stream in (1, 2):
            source[stream : 3 * mrope_section[stream] : 3] = stream
    else:
        source = torch.repeat_interleave(torch.arange(3), torch.tensor(mrope_section))
    source = source.to(x.device)

    def angles(cache: Tensor) -> Tensor:
        streams = F.embedding(position_ids, cache)  # [3, batch, length, half]
        index = source.expand(1, *streams.shape[1:])
        return streams.gather(0, index).squeeze(0).unsqueeze(1)

    flat = x.dim() == 3
    heads = split_heads(x, num_heads if rotary_embedding_dim else x.shape[2] // (2 * half)) if flat else x
    turned = rotate(heads[..., : 2 * half], angles(cos_cache), angles(sin_cache), bool(interleaved))
    y = torch.cat([turned, heads[..., 2 * half :]], -1)
    return merge_heads(y) if flat else y


@operators.reference("RemovePadding")
def remove_padding(call: Call, x: Tensor, sequence_token_count: Tensor) -> Any:
    """The tokens without padding, the offsets of tokens and then of padding, cumulated lengths, the largest length."""
    batch, length = x.shape[0], x.shape[1]
    counts = sequence_token_count.to(torch.int64)
    token = torch.arange(length, device=x.device) < counts.unsqueeze(1)
    offset = torch.argsort((~token).reshape(-1).to(torch.int8), stable=True)
    y = packed(x.reshape(batch * length, x.shape[2]), offset, int(counts.sum()))
    cumulated = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return first(
        call, y, offset.reshape(batch, length).to(torch.int32), cumulated, counts.amax().reshape(1).to(torch.int32)
    )


@operators.reference("RestorePadding")
def restore_padding(call: Call, x: Tensor, token_offset: Tensor) -> Tensor:
    """The tokens [tokens, hidden] at their offsets in [batch, length, hidden], zeros elsewhere."""
    return padded(x, token_offset).reshape(*token_offset.shape, x.shape[-1])
