"""Norm, product of queries, keys and values with packed weights, rotary embedding and heads: two launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.backends.triton.epilogues import Epilogue
from fxopt.backends.triton.formats import Packed, dequantized, parse
from fxopt.backends.triton.launch import launch
from fxopt.backends.triton.ops.linear_packed import partial_sums
from fxopt.backends.triton.ops.registry import KernelOp

_BLOCK = 1024  # inputs that are squared at a time


def _reference(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    factors: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    layout: str,
    outputs: int,
    columns: int,
    group: int,
    heads: int,
    kv_heads: int,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    packed = Packed(parse(layout), words, scales, offsets, factors, outputs, columns, group)
    wide = x.float()
    if eps is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = torch.nn.functional.linear(wide, dequantized(packed), None if bias is None else bias.float())
    y = y.reshape(*x.shape[:-1], heads + 2 * kv_heads, -1).transpose(1, 2)
    q, k, v = torch.split(y, [heads, kv_heads, kv_heads], 1)
    if cos is not None and sin is not None:
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    return q.to(x.dtype).contiguous(), k.to(x.dtype).contiguous(), v.to(x.dtype).contiguous()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [batch, heads, length, width]; cos, sin [batch, length, width]."""
    low, high = x.chunk(2, -1)
    return x * cos.float()[:, None] + torch.cat([-high, low], -1) * sin.float()[:, None]


def _kernels(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same with kernels; arguments as those of the reference."""
    from fxopt.backends.triton.kernels.qkv_rope import qkv_rope

    x, words, scales, offsets, factors, bias, cos, sin, layout, outputs, columns, group, heads, kv_heads, eps = flat
    packed = Packed(parse(layout), words, scales, offsets, factors, outputs, columns, group)
    batch, length, _ = x.shape
    width = outputs // (heads + 2 * kv_heads)
    rows = x.reshape(batch * length, columns).contiguous()
    made = [x.new_empty(batch, count, length, width) for count in (heads, kv_heads, kv_heads)]
    if not len(rows):
        return made[0], made[1], made[2]
    parts = partial_sums(rows, packed, None, Epilogue())
    assert parts is not None
    angles = (x, x) if cos is None else tuple(table.expand(batch, length, width) for table in (cos, sin))
    angles = tuple(table if table.stride(-1) == 1 else table.contiguous() for table in angles)
    if angles[0].stride() != angles[1].stride():
        angles = tuple(table.contiguous() for table in angles)
    arguments = (
        parts, rows, rows if bias is None else bias, *angles, *made, len(rows), len(parts), columns, rows.stride(0),
        length, angles[0].stride(0), angles[0].stride(1), eps or 0.0,
    )  # fmt: skip
    constants = {
        "HEADS": heads, "KV_HEADS": kv_heads, "D": width, "HALF": 1 << (max(1, width // 2) - 1).bit_length(),
        "ROTATED": cos is not None, "NORM": eps is not None, "HAS_BIAS": bias is not None, "BLOCK": _BLOCK,
    }  # fmt: skip
    launch(qkv_rope, (len(rows), heads + 2 * kv_heads), arguments, constants, 1, 1)
    return made[0], made[1], made[2]


qkv_packed = KernelOp("qkv_packed", _reference, _kernels)
