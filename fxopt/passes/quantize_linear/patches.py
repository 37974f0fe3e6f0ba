"""What the kernel of a convolution sees at each position: a convolution is a linear over these rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fxopt.ir.graph import Graph
from fxopt.ir.views.conv import Conv


def patch_rows(graph: Graph, view: Conv) -> Callable[[Tensor], Tensor]:
    """`patches` of the values that a convolution takes."""
    return partial(patches, view=view, kernel=tuple(view.weight(graph).shape[2:]))


def patches(x: Tensor, view: Conv, kernel: tuple[int, ...]) -> Tensor:
    """x [N, C, *spatial] -> [groups, N * positions, C / groups * prod(kernel)], in the order of a flattened weight."""
    rank = len(kernel)
    begins, ends = view.padding
    padded = torch.nn.functional.pad(x, [pad for axis in reversed(range(rank)) for pad in (begins[axis], ends[axis])])
    for axis, (size, stride, dilation) in enumerate(zip(kernel, view.stride, view.dilation, strict=True)):
        padded = padded.unfold(2 + axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    count, channels, *rest = padded.shape
    split = padded.reshape(count, view.groups, channels // view.groups, *rest)
    positions, window = range(3, 3 + rank), range(3 + rank, 3 + 2 * rank)
    rows = split.permute(1, 0, *positions, 2, *window)
    return rows.reshape(view.groups, -1, channels // view.groups * math.prod(kernel))
