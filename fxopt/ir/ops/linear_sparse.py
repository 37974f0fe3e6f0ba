"""Linears and 1x1 convolutions of which only the blocks that are not zero are stored.

One storage for all patterns: `values` [kept, outputs] are the blocks of `outputs` neighbouring outputs and one input,
by groups of outputs and then by inputs; `mask` uint8 [groups, ceil(in / 8)] says which are there, one bit per block, in
the layout of `fxopt.ir.packing`. A weight of float32 with the pattern 2:4 takes 53 % of its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.packing import pack, packed_width, unpack
from fxopt.ir.sparsity import Pattern
from fxopt.ir.target import Cost, Zeros, conv_kind


def stored(weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """`values` and `mask` of a weight [out, in] whose outputs divide by those of the pattern."""
    out, columns = weight.shape
    kept = pattern.occupied(weight)
    blocks = weight.reshape(out // pattern.outputs, pattern.outputs, columns).transpose(1, 2)
    return blocks[kept].contiguous(), pack(kept.to(torch.uint8), 1)


def stored_bytes(pattern: Pattern, out: int, columns: int, zeros: float, itemsize: int) -> int:
    """Bytes of `values` and `mask` for a share of zeros."""
    groups = out // pattern.outputs
    return round(out * columns * (1 - zeros)) * itemsize + groups * packed_width(columns, 1)


def dense(values: Tensor, mask: Tensor, columns: int) -> Tensor:
    """The weight [out, in]."""
    groups, outputs = mask.shape[0], values.shape[1]
    kept = unpack(mask, 1, columns).reshape(-1, 1).to(torch.bool)
    blocks = values.new_zeros(groups * columns, outputs).masked_scatter(kept.expand(-1, outputs), values)
    return blocks.reshape(groups, columns, outputs).transpose(1, 2).reshape(groups * outputs, columns)


@op
def linear_sparse(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, columns: int, pattern: str) -> Tensor:
    """y = x @ weight.T + bias, in the type of x.

    Args:
        x: float [..., in].
        values: float [kept, outputs].
        mask: uint8 [groups, ceil(in / 8)], groups * outputs = out.
        bias: float [out] or None.
        columns: in.
        pattern: the text of the `Pattern` that the zeros have.
    """
    weight = dense(values, mask, columns).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


@linear_sparse.cost
def _(x: Tensor, values: Tensor, mask: Tensor, bias: Tensor | None, columns: int, pattern: str) -> Cost:
    rows = _product(x.shape[:-1])
    return _cost(x, values, mask, columns, pattern, rows, "linear")


@linear_sparse.samples
def _() -> Iterator[tuple[Any, ...]]:
    for shape, pattern, out in _CASES:
        values, mask, bias = _weight(shape[-1], pattern, out)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        yield x, values, mask, bias, shape[-1], pattern
        yield x.transpose(0, -2).contiguous().transpose(0, -2), values, mask, None, shape[-1], pattern


@op
def conv_sparse(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    columns: int,
    pattern: str,
    stride: list[int],
    pads: list[int],
) -> Tensor:
    """y = conv(x, weight) + bias with a kernel of one position, in the type of x.

    Args:
        x: float [N, in, *spatial].
        values, mask, bias, columns, pattern: as of `linear_sparse`.
        pads: begins, then ends, per spatial axis (as in ONNX).
    """
    rank = x.dim() - 2
    ordered = [pad for axis in reversed(range(rank)) for pad in (pads[axis], pads[axis + rank])]
    weight = dense(values, mask, columns).to(x.dtype).reshape(-1, columns, *[1] * rank)
    shift = None if bias is None else bias.to(x.dtype)
    y: Tensor = torch.convolution(
        torch.nn.functional.pad(x, ordered), weight, shift, stride, [0] * rank, [1] * rank, False, [0] * rank, 1
    )
    return y


@conv_sparse.cost
def _(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    columns: int,
    pattern: str,
    stride: list[int],
    pads: list[int],
) -> Cost:
    from fxopt.ir.graph import hint

    rank = len(stride)
    rows = hint(x.shape[0])
    for axis in range(rank):
        rows *= (hint(x.shape[2 + axis]) + pads[axis] + pads[axis + rank] - 1) // stride[axis] + 1
    return _cost(x, values, mask, columns, pattern, rows, conv_kind((mask.shape[0], columns, 1, 1)))


@conv_sparse.samples
def _() -> Iterator[tuple[Any, ...]]:
    places = (([9, 7], [1, 1], [0, 0, 0, 0]), ([8], [2], [1, 0]), ([3, 4, 5], [1, 2, 1], [0, 0, 1, 0, 1, 0]))
    for (spatial, stride, pads), (shape, pattern, out) in zip(places, _CASES, strict=False):
        values, mask, bias = _weight(shape[-1], pattern, out)
        x = torch.randn(2, shape[-1], *spatial, generator=torch.Generator().manual_seed(1))
        yield x, values, mask, bias, shape[-1], pattern, stride, pads
        yield x, values, mask, None, shape[-1], pattern, stride, pads


_CASES: tuple[tuple[tuple[int, ...], str, int], ...] = (
    ((4, 16), "2:4", 8), ((2, 3, 20), "4x1", 12), ((3, 12), "1x1", 5), ((0, 8), "8x2:4", 16), ((2, 2, 9), "16x1", 16),
)  # fmt: skip


def _weight(columns: int, text: str, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """`values`, `mask` and a bias."""
    generator = torch.Generator().manual_seed(0)
    pattern, weight = Pattern.parse(text), torch.randn(out, columns, generator=generator)
    values, mask = stored(weight * pattern.mask(weight.square(), 0.6), pattern)
    return values, mask, torch.randn(out, generator=generator)


def _cost(x: Tensor, values: Tensor, mask: Tensor, columns: int, pattern: str, rows: int, kind: str) -> Cost:
    """Of the dense product, which is what runs where no kernel skips the zeros."""
    groups, outputs = mask.shape[0], values.shape[1]
    out, blocks = groups * outputs, groups * columns
    share = 1 - values.shape[0] / blocks if blocks else 0.0
    moved = (rows * (columns + out) + out * columns) * x.itemsize
    dtype = str(x.dtype).removeprefix("torch.")
    return Cost(2.0 * rows * out * columns, moved, dtype, kind, 1, None, Zeros(((pattern, share),), rows))


def _product(sizes: Any) -> int:
    from fxopt.ir.graph import hint

    total = 1
    for size in sizes:
        total *= hint(size)
    return total
