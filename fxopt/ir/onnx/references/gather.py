"""Reading by index: Gather, GatherElements, GatherND, ReverseSequence, Compress."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.lane import HostArray, has_symbol, is_host, to_tensor
from fxopt.ir.onnx.references.common import along, as_bits, normal_index
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("Gather", raw=True)
def gather(call: Call, x: Any, indices: Any, axis: int = 0) -> Tensor:
    """The entries of x at the indices along one axis."""
    tensor: Tensor = to_tensor(x)
    axis %= tensor.dim()
    if is_host(indices) and indices.ndim == 0 and not has_symbol(indices):
        return tensor.select(axis, int(indices))
    index = normal_index(to_tensor(indices), tensor.shape[axis])
    if axis == 0 and tensor.dim() == 2 and tensor.dtype in (torch.float16, torch.float32, torch.float64):
        return F.embedding(index, tensor)
    flat = tensor.index_select(axis, index.reshape(-1))
    return flat.reshape([*tensor.shape[:axis], *index.shape, *tensor.shape[axis + 1 :]])


@operators.host("Gather")
def host_gather(call: Call, x: HostArray, indices: HostArray, axis: int = 0) -> Any:
    """The entries of a host array at concrete indices."""
    if has_symbol(indices):
        return NotImplemented
    taken = np.empty((), dtype=object)
    result = np.take(x, indices.astype(np.int64), axis)
    if isinstance(result, np.ndarray):
        return result
    taken[()] = result  # a single object comes without its array
    return taken if x.dtype == object else taken.astype(x.dtype)


@operators.reference("GatherElements")
def gather_elements(call: Call, x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    """y[i][j] = x[indices[i][j]][j] for axis 0, and so on."""
    return as_bits(x).gather(axis, normal_index(indices, x.shape[axis])).view(x.dtype)


@operators.reference("GatherND")
def gather_nd(call: Call, x: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    """The slices of x at the index tuples in the last axis of `indices`, after `batch_dims` common axes."""
    lookups = list(indices.to(torch.int64).unbind(-1))
    rank = indices.dim() - 1
    batches = [along(torch.arange(x.shape[axis], device=x.device), rank, axis) for axis in range(batch_dims)]
    return x[tuple(batches + lookups)]


@operators.reference("ReverseSequence")
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """x with the first `lengths[b]` steps of every sequence b in reverse order."""
    steps = along(torch.arange(x.shape[time_axis], device=x.device), x.dim(), time_axis)
    length = along(lengths.to(torch.int64), x.dim(), batch_axis)
    index = torch.where(steps < length, length - 1 - steps, steps)
    return as_bits(x).gather(time_axis, index.expand(x.shape)).view(x.dtype)


@operators.reference("Compress")
def compress(call: Call, x: Tensor, condition: Tensor, axis: int | None = None) -> Tensor:
    """The entries of x along an axis (of x flattened by default) where the condition holds."""
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition).reshape(-1))
