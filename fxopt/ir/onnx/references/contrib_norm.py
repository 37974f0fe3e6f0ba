"""Normalisations of the domain `com.microsoft`: group norm, embeddings with layer norm, gated and per branch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.common import along, at_least_float32, first, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("com.microsoft")


def _group_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, epsilon: float, channels_last: int, activation: int
) -> Tensor:
    """Group norm with an affine part in the type of gamma, then SiLU where `activation` is 1."""
    require(activation in (0, 1), f"GroupNorm with activation {activation} has no torch reference")
    first_ = x.movedim(-1, 1) if channels_last else x
    wide = at_least_float32(first_)
    y = F.group_norm(wide, groups, gamma.to(wide.dtype), beta.to(wide.dtype), epsilon)
    y = F.silu(y) if activation else y
    return (y.movedim(1, -1) if channels_last else y).to(x.dtype)


@operators.reference("GroupNorm")
def group_norm(
    call: Call,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int = 1,
    epsilon: float = 1e-5,
    channels_last: int = 1,
    activation: int = 0,
) -> Tensor:
    """gamma * (x - mean) / sqrt(variance + epsilon) + beta per group of channels, then SiLU."""
    return _group_norm(x, gamma, beta, groups, epsilon, channels_last, activation)


@operators.reference("SkipGroupNorm")
def skip_group_norm(
    call: Call,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    skip: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    epsilon: float = 1e-5,
    channels_last: int = 1,
    activation: int = 0,
) -> Any:
    """GroupNorm of s = x + skip + bias, and s."""
    channel = x.dim() - 1 if channels_last else 1
    if skip.dim() == 2:
        shape = [1] * x.dim()
        shape[0], shape[channel] = skip.shape
        skip = skip.reshape(shape)
    total = x + skip
    if bias is not None:
        total = total + along(bias, x.dim(), channel)
    return first(call, _group_norm(total, gamma, beta, groups, epsilon, channels_last, activation), total)


def _embedded(
    call: Call,
    input_ids: Tensor,
    segment_ids: Tensor | None,
    tables: tuple[Tensor, Tensor, Tensor | None],
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    epsilon: float,
) -> Any:
    """layer_norm(word + position + segment), the number of tokens of every sequence, the sum."""
    words, positions, segments = tables
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    total = F.embedding(input_ids, words) + F.embedding(position_ids, positions)
    if segments is not None and segment_ids is not None:
        total = total + F.embedding(segment_ids, segments)
    y = F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
    batch = input_ids.shape[0]
    count = input_ids.new_zeros(batch, dtype=torch.int32) if mask is None else (mask == 1).sum(1).to(torch.int32)
    return first(call, y, count, total)


@operators.reference("EmbedLayerNormalization")
def embed_layer_normalization(
    call: Call,
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding: Tensor,
    position_embedding: Tensor,
    segment_embedding: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    epsilon: float = 1e-12,
    mask_index_type: int = 0,
) -> Any:
    """layer_norm of the sum of word, position and segment embeddings; also the tokens per sequence, and the sum."""
    tables = (word_embedding, position_embedding, segment_embedding)
    return _embedded(call, input_ids, segment_ids, tables, gamma, beta, mask, position_ids, epsilon)


@operators.reference("QEmbedLayerNormalization")
def q_embed_layer_normalization(
    call: Call,
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word: Tensor,
    position: Tensor,
    segment: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None,
    word_scale: Tensor,
    position_scale: Tensor,
    segment_scale: Tensor | None,
    gamma_scale: Tensor,
    beta_scale: Tensor,
    word_zero: Tensor,
    position_zero: Tensor,
    segment_zero: Tensor | None,
    gamma_zero: Tensor,
    beta_zero: Tensor,
    epsilon: float = 1e-12,
) -> Any:
    """EmbedLayerNormalization with 8-bit tables and parameters, each with one scale and zero point."""

    def real(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (x.to(torch.int32) - zero.to(torch.int32)).to(scale.dtype) * scale

    segments = None
    if segment is not None and segment_scale is not None and segment_zero is not None:
        segments = real(segment, segment_scale, segment_zero)
    tables = (real(word, word_scale, word_zero), real(position, position_scale, position_zero), segments)
    scale, shift = real(gamma, gamma_scale, gamma_zero), real(beta, beta_scale, beta_zero)
    return _embedded(call, input_ids, segment_ids, tables, scale, shift, mask, None, epsilon)


def _rms(x: Tensor, epsilon: float) -> Tensor:
    """x / root mean square of its last axis, at least in float32."""
    wide = at_least_float32(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)


@operators.reference("GatedRMSNorm")
def gated_rms_norm(
    call: Call, x: Tensor, scale: Tensor, gate: Tensor, activation: str = "silu", epsilon: float = 1e-5
) -> Tensor:
    """rms_norm(x) * scale * activation(gate), normalised over groups of as many elements as `scale` has."""
    require(str(activation) in ("silu", "swish", "sigmoid"), f"GatedRMSNorm with activation {activation!r}")
    groups = x.reshape([*x.shape[:-1], x.shape[-1] // scale.shape[0], scale.shape[0]])
    y = (_rms(groups, epsilon) * scale).reshape(x.shape)
    wide = at_least_float32(gate)
    return (y * (torch.sigmoid(wide) if str(activation) == "sigmoid" else F.silu(wide))).to(x.dtype)


def _branches(x: Tensor, count: int) -> Tensor:
    """[.., count * size] as [.., count, size]; unchanged where `count` is 0."""
    return x.reshape([*x.shape[:-1], count, x.shape[-1] // count]) if count else x


@operators.reference("BranchwiseRMSNorm")
def branchwise_rms_norm(
    call: Call, x: Tensor, scale: Tensor | None = None, epsilon: float = 1e-5, num_branches: int = 0
) -> Tensor:
    """rms_norm over the last axis of [.., branches, size], which may be flattened to one axis, times the scale."""
    grouped = _branches(x, num_branches)
    y = _rms(grouped, epsilon)
    if scale is not None:
        whole = scale.dim() == 1 and scale.shape[0] != grouped.shape[-1]
        y = y * (scale.reshape(grouped.shape[-2:]) if whole else scale)
    return y.to(x.dtype).reshape(x.shape)


@operators.reference("EngramGate")
def engram_gate(
    call: Call,
    key: Tensor,
    query: Tensor,
    value: Tensor,
    key_norm_scale: Tensor,
    query_norm_scale: Tensor,
    conv_norm_scale: Tensor | None = None,
    epsilon: float = 1e-5,
) -> Any:
    """sigmoid(sign(d) * sqrt(max(|d|, 1e-6))) * value, d = rms(key) . rms(query) / sqrt(size); also its rms norm."""
    keys, queries = _rms(key, epsilon) * key_norm_scale, _rms(query, epsilon) * query_norm_scale
    dot = (keys * queries).sum(-1, keepdim=True) / math.sqrt(key.shape[-1])
    gate = torch.sigmoid(torch.sign(dot) * dot.abs().clamp(min=1e-6).sqrt())
    y = gate * at_least_float32(value).unsqueeze(2)
    normed = None if conv_norm_scale is None else (_rms(y, epsilon) * conv_norm_scale).to(value.dtype)
    return first(call, y.to(value.dtype), normed)


@operators.reference("HyperConnectionPreMix")
def hyper_connection_pre_mix(
    call: Call, streams: Tensor, pre_mix: Tensor, num_branches: int = 0, reduction_scale: float = 1.0
) -> Tensor:
    """reduction_scale * the sum over the branches of streams * pre_mix."""
    x = _branches(streams, num_branches)
    mix = pre_mix
    if mix.dim() == x.dim() - 1:
        flat = bool(num_branches) and mix.shape[-1] == streams.shape[-1] and mix.shape[-1] != x.shape[-2]
        mix = _branches(mix, num_branches) if flat else mix.unsqueeze(-1)
    return ((at_least_float32(x) * at_least_float32(mix)).sum(-2) * reduction_scale).to(streams.dtype)


@operators.reference("HyperConnectionPostMix")
def hyper_connection_post_mix(
    call: Call,
    streams: Tensor,
    block_output: Tensor,
    post_mix: Tensor,
    stream_mix: Tensor | None = None,
    num_branches: int = 0,
) -> Tensor:
    """stream_mix' @ streams (the identity where omitted) + post_mix * block_output, per branch."""
    x = at_least_float32(_branches(streams, num_branches))
    mixed = x if stream_mix is None else torch.matmul(at_least_float32(stream_mix).transpose(-1, -2), x)
    gates = post_mix.unsqueeze(-1) if post_mix.dim() == x.dim() - 1 else post_mix
    y = mixed + at_least_float32(gates) * at_least_float32(block_output).unsqueeze(-2)
    return y.to(streams.dtype).reshape(streams.shape)
