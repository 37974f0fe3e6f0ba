"""Convolution with weights of 2 to 8 bits in groups along the flattened inputs of the kernel, and float activations.

Source: the affine grids of Frantar et al., "GPTQ" (2022), which treats a convolution as a linear over patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.ops.linear_nbits import dequantized, group_count
from fxopt.ir.packing import pack
from fxopt.ir.target import Cost, conv_kind

_CONVOLUTIONS = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}


@op
def conv_nbits(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    inner: list[int],
    bits: int,
    group: int,
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """y = conv(x, (codes - zeros) * scales) + bias, in the type of x.

    Args:
        x: float [N, C, *spatial].
        packed: uint8 [out, ceil(in * bits / 8)], codes in the layout of `fxopt.ir.packing`; in = product of `inner`.
        scales: float32 [out, ceil(in / group)].
        zeros: uint8 like the scales, or None: 2 ** (bits - 1).
        bias: float [out] or None.
        inner: [C / groups, *kernel], which the codes of one output are the flattened values of.
        pads: begins, then ends, per spatial axis (as in ONNX).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    columns = 1
    for size in inner:
        columns *= size
    weight = dequantized(packed, scales, zeros, bits, group, columns).to(wide).reshape(-1, *inner)
    rank = len(inner) - 1
    ordered = [pad for axis in reversed(range(rank)) for pad in (pads[axis], pads[axis + rank])]
    padded = torch.nn.functional.pad(x.to(wide), ordered)
    shift = None if bias is None else bias.to(wide)
    y: Tensor = _CONVOLUTIONS[rank](padded, weight, shift, stride, 0, dilation, groups)
    return y.to(x.dtype)


@conv_nbits.cost
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    inner: list[int],
    bits: int,
    group: int,
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    groups: int,
) -> Cost:
    """Of the float convolution: the weights are converted when the model is loaded."""
    from fxopt.ir.graph import hint

    rank, out = len(inner) - 1, packed.shape[0]
    positions = hint(x.shape[0])
    for axis in range(rank):
        size = hint(x.shape[2 + axis]) + pads[axis] + pads[axis + rank]
        positions *= (size - dilation[axis] * (inner[1 + axis] - 1) - 1) // stride[axis] + 1
    elements, columns = 1, 1
    for dim in x.shape:
        elements *= hint(dim)
    for size in inner:
        columns *= size
    dtype = str(x.dtype).removeprefix("torch.")
    moved = (elements + out * columns + positions * out) * x.itemsize
    return Cost(2.0 * positions * out * columns, moved, dtype, conv_kind((out, *inner)), 1)


@conv_nbits.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    cases = (
        ((2, 4, 8, 8), 6, (4, 3, 3), 4, 16, [1, 1], [1, 1, 1, 1], [1, 1], 1),
        ((1, 4, 9, 7), 4, (1, 3, 3), 4, 9, [2, 1], [0, 1, 1, 2], [1, 2], 4),
        ((2, 4, 11), 6, (2, 3), 3, 16, [2], [1, 0], [1], 2),
        ((1, 32, 4, 4), 3, (32, 1, 1), 2, 32, [1, 1], [0, 0, 0, 0], [1, 1], 1),
        ((0, 3, 8, 8), 4, (3, 1, 1), 8, 3, [1, 1], [0, 0, 0, 0], [1, 1], 1),
        ((1, 2, 3, 4, 5), 2, (2, 2, 1, 3), 4, 8, [1, 1, 1], [0] * 6, [1, 1, 1], 1),
    )
    for shape, out, inner, bits, group, stride, pads, dilation, groups in cases:
        x = torch.randn(shape, generator=generator)
        columns = 1
        for size in inner:
            columns *= size
        count = group_count(columns, group)
        codes = torch.randint(0, 1 << bits, (out, columns), generator=generator, dtype=torch.uint8)
        scales = torch.rand(out, count, generator=generator) * 0.1 + 0.01
        zeros = torch.randint(0, 1 << bits, (out, count), generator=generator, dtype=torch.uint8)
        bias = torch.randn(out, generator=generator)
        where = (list(inner), bits, group, stride, pads, dilation, groups)
        yield x, pack(codes, bits), scales, None, bias, *where
        yield x, pack(codes, bits), scales, zeros, None, *where
