"""Linear whose weights are signs and powers of two, with a scale per output and group of inputs.

Source: You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer" (2023),
with exponents clamped to -6 ... 0 as its 4-bit form does, and zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.ops.linear_nbits import group_count
from fxopt.ir.packing import pack, unpack
from fxopt.ir.target import Cost

BITS = 4
_LARGEST = 7  # the code whose value is one


def shift_values(codes: Tensor) -> Tensor:
    """The weights of codes 0 ... 15, float32: bit 3 is the sign, bits 0 to 2 stand for 2 ** (c - 7), or 0 for c = 0."""
    place = (codes & 7).float()
    magnitude = torch.where(place > 0, torch.exp2(place - _LARGEST), 0.0)
    return torch.where(codes > _LARGEST, -magnitude, magnitude)


def shift_codes(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [out, in] and scales float32 [out, groups] of a weight [out, in]: the nearest exponents."""
    out, columns = weight.shape
    groups = group_count(columns, group)
    blocks = torch.nn.functional.pad(weight.float(), (0, groups * group - columns)).reshape(out, groups, group)
    scales = blocks.abs().amax(-1)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    relative = (blocks / scales[..., None]).reshape(out, -1)[:, :columns]
    place = (torch.log2(relative.abs().clamp(min=2.0**-20)).round() + _LARGEST).clamp(0, _LARGEST)
    return place.to(torch.uint8) | (relative < 0).to(torch.uint8) << 3, scales


@op
def linear_shift(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, columns: int, group: int) -> Tensor:
    """y = x @ (+-2 ** exponents * scales).T + bias, in the type of x.

    Args:
        x: float [..., in].
        packed: uint8 [out, ceil(in / 2)], codes (see `shift_values`) in the layout of `fxopt.ir.packing`.
        scales: float32 [out, groups], groups = ceil(in / group).
        bias: float [out] or None.
        columns: in.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = shift_values(unpack(packed, BITS, columns)).to(wide)
    weight = weight * scales.to(wide).repeat_interleave(group, 1)[:, :columns]
    y = torch.nn.functional.linear(x.to(wide), weight, None if bias is None else bias.to(wide))
    return y.to(x.dtype)


@linear_shift.cost
def _(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, columns: int, group: int) -> Cost:
    from fxopt.ir.ops.linear_nbits import linear_nbits

    cost = linear_nbits.cost_of(x, packed, scales, None, bias, columns, BITS, group, 16)
    return replace(cost, form=(("op", "linear_shift"), *cost.form[1:]))


@linear_shift.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, out, group in (((4, 64), 8, 32), ((2, 3, 50), 5, 16), ((0, 32), 4, 32), ((1, 128), 3, 128)):
        x = torch.randn(shape, generator=generator)
        codes, scales = shift_codes(torch.randn(out, shape[-1], generator=generator), group)
        bias = torch.randn(out, generator=generator)
        yield x, pack(codes, BITS), scales, bias, shape[-1], group
        yield x, pack(codes, BITS), scales, None, shape[-1], group
