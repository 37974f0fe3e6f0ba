"""Codes of fewer than eight bits, packed: the canonical storage of weights in a graph.

Version 1: the codes of a row form one little-endian bit stream, code i in bits i*bits ... (i+1)*bits - 1, padded with
zeros to whole bytes. Four-bit codes are two per byte, the first one in the low half.
"""

from __future__ import annotations

import torch
from torch import Tensor

VERSION = 1
_CHUNK = 1 << 22  # codes that are expanded at a time


def packed_width(columns: int, bits: int) -> int:
    """Bytes per row."""
    return (columns * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [rows, columns] with values below 2 ** bits -> uint8 [rows, packed_width].

    Raises:
        ValueError: a code does not fit, or `bits` is not 1 to 8.
    """
    _check(bits)
    if codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"the code {int(codes.max())} does not fit into {bits} bits")
    if bits == 8:
        return codes.contiguous()
    rows, columns = codes.shape
    width = packed_width(columns, bits)
    if 8 % bits == 0:
        per_byte = 8 // bits
        padded = torch.nn.functional.pad(codes, (0, width * per_byte - columns)).reshape(rows, width, per_byte)
        result = torch.zeros(rows, width, dtype=torch.uint8)
        for index in range(per_byte):
            result |= padded[..., index] << (bits * index)
        return result
    result = torch.empty(rows, width, dtype=torch.uint8)
    for rows_now in _chunks(rows, columns):
        stream = (codes[rows_now, :, None] >> torch.arange(bits, dtype=torch.uint8)) & 1
        stream = torch.nn.functional.pad(stream.flatten(1), (0, width * 8 - columns * bits))
        weights = 1 << torch.arange(8, dtype=torch.uint8)
        result[rows_now] = (stream.reshape(-1, width, 8) * weights).sum(-1, dtype=torch.uint8)
    return result


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 [rows, packed_width] -> uint8 [rows, columns]."""
    _check(bits)
    if bits == 8:
        return packed
    rows, width = packed.shape
    if 8 % bits == 0:
        parts = [(packed >> (bits * index)) & ((1 << bits) - 1) for index in range(8 // bits)]
        return torch.stack(parts, -1).reshape(rows, width * (8 // bits))[:, :columns]
    chunks = []
    for rows_now in _chunks(rows, columns):
        stream = (packed[rows_now, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        stream = stream.reshape(-1, width * 8)[:, : columns * bits].reshape(-1, columns, bits)
        chunks.append((stream * (1 << torch.arange(bits, dtype=torch.uint8))).sum(-1, dtype=torch.uint8))
    return torch.cat(chunks) if chunks else packed.new_empty(0, columns)


def _chunks(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"{bits} bits per code; expected 1 to 8")
