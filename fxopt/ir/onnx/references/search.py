"""Order and selection: TopK, NonZero, Unique."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.ir.onnx.lane import to_scalar, to_tensor
from fxopt.ir.onnx.references.common import as_bits, first, ordered
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("TopK", raw=True)
def top_k(
    call: Call,
    x: Any,
    count: Any = None,
    axis: int = -1,
    k: int | None = None,
    largest: int = 1,
    sorted: int = 1,
) -> Any:
    """The k largest (smallest) values along the axis and their indices, equal values by index."""
    tensor: Tensor = to_tensor(x)
    length = to_scalar(count) if k is None else k
    order = torch.sort(ordered(tensor), dim=axis, descending=bool(largest), stable=True).indices
    index = order.narrow(axis, 0, length)
    return first(call, as_bits(tensor).gather(axis, index).view(tensor.dtype), index)


@operators.reference("NonZero")
def non_zero(call: Call, x: Tensor) -> Tensor:
    """The indices of the elements that are not 0, one column each."""
    return torch.nonzero(x != 0).t()


@operators.reference("Unique")
def unique(call: Call, x: Tensor, axis: int | None = None, sorted: int = 1) -> Any:
    """The distinct values (or slices along the axis), their first index, every value's place among them, counts."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    values, inverse, counts = torch.unique(x, dim=axis, return_inverse=True, return_counts=True)
    length = x.shape[axis]
    positions = torch.arange(length, device=x.device)
    start = torch.full_like(counts, length).scatter_reduce(0, inverse, positions, "amin")
    if not sorted:
        order = torch.argsort(start)
        values, counts, start = values.index_select(axis, order), counts[order], start[order]
        inverse = torch.argsort(order)[inverse]
    return first(call, values, start, inverse, counts)
