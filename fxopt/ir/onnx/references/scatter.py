"""Writing by index, out of place: ScatterElements, Scatter, ScatterND, TensorScatter."""

from __future__ import annotations

import torch
from torch import Tensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.references.common import along, as_bits, normal_index, ordered, product, unordered
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter(x: Tensor, axis: int, index: Tensor, updates: Tensor, reduction: str) -> Tensor:
    """x with the updates written, or combined with what is there, at the indices along one axis."""
    if reduction == "none":
        return as_bits(x).scatter(axis, index, as_bits(updates)).view(x.dtype)
    if reduction not in _REDUCTIONS:
        raise MissingReference(f"scatter with reduction {reduction!r} has no torch reference")
    if reduction in ("max", "min"):
        combined = ordered(x).scatter_reduce(axis, index, ordered(updates), _REDUCTIONS[reduction])
        return unordered(combined, x.dtype)
    return x.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction])


@operators.reference("ScatterElements", "Scatter")
def scatter_elements(
    call: Call, x: Tensor, indices: Tensor, updates: Tensor, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """y[indices[i][j]][j] = updates[i][j] for axis 0, and so on; the rest is x."""
    return _scatter(x, axis, normal_index(indices, x.shape[axis]), updates, str(reduction))


@operators.reference("ScatterND")
def scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor, reduction: str = "none") -> Tensor:
    """y[indices[i]] = updates[i] for the index tuples in the last axis of `indices`; the rest is x."""
    depth = indices.shape[-1]
    flat = torch.zeros([], dtype=torch.int64, device=x.device)
    for size, index in zip(x.shape[:depth], indices.unbind(-1)):
        flat = flat * size + normal_index(index, size)
    rows = x.reshape(product(x.shape[:depth]), product(x.shape[depth:]))
    columns = rows.shape[1]
    values = updates.reshape(-1, columns)
    where = flat.reshape(-1, 1).expand(-1, columns)
    return _scatter(rows, 0, where, values, str(reduction)).reshape(x.shape)


@operators.reference("TensorScatter")
def tensor_scatter(
    call: Call, cache: Tensor, update: Tensor, write_indices: Tensor | None = None, mode: str = "linear", axis: int = -2
) -> Tensor:
    """The cache with `update` written along the axis, for batch entry b from write_indices[b] (default 0) on."""
    axis %= cache.dim()
    index = along(torch.arange(update.shape[axis], device=cache.device), cache.dim(), axis)
    if write_indices is not None:
        index = index + along(write_indices.to(torch.int64), cache.dim(), 0)
    if str(mode) == "circular":
        index = index % cache.shape[axis]
    return _scatter(cache, axis, index.expand(update.shape), update, "none")
