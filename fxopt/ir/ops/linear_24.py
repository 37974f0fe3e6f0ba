"""Linear with a 2:4 sparse weight: of four neighbouring inputs, two at most have a weight that is not zero.

Source: Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.op import op
from fxopt.ir.target import Cost


def compress_24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The kept values [out, in / 2] of a weight [out, in], and their places uint8 [out, in / 8].

    Two groups of four inputs make a byte, the first in its low half; a half holds the place of the first kept value in
    its low two bits and that of the second in the next ones.

    Raises:
        InvalidInput: more than two of four are not zero, or `in` is not a multiple of 8.
    """
    out, columns = weight.shape
    if columns % 8:
        raise InvalidInput(f"a 2:4 weight has {columns} inputs; expected a multiple of 8")
    groups = weight.reshape(out, columns // 4, 4)
    if bool(((groups != 0).sum(-1) > 2).any()):
        raise InvalidInput("more than two of four neighbouring weights are not zero")
    kept = (groups != 0).to(torch.float32) - torch.arange(4) * 0.1  # the non-zeros, then the first zeros
    places = kept.topk(2, -1).indices.sort(-1).values
    values = groups.gather(-1, places).reshape(out, columns // 2)
    halves = (places[..., 0] | places[..., 1] << 2).to(torch.uint8).reshape(out, columns // 8, 2)
    return values, halves[..., 0] | halves[..., 1] << 4


def expand_24(values: Tensor, places: Tensor) -> Tensor:
    """The weight [out, in] that `compress_24` was given."""
    out, half = values.shape
    nibbles = torch.stack([places & 15, places >> 4], -1).reshape(out, half // 2)
    index = torch.stack([nibbles & 3, nibbles >> 2], -1).long()
    dense = values.new_zeros(out, half // 2, 4)
    return dense.scatter(-1, index, values.reshape(out, half // 2, 2)).reshape(out, 2 * half)


@op
def linear_24(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    """y = x @ weight.T + bias with sums in float32, in the type of x.

    Args:
        x: float [..., in].
        values, places: the weight as `compress_24` gives it; values in the type of x.
        bias: float [out] or None.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = expand_24(values, places).to(wide)
    return torch.nn.functional.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


@linear_24.cost
def _(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Cost:
    from fxopt.ir.graph import hint

    rows = 1
    for dim in x.shape[:-1]:
        rows *= hint(dim)
    out, half = values.shape
    moved = rows * (2 * half + out) * x.dtype.itemsize + values.nbytes + places.nbytes
    macs = float(rows * out * half)  # of the kept weights
    return Cost(2 * macs, moved, str(x.dtype).removeprefix("torch."), "linear.24", 1, macs)


@linear_24.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, out in (((4, 64), 32), ((2, 3, 40), 5), ((0, 32), 4), ((33, 128), 64)):
        weight = torch.randn(out, shape[-1] // 4, 4, generator=generator)
        weight[..., :2] = 0
        weight = weight[..., torch.randperm(4, generator=generator)].reshape(out, shape[-1])
        x = torch.randn(shape, generator=generator)
        yield x, *compress_24(weight), torch.randn(out, generator=generator)
        yield x, *compress_24(weight), None
