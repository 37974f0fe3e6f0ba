"""Padding: Pad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.lane import to_ints, to_tensor
from fxopt.ir.onnx.references.common import axes_of, larger, pad_list, pad_with, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def _pad_constant(x: Tensor, before: list[Any], after: list[Any], value: Any) -> Tensor:
    """x with a constant around it; the value may be a tensor, also one without data."""
    pads = pad_list(before, after)
    if value is None:
        return pad_with(x, pads)
    if not isinstance(value, Tensor):
        return pad_with(x, pads, value=value)
    inside = pad_with(torch.ones_like(x, dtype=torch.bool), pads)
    return torch.where(inside, pad_with(x, pads), value.reshape(()).to(x.dtype))


def _source(mode: str, size: Any, before: Any, after: Any, device: torch.device) -> Tensor:
    """For every position of a padded axis, the index that it repeats."""
    index: Tensor = torch.arange(-before, size + after, device=device)
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index.remainder(size)
    if mode != "reflect":
        raise MissingReference(f"Pad with mode {mode!r} has no torch reference")
    period = larger(2 * (size - 1), 1)
    distance: Tensor = (index.remainder(period) - (size - 1)).abs()
    return distance.neg().add(size - 1)


@operators.reference("Pad", raw=True)
def pad(
    call: Call,
    x: Any,
    pads_input: Any = None,
    constant: Any = None,
    axes: Any = None,
    mode: str = "constant",
    pads: list[int] | None = None,
    paddings: list[int] | None = None,
    value: float = 0.0,
) -> Tensor:
    """x with elements added before and after (or, where negative, removed from) its axes.

    The pads are the attribute `paddings` in opset 1, `pads` below 11, and an input since.
    """
    tensor: Tensor = to_tensor(x)
    amounts = to_ints(pads_input if pads_input is not None else pads or paddings) or []
    dims = list(range(tensor.dim())) if axes is None else axes_of(axes, tensor.dim()) or []
    before, after = [0] * tensor.dim(), [0] * tensor.dim()
    for position, dim in enumerate(dims):
        before[dim], after[dim] = amounts[position], amounts[position + len(dims)]
    if str(mode) == "constant":
        filler = to_tensor(constant) if call.version >= 11 else value
        return _pad_constant(tensor, before, after, filler)
    for dim, (low, high) in enumerate(zip(before, after)):
        if isinstance(low, int) and isinstance(high, int) and low == 0 and high == 0:
            continue
        require((low >= 0 and high >= 0) or (low <= 0 and high <= 0), f"Pad with mode {mode!r} that also removes")
        tensor = tensor.index_select(dim, _source(str(mode), tensor.shape[dim], low, high, tensor.device))
    return tensor
