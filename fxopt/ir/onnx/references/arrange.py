"""Rearrangements and running totals: Trilu, CumSum, CumProd, DepthToSpace, SpaceToDepth, CenterCropPad, Col2Im."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.onnx.lane import to_ints, to_scalar, to_tensor
from fxopt.ir.onnx.references.common import along, as_bits, axes_of, in_int64, pad_list, pad_with, product
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("Trilu", raw=True)
def trilu(call: Call, x: Any, k: Any = None, upper: int = 1) -> Tensor:
    """The upper (lower) triangle of the matrices of x from the k-th diagonal on, else 0."""
    tensor: Tensor = to_tensor(x)
    diagonal = 0 if k is None else to_scalar(k)
    triangle = torch.triu if upper else torch.tril
    return triangle(as_bits(tensor), diagonal).view(tensor.dtype)


def _running(function: Callable[..., Tensor], start: int) -> Callable[..., Tensor]:
    def running(call: Call, x: Any, axis: Any, exclusive: int = 0, reverse: int = 0) -> Tensor:
        tensor: Tensor = to_tensor(x)
        dim = int(to_scalar(axis)) % tensor.dim()
        if reverse:
            tensor = tensor.flip(dim)
        if exclusive:
            neutral = torch.full_like(tensor.narrow(dim, 0, 1), start)
            tensor = torch.cat([neutral, tensor.narrow(dim, 0, tensor.shape[dim] - 1)], dim)
        total = in_int64(function)(tensor, dim=dim).to(tensor.dtype)
        return total.flip(dim) if reverse else total

    return running


cum_sum = operators.reference("CumSum", raw=True)(_running(torch.cumsum, 0))
cum_prod = operators.reference("CumProd", raw=True)(_running(torch.cumprod, 1))


@operators.reference("DepthToSpace")
def depth_to_space(call: Call, x: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels moved into blocks of pixels; the block is the outer part of a channel (DCR) or the inner one (CRD)."""
    batch, channels, height, width = x.shape
    depth = channels // (blocksize * blocksize)
    if str(mode) == "DCR":
        blocks = x.reshape(batch, blocksize, blocksize, depth, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(batch, depth, blocksize, blocksize, height, width).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(batch, depth, height * blocksize, width * blocksize)


@operators.reference("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor, blocksize: int, mode: str = "DCR") -> Tensor:
    """Blocks of pixels moved into channels: the inverse of DepthToSpace."""
    batch, channels, height, width = x.shape
    blocks = x.reshape(batch, channels, height // blocksize, blocksize, width // blocksize, blocksize)
    order = (0, 3, 5, 1, 2, 4) if str(mode) == "DCR" else (0, 1, 3, 5, 2, 4)
    depth = channels * blocksize * blocksize
    return blocks.permute(order).reshape(batch, depth, height // blocksize, width // blocksize)


@operators.reference("CenterCropPad", raw=True)
def center_crop_pad(call: Call, x: Any, shape: Any, axes: list[int] | None = None) -> Tensor:
    """x cut, or padded with 0, around its centre to the given sizes."""
    tensor: Tensor = to_tensor(x)
    sizes = to_ints(shape) or []
    dims = list(range(tensor.dim())) if axes is None else axes_of(axes, tensor.dim()) or []
    before, after = [0] * tensor.dim(), [0] * tensor.dim()
    for dim, size in zip(dims, sizes):
        missing = size - tensor.shape[dim]
        before[dim] = missing // 2 if missing >= 0 else -(-missing // 2)
        after[dim] = missing - before[dim]
    return pad_with(tensor, pad_list(before, after))


@operators.reference("Col2Im", raw=True)
def col2im(
    call: Call,
    x: Any,
    image_shape: Any,
    block_shape: Any,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """The sum of overlapping blocks, given as columns [N, C * block elements, blocks], in an image [N, C, *sizes]."""
    size, block = to_ints(image_shape) or [], to_ints(block_shape) or []
    rank = len(size)
    low, high = (pads or [0] * 2 * rank)[:rank], (pads or [0] * 2 * rank)[rank:]
    padded = [length + before + after for length, before, after in zip(size, low, high, strict=True)]
    steps, gaps = strides or [1] * rank, dilations or [1] * rank
    columns: Tensor = to_tensor(x)
    if rank == 2:
        image = torch.ops.aten.col2im(columns, padded, block, gaps, [0, 0], steps)
    else:
        index = _block_index(padded, block, gaps, steps, columns.device)
        flat = columns.reshape(columns.shape[0], columns.shape[1] // product(block), -1)
        zeros = torch.zeros([*flat.shape[:2], product(padded)], dtype=flat.dtype, device=flat.device)
        image = zeros.index_add(2, index, flat).reshape([*flat.shape[:2], *padded])
    return pad_with(image, pad_list([-pad for pad in low], [-pad for pad in high]))


def _block_index(sizes: list[Any], block: list[Any], gaps: list[int], steps: list[int], device: torch.device) -> Tensor:
    """The pixel, in the flat image, of every element of every block, [block elements * blocks]."""
    index = torch.zeros([], dtype=torch.int64, device=device)
    rank = len(sizes)
    for axis, (size, length, gap, step) in enumerate(zip(sizes, block, gaps, steps, strict=True)):
        count = (size - gap * (length - 1) - 1) // step + 1
        inside = along(torch.arange(length, device=device) * gap, 2 * rank, axis)
        index = index * size + inside + along(torch.arange(count, device=device) * step, 2 * rank, rank + axis)
    return index.reshape(-1)
