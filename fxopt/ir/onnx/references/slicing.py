"""Parts and joins: Concat, Split, Slice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.ir.onnx.lane import HostArray, to_ints, to_tensor
from fxopt.ir.onnx.references.common import first, larger
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("Concat")
def concat(call: Call, *parts: Tensor, axis: int = 1) -> Tensor:
    """The parts joined along an axis (default 1, opset 1 only)."""
    return torch.cat(parts, axis)


@operators.host("Concat")
def host_concat(call: Call, *parts: HostArray, axis: int = 1) -> HostArray:
    """Host arrays joined along an axis."""
    if any(part.dtype == object for part in parts):
        parts = tuple(part.astype(object) for part in parts)
    return np.concatenate(parts, axis)


def _split_sizes(call: Call, length: Any, sizes: Any, num_outputs: int | None) -> list[Any]:
    listed = to_ints(sizes)
    if listed is not None:
        return listed
    count = num_outputs or call.outputs
    chunk = (length + count - 1) // count
    return [chunk] * (count - 1) + [length - chunk * (count - 1)]


@operators.reference("Split", raw=True)
def split(
    call: Call,
    x: Any,
    sizes: Any = None,
    axis: int = 0,
    split: list[int] | None = None,
    num_outputs: int | None = None,
) -> Any:
    """x cut along an axis: into the given sizes (an attribute below opset 13), else equally, the last one smaller."""
    tensor: Tensor = to_tensor(x)
    wanted = _split_sizes(call, tensor.shape[axis], sizes if split is None else split, num_outputs)
    return first(call, *torch.split(tensor, wanted, axis))


@operators.host("Split")
def host_split(
    call: Call,
    x: HostArray,
    sizes: Any = None,
    axis: int = 0,
    split: list[int] | None = None,
    num_outputs: int | None = None,
) -> Any:
    """A host array cut along an axis."""
    wanted = _split_sizes(call, x.shape[axis], sizes if split is None else split, num_outputs)
    if any(isinstance(size, torch.SymInt) for size in wanted):
        return NotImplemented
    return first(call, *np.split(x, np.cumsum(wanted[:-1]).astype(int), axis))


def _operands(rank: int, starts: Any, ends: Any, axes: Any, steps: Any) -> list[tuple[Any, Any, int, int]]:
    """(start, end, axis, step) of every sliced axis."""
    first_, last = to_ints(starts) or [], to_ints(ends) or []
    dims = to_ints(axes)
    strides = to_ints(steps)
    dims = list(range(len(first_))) if dims is None else [axis % rank for axis in dims]
    strides = [1] * len(first_) if strides is None else strides
    return list(zip(first_, last, dims, strides, strict=True))


def _reversed_bound(bound: Any, size: Any) -> Any:
    """A bound of a backward slice as a bound in the flipped axis: index i becomes size - 1 - i."""
    if bound < 0:
        return -1 - bound
    return larger(size - 1 - bound, 0)


def _reversed_start(start: Any, size: Any) -> Any:
    """As `_reversed_bound`; a start before the first element means the first element."""
    if isinstance(start, int) and start == -1:
        return 0
    return -larger(-_reversed_bound(start, size), 1 - size)


def slice_axis(x: Tensor, start: Any, end: Any, axis: int, step: int) -> Tensor:
    """x[start:end:step] along one axis; bounds may be symbolic and beyond the ends."""
    if step < 0:
        size = x.shape[axis]
        x = x.flip(axis)
        start, end, step = _reversed_start(start, size), _reversed_bound(end, size), -step
    result: Tensor = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    return result


@operators.reference("Slice", raw=True)
def slice_tensor(
    call: Call,
    x: Any,
    start_input: Any = None,
    end_input: Any = None,
    axes_input: Any = None,
    steps: Any = None,
    starts: list[int] | None = None,
    ends: list[int] | None = None,
    axes: list[int] | None = None,
) -> Tensor:
    """x[start:end:step] along the axes; attributes below opset 10, inputs since."""
    tensor: Tensor = to_tensor(x)
    operands = _operands(
        tensor.dim(),
        start_input if starts is None else starts,
        end_input if ends is None else ends,
        axes_input if axes is None else axes,
        steps,
    )
    for start, end, axis, step in operands:
        tensor = slice_axis(tensor, start, end, axis, step)
    return tensor


@operators.host("Slice")
def host_slice(
    call: Call,
    x: HostArray,
    start_input: Any = None,
    end_input: Any = None,
    axes_input: Any = None,
    steps: Any = None,
    starts: list[int] | None = None,
    ends: list[int] | None = None,
    axes: list[int] | None = None,
) -> Any:
    """x[start:end:step] of a host array; a symbolic bound goes to the tensor lane, else it would be specialised."""
    operands = _operands(
        x.ndim,
        start_input if starts is None else starts,
        end_input if ends is None else ends,
        axes_input if axes is None else axes,
        steps,
    )
    if any(isinstance(value, torch.SymInt) for operand in operands for value in operand):
        return NotImplemented
    index = [slice(None)] * x.ndim
    for start, end, axis, step in operands:
        if step < 0:
            start = max(start, -x.shape[axis])
            end = None if end < -x.shape[axis] else end
        index[axis] = slice(start, end, step)
    return x[tuple(index)]
