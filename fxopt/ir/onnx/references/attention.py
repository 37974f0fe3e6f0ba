"""Scaled dot product attention (opsets 23 to 25) and rotary position embedding (23)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.dtypes import TO_TORCH
from fxopt.ir.onnx.references.common import along, first, pad_with, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_HALF = (torch.float16, torch.bfloat16)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads * size] as [batch, heads, length, size]."""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[batch, heads, length, size] as [batch, length, heads * size]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], x.shape[1] * x.shape[3])


def _to_length(mask: Tensor, length: Any) -> Tensor:
    """The mask with 4 axes; a shorter last axis is padded with "not attended"."""
    missing = length - mask.shape[-1]
    if missing > 0:
        mask = pad_with(mask, [0, missing], value=False if mask.dtype == torch.bool else -math.inf)
    return mask.reshape([1] * (4 - mask.dim()) + list(mask.shape)) if mask.dim() < 4 else mask


def _positions(q: Tensor, k: Tensor, past: Any, nonpad: Tensor | None) -> Tensor:
    """For every query and key: key position minus query position, [.., queries, keys]."""
    queries = torch.arange(q.shape[2], device=q.device).unsqueeze(1)
    keys = torch.arange(k.shape[2], device=q.device)
    if nonpad is None:
        return (keys - queries).sub(past)
    offset = along(nonpad.to(torch.int64) - q.shape[2], 4, 0)
    return keys - queries - offset


def _allowed(q: Tensor, k: Tensor, past: Any, nonpad: Tensor | None, causal: bool, windows: tuple[int, int]) -> Any:
    """Which keys a query may attend by causality, window and valid length; None when all."""
    tests = []
    left, right = windows
    if causal or left >= 0 or right >= 0:
        distance = _positions(q, k, past, nonpad)
        if causal:
            tests.append(distance <= 0)
        if left >= 0:
            tests.append(-distance <= left)
        if right >= 0:
            tests.append(distance <= right)
    if nonpad is not None:
        tests.append(torch.arange(k.shape[2], device=q.device) < along(nonpad.to(torch.int64), 4, 0))
    if not tests:
        return None
    result = tests[0]
    for test in tests[1:]:
        result = result & test
    return result


def _combine(mask: Tensor | None, allowed: Tensor | None) -> Tensor | None:
    """One mask, boolean or additive, out of the two."""
    if mask is None or allowed is None:
        return allowed if mask is None else mask
    if mask.dtype == torch.bool:
        return mask & allowed
    return torch.where(allowed, mask, torch.full_like(mask, -math.inf))


def _softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis; 16-bit numbers are rounded at every step, as the specification's function does."""
    if x.dtype not in _HALF:
        return torch.softmax(x, -1)
    exponential = torch.exp(x - x.amax(-1, keepdim=True))
    return exponential / exponential.sum(-1, keepdim=True)


def _keeps(precision: Any, dtype: torch.dtype) -> bool:
    """Whether the softmax is computed in the type of the scores."""
    return precision is None or dtype in (torch.float64, TO_TORCH[precision])


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, precision: Any, mode: int
) -> tuple[Tensor, Tensor]:
    """Attention step by step: the output, and the scores at the stage that `mode` names."""
    repeats = q.shape[1] // k.shape[1]
    if repeats != 1:
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    root = torch.scalar_tensor(math.sqrt(scale), dtype=q.dtype, device=q.device)  # the function rounds it too
    scores = torch.matmul(q * root, (k * root).transpose(2, 3))
    stages = [scores]
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    stages.append(scores)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    if mask is not None:
        scores = scores + mask
    stages.append(scores)
    wide = scores if _keeps(precision, q.dtype) else scores.to(TO_TORCH[precision])
    weights = _softmax(wide)
    if mask is not None:
        empty = (mask == -math.inf).all(-1, keepdim=True)
        weights = torch.where(empty, torch.zeros_like(weights), weights)
    weights = weights.to(q.dtype)
    stages.append(weights)
    return torch.matmul(weights, v), stages[mode]


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """torch's own attention; where heads share none, it divides by zero and ends the process."""
    grouped = bool(q.shape[1] != k.shape[1])
    require(not grouped or bool(k.shape[1] and v.shape[1]), "no heads of keys or values")
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, softcap: float) -> Tensor:
    """softmax(scale * q @ k' + mask) @ v, the scores bounded by `softcap` when it is not 0."""
    if not softcap:
        return _fused(q, k, v, mask, False, scale)
    return _explicit(q, k, v, mask, scale or 1 / math.sqrt(q.shape[3]), softcap, None, 0)[0]


@operators.reference("Attention")
def attention(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
) -> Any:
    """softmax(scale * q @ k' + mask) @ v per head, the grown key and value, and the scores.

    Inputs have 3 axes (heads in the last) or 4; a query with no key to attend gives zeros.
    """
    flat = q.dim() == 3
    if flat:
        assert q_num_heads is not None and kv_num_heads is not None
        q, k, v = split_heads(q, q_num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    past: Any = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    windows = (left_window_size, right_window_size)
    fused = call.outputs < 4 and not softcap and _keeps(softmax_precision, q.dtype) and q.dtype not in _HALF
    plain = mask is None and past_key is None and nonpad_kv_seqlen is None and windows == (-1, -1)
    if fused and plain:  # torch's causal mask is aligned top left, as here where there is no past
        causal, both = bool(is_causal), None
    else:
        allowed = _allowed(q, k, past, nonpad_kv_seqlen, bool(is_causal), windows)
        causal, both = False, _combine(None if mask is None else _to_length(mask, k.shape[2]), allowed)
    if fused:
        y = _fused(q, k, v, both, causal, scale)
        return first(call, merge_heads(y) if flat else y, k, v)
    y, scores = _explicit(q, k, v, both, scale, softcap, softmax_precision, qk_matmul_output_mode)
    return first(call, merge_heads(y) if flat else y, k, v, scores)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs of x, halves apart or (interleaved) neighbours, turned by the angle of cos and sin."""
    if interleaved:
        real, imaginary = x.reshape([*x.shape[:-1], x.shape[-1] // 2, 2]).unbind(-1)
    else:
        real, imaginary = x.chunk(2, -1)
    turned = (cos * real - sin * imaginary, sin * real + cos * imaginary)
    if interleaved:
        return torch.stack(turned, -1).flatten(-2)
    return torch.cat(turned, -1)


@operators.reference("RotaryEmbedding")
def rotary_embedding(
    call: Call,
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """x with its first `rotary_embedding_dim` (default all) entries per head turned by position-dependent angles."""
    flat = x.dim() == 3
    heads = split_heads(x, num_heads) if flat else x
    if position_ids is not None:
        cos_cache, sin_cache = F.embedding(position_ids, cos_cache), F.embedding(position_ids, sin_cache)
    cos, sin = cos_cache.unsqueeze(1), sin_cache.unsqueeze(1)
    if rotary_embedding_dim:
        turned = rotate(heads[..., :rotary_embedding_dim], cos, sin, bool(interleaved))
        heads = torch.cat([turned, heads[..., rotary_embedding_dim:]], -1)
    else:
        heads = rotate(heads, cos, sin, bool(interleaved))
    return merge_heads(heads) if flat else heads
