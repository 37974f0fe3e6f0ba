"""DeformConv: convolution whose kernel reads at positions moved by an offset (Dai et al. 2017, Zhu et al. 2019)."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.onnx.references.common import along, product
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def _positions(offset: Tensor, kernel: list[int], strides: Any, dilations: Any, pads: Any) -> list[Tensor]:
    """Where every kernel element reads, per spatial axis: [N, groups, kernel elements, *output sizes]."""
    rank, out = len(kernel), offset.shape[4:]
    elements = torch.cartesian_prod(*[torch.arange(size, device=offset.device) for size in kernel]).reshape(-1, rank)
    found = []
    for axis in range(rank):
        starts = torch.arange(out[axis], device=offset.device) * strides[axis] - pads[axis]
        fixed = along(starts, rank, axis) + (elements[:, axis] * dilations[axis]).reshape([-1] + [1] * rank)
        found.append(fixed.to(offset.dtype) + offset[:, :, :, axis])
    return found


def _sampled(x: Tensor, positions: list[Tensor]) -> Tensor:
    """x [N, groups, channels, *sizes] at the positions, interpolated linearly, 0 outside: [.., channels, *places]."""
    sizes = x.shape[3:]
    flat = x.flatten(3)
    total: Any = 0
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        index, weight = torch.zeros_like(positions[0], dtype=torch.int64), torch.ones_like(positions[0])
        for size, position, upper in zip(sizes, positions, corner, strict=True):
            low = position.floor()
            place = low.to(torch.int64) + upper
            share = position - low if upper else 1 - (position - low)
            weight = weight * torch.where((place >= 0) & (place < size), share, torch.zeros_like(share))
            index = index * size + place.clamp(0, size - 1)
        taken = flat.gather(3, index.flatten(2).unsqueeze(2).expand(-1, -1, flat.shape[2], -1))
        total = total + taken.reshape([*flat.shape[:3], *index.shape[2:]]) * weight.unsqueeze(2)
    result: Tensor = total
    return result


@operators.reference("DeformConv")
def deform_conv(
    call: Call,
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    offset_group: int = 1,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """x [N, C, *sizes] convolved with a weight [outputs, C / group, *kernel]: [N, outputs, *output sizes].

    Args:
        offset: [N, offset_group * kernel elements * axes, *output sizes], in pixels.
        mask: a factor for every kernel element, [N, offset_group * kernel elements, *output sizes].
    """
    kernel = kernel_shape or list(weight.shape[2:])
    rank, out = len(kernel), list(offset.shape[2:])
    moved = offset.reshape([x.shape[0], offset_group, product(kernel), rank, *out])
    positions = _positions(moved, kernel, strides or [1] * rank, dilations or [1] * rank, pads or [0] * rank)
    columns = _sampled(x.reshape([x.shape[0], offset_group, x.shape[1] // offset_group, *x.shape[2:]]), positions)
    if mask is not None:
        columns = columns * mask.reshape([x.shape[0], offset_group, 1, product(kernel), *out])
    columns = columns.reshape(x.shape[0], group, -1, product(out))
    y = torch.matmul(weight.reshape(group, weight.shape[0] // group, -1), columns)
    y = y.reshape([x.shape[0], weight.shape[0], *out])
    return y if bias is None else y + along(bias, rank + 2, 1)
