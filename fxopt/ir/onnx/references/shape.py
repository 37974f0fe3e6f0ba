"""Shapes and views: Shape, Size, Reshape, Flatten, Transpose, Squeeze, Unsqueeze, Expand, Tile, Identity."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.ir.onnx.lane import HostArray, has_symbol, to_ints, to_scalar, to_tensor
from fxopt.ir.onnx.references.common import axes_of, product
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def host_ints(values: list[Any]) -> HostArray:
    """Sizes as a host array: int64, or object where one is symbolic."""
    symbolic = any(isinstance(value, torch.SymInt) for value in values)
    return np.array(values, dtype=object if symbolic else np.int64)


@operators.reference("Shape", raw=True)
def shape(call: Call, x: Any, start: int = 0, end: int | None = None) -> HostArray:
    """The sizes of x, or of its axes start to end, as a host array."""
    return host_ints(list(x.shape)[start:end])


@operators.reference("Size", raw=True)
def size(call: Call, x: Any) -> HostArray:
    """The number of elements of x as a host array."""
    return host_ints([product(x.shape)]).reshape(())


@operators.reference("Identity", raw=True)
def identity(call: Call, x: Any) -> Any:
    """x."""
    return x


def _target_shape(x: Any, sizes: list[Any], allowzero: int) -> list[Any]:
    """The sizes with 0 replaced by the size of x, unless `allowzero`."""
    if allowzero:
        return sizes
    return [x.shape[axis] if isinstance(size, int) and size == 0 else size for axis, size in enumerate(sizes)]


@operators.reference("Reshape", raw=True)
def reshape(
    call: Call,
    x: Any,
    sizes: Any = None,
    allowzero: int = 0,
    shape: list[int] | None = None,
    consumed_inputs: list[int] | None = None,
) -> Tensor:
    """x with other sizes; 0 copies the size of x, -1 is inferred; an attribute below opset 5."""
    wanted = to_ints(sizes if shape is None else shape)
    assert wanted is not None
    tensor: Tensor = to_tensor(x)
    return tensor.reshape(_target_shape(tensor, wanted, allowzero))


@operators.host("Reshape")
def host_reshape(call: Call, x: HostArray, sizes: Any = None, allowzero: int = 0, **attributes: Any) -> Any:
    """A host array with other sizes."""
    wanted = to_ints(attributes.get("shape", sizes)) or []
    if any(isinstance(size, torch.SymInt) for size in wanted):
        return NotImplemented
    return x.reshape(_target_shape(x, wanted, allowzero))


@operators.reference("Flatten")
def flatten(call: Call, x: Tensor, axis: int = 1) -> Tensor:
    """x as a matrix whose rows are the axes before `axis`."""
    if axis < 0:
        axis += x.dim()
    return x.reshape(product(x.shape[:axis]), product(x.shape[axis:]))


@operators.reference("Transpose")
def transpose(call: Call, x: Tensor, perm: list[int] | None = None) -> Tensor:
    """x with its axes in the order `perm`, reversed by default."""
    return x.permute(list(perm) if perm is not None else list(reversed(range(x.dim()))))


@operators.host("Transpose")
def host_transpose(call: Call, x: HostArray, perm: list[int] | None = None) -> HostArray:
    """A host array with its axes in the order `perm`."""
    return np.transpose(x, perm)


def _new_axes(axes: Any, rank: int) -> list[int]:
    """The axes that Unsqueeze inserts, in increasing order."""
    listed = to_ints(axes) or []
    return sorted(axis % (rank + len(listed)) for axis in listed)


@operators.reference("Unsqueeze", raw=True)
def unsqueeze(call: Call, x: Any, new_axes: Any = None, axes: list[int] | None = None) -> Tensor:
    """x with axes of size 1 inserted; the axes are an attribute below opset 13."""
    tensor: Tensor = to_tensor(x)
    for axis in _new_axes(new_axes if axes is None else axes, tensor.dim()):
        tensor = tensor.unsqueeze(axis)
    return tensor


@operators.host("Unsqueeze")
def host_unsqueeze(call: Call, x: HostArray, new_axes: Any = None, axes: list[int] | None = None) -> HostArray:
    """A host array with axes of size 1 inserted."""
    for axis in _new_axes(new_axes if axes is None else axes, x.ndim):
        x = np.expand_dims(x, axis)
    return x


@operators.reference("Squeeze", raw=True)
def squeeze(call: Call, x: Any, old_axes: Any = None, axes: list[int] | None = None) -> Tensor:
    """x without axes of size 1, all of them by default; the axes are an attribute below opset 13."""
    tensor: Tensor = to_tensor(x)
    listed = axes_of(old_axes if axes is None else axes, tensor.dim())
    if listed is None:
        return tensor.squeeze()
    for axis in sorted(listed, reverse=True):
        tensor = tensor.squeeze(axis)
    return tensor


@operators.host("Squeeze")
def host_squeeze(call: Call, x: HostArray, old_axes: Any = None, axes: list[int] | None = None) -> HostArray:
    """A host array without axes of size 1."""
    listed = axes_of(old_axes if axes is None else axes, x.ndim)
    return np.squeeze(x, None if listed is None else tuple(listed))


@operators.reference("Expand", raw=True)
def expand(call: Call, x: Any, sizes: Any) -> Tensor:
    """x broadcast together with a shape; where the shape says 1, x keeps its size."""
    tensor: Tensor = to_tensor(x)
    wanted = to_ints(sizes) or []
    rank = max(len(wanted), tensor.dim())
    wanted = [1] * (rank - len(wanted)) + wanted
    given = [1] * (rank - tensor.dim()) + list(tensor.shape)
    return tensor.expand([old if isinstance(new, int) and new == 1 else new for new, old in zip(wanted, given)])


@operators.host("Expand")
def host_expand(call: Call, x: HostArray, sizes: HostArray) -> Any:
    """A host array broadcast together with a concrete shape, while it stays small."""
    wanted = to_ints(sizes) or []
    if has_symbol(sizes) or product(wanted) * x.size > 4096:
        return NotImplemented
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(wanted)))


@operators.reference("Tile", raw=True)
def tile(call: Call, x: Any, repeats: Any, axis: Any = None) -> Tensor:
    """x repeated along every axis; opset 1 has a number of tiles and one axis."""
    tensor: Tensor = to_tensor(x)
    counts = to_ints(repeats) or []
    if axis is not None:
        counts = [counts[0] if dim == int(to_scalar(axis)) else 1 for dim in range(tensor.dim())]
    return tensor.repeat(*counts) if counts else tensor
