"""Attention of a few queries over many keys, as in decoding; heads may share keys and values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxopt.backends.triton.chips import chip_for
from fxopt.backends.triton.configs import DECODE_ROWS, ELEMENTS, decode_key, key_splits, padded
from fxopt.backends.triton.launch import launch
from fxopt.backends.triton.ops.registry import KernelOp, usable


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    times = q.shape[1] // k.shape[1]
    keys, values = (tensor.float().repeat_interleave(times, 1) for tensor in (k, v))
    scores = torch.matmul(q.float(), keys.transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1)
    unseen = (scores == float("-inf")).all(-1, keepdim=True)
    return torch.matmul(weights.masked_fill(unseen, 0.0), values).to(q.dtype)


def refusal(queries: int, heads: int, kv_heads: int, width: int, element: torch.dtype) -> str:
    """Why attention of these sizes has no such kernel; "" when it has."""
    if element not in ELEMENTS:
        return f"the operands are {element}; it takes float16 and bfloat16"
    rows = queries * heads // max(1, kv_heads)
    if rows > DECODE_ROWS[-1]:
        each = heads // max(1, kv_heads)
        return f"{queries} queries of {each} heads per key head are {rows} rows; it takes {DECODE_ROWS[-1]}"
    if width > 256:
        return f"heads of width {width}; it takes 256"
    return ""


def _kernels(*flat: Any) -> Tensor:
    """The same with kernels; arguments as those of the reference."""
    from fxopt.backends.triton.kernels.decode_attention import decode_attention as kernel
    from fxopt.backends.triton.kernels.decode_combine import decode_combine

    q, k, v, mask, scale = flat
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    rows, pairs = heads // kv_heads * queries, batch * kv_heads
    y = torch.empty(batch, heads, queries, width, dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    splits = key_splits(chip_for(q), pairs, keys)
    sums = torch.empty(splits, pairs, rows, width, dtype=torch.float32, device=q.device)
    statistics = torch.empty(2, splits, pairs, rows, dtype=torch.float32, device=q.device)
    if mask is None:
        masked, strides = 0, (0, 0, 0, 0)
    else:
        mask = mask.expand(batch, heads, queries, keys)
        masked, strides = 1 if mask.dtype == torch.bool else 2, mask.stride()
    choice = usable(chip_for(q), decode_key(q.dtype, rows, width, masked))
    wide = padded(width)
    arguments = (
        q, k, v, q if mask is None else mask, sums, statistics, keys, -(-keys // splits), rows, kv_heads, queries,
        scale * math.log2(math.e), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
    )  # fmt: skip
    constants = {"D": width, "D2": wide, "MASKED": masked, **choice.constants}
    launch(kernel, (pairs, splits), arguments, constants, choice.warps, choice.stages)
    combined = (sums, statistics, y, splits, pairs * rows)
    launch(decode_combine, (pairs * rows,), combined, {"D": width, "D2": wide}, 1, 1)
    return y


decode_attention = KernelOp("decode_attention", _reference, _kernels)
