"""Meta tensors for every kernel: what the tables are made of, and what tests compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.backends.triton.formats import COLUMNS, LAYOUTS, ROWS, scales_weights
from fxopt.backends.triton.ops.decode_attention import decode_attention
from fxopt.backends.triton.ops.linear_int8 import linear_int8
from fxopt.backends.triton.ops.linear_packed import linear_packed
from fxopt.backends.triton.ops.pattern_attention import pattern_attention
from fxopt.backends.triton.ops.registry import KernelOp
from fxopt.ir.ops.attention_pattern import diagonal, diagonals

ELEMENTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_SIZE = 4096


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def arguments_for(key: str) -> tuple[KernelOp[...], tuple[Any, ...]]:
    """The operator that a key of the tables is about, and arguments that lead to it."""
    name, *parts = key.split("/")
    if name in LAYOUTS:
        return linear_packed, _packed(name, parts[0], int(parts[1]), parts[2])
    if name.startswith("w8a8"):
        return linear_int8, _integers(int(parts[0]))
    if name == "decode_attention":
        element, rows, width, masked = ELEMENTS[parts[0]], int(parts[1]), int(parts[2]), int(parts[3])
        kv = meta(1, 4, 8192, width, dtype=element)
        mask = {0: None, 1: meta(1, 1, 1, 8192, dtype=torch.bool), 2: meta(1, 1, 1, 8192, dtype=element)}[masked]
        return decode_attention, (meta(1, 4 * rows, 1, width, dtype=element), kv, kv, mask, 0.1)
    assert name == "pattern_attention", key
    pattern = diagonals(8, 512) if parts[2] == "renumbered" else diagonal(256)
    x = meta(1, 4, 2048, int(parts[1]), dtype=ELEMENTS[parts[0]])
    return pattern_attention, (x, x, x, list(pattern) * 4, 0.1)


def _packed(name: str, element: str, rows: int, how: str) -> tuple[Any, ...]:
    layout, dtype = LAYOUTS[name], ELEMENTS[element]
    how, _, whole = how.partition("-")
    group = 0 if whole else 32 if how == "scaled" else 128
    has_offsets = how == "offset"
    kept = dtype if scales_weights(group, has_offsets) else torch.float16
    words = meta(_SIZE // layout.tile, -(-_SIZE // ROWS) * ROWS, COLUMNS, dtype=torch.int32)
    scales = meta(_SIZE // group if group else 1, words.shape[1], dtype=kept)
    factors = meta(words.shape[1])
    x = meta(rows, _SIZE, dtype=dtype)
    offsets = scales if has_offsets else None
    return x, words, scales, offsets, factors, None, None, str(layout), _SIZE, _SIZE, group, "", ""


def _integers(rows: int) -> tuple[Any, ...]:
    codes = meta(_SIZE, _SIZE, dtype=torch.int8)
    x, numbers = meta(rows, _SIZE, dtype=torch.float16), meta(_SIZE)
    return x, codes, numbers, numbers.to(torch.int32), None, None, None, None, "", ""
