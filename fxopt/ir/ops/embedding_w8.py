"""Lookup in a table whose rows have 8-bit codes, symmetric with a scale per row.

Source: the symmetric quantiser of Krishnamoorthi (2018), one range per row of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.target import Cost


@op
def embedding_w8(codes: Tensor, scales: Tensor, indices: Tensor) -> Tensor:
    """y = codes[indices] * scales[indices], float32 [*indices, features]: only the rows that are looked up are read.

    Args:
        codes: int8 [rows, features].
        scales: float32 [rows, 1].
        indices: integers in -rows ... rows - 1, of any shape.
    """
    look_up = torch.ops.aten.index.Tensor  # `codes[indices]` would read a scalar index on the host
    rows: Tensor = look_up(codes, [indices]).float() * look_up(scales, [indices])
    return rows


_OPERATIONS = 2.0  # per element: conversion and product
_LAUNCHES = 4  # two lookups, conversion and product: no runtime fuses them


@embedding_w8.cost
def _(codes: Tensor, scales: Tensor, indices: Tensor) -> Cost:
    from fxopt.ir.graph import hint

    count = 1
    for dim in indices.shape:
        count *= hint(dim)
    elements = float(count * codes.shape[1])
    moved = elements * (codes.itemsize + scales.itemsize) + count * (scales.itemsize + indices.itemsize)
    return Cost(_OPERATIONS * elements, moved, "float32", "quantize", _LAUNCHES)


@embedding_w8.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for rows, features, shape in ((20, 16, (2, 3)), (5, 7, (4,)), (1, 3, ()), (9, 8, (2, 0)), (300, 1, (1, 5))):
        codes = torch.randint(-127, 128, (rows, features), generator=generator, dtype=torch.int8)
        scales = torch.rand(rows, 1, generator=generator) * 0.1 + 0.01
        yield codes, scales, torch.randint(-rows, rows, shape, generator=generator)
