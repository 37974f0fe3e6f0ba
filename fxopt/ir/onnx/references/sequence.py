"""Sequences (Python lists) and optional values (None)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fxopt.ir.onnx.lane import to_ints, to_scalar, to_tensor
from fxopt.ir.onnx.references.common import require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()
_MOST_PIECES = 1 << 20  # of a split
_MOST_FAKE_PIECES = 1 << 12  # of a declared size, which may be absurd


@operators.reference("SequenceConstruct")
def sequence_construct(call: Call, *items: Any) -> list[Any]:
    """The items as a sequence."""
    return list(items)


@operators.reference("SequenceEmpty")
def sequence_empty(call: Call, dtype: int = 1) -> list[Any]:
    """The empty sequence."""
    return []


@operators.reference("SequenceAt", raw=True)
def sequence_at(call: Call, items: list[Any], position: Any) -> Any:
    """One item; negative positions count from the end."""
    return items[int(to_scalar(position))]


@operators.reference("SequenceInsert", raw=True)
def sequence_insert(call: Call, items: list[Any], item: Any, position: Any = None) -> list[Any]:
    """The sequence with an item inserted, at the end by default."""
    at = len(items) if position is None else int(to_scalar(position))
    return [*items[:at], item, *items[at:]]


@operators.reference("SequenceErase", raw=True)
def sequence_erase(call: Call, items: list[Any], position: Any = None) -> list[Any]:
    """The sequence without an item, the last by default."""
    at = (len(items) - 1 if position is None else int(to_scalar(position))) % len(items)
    return [*items[:at], *items[at + 1 :]]


@operators.reference("SequenceLength")
def sequence_length(call: Call, items: list[Any]) -> Tensor:
    """The number of items."""
    return torch.tensor(len(items))


@operators.reference("ConcatFromSequence")
def concat_from_sequence(call: Call, items: list[Any], axis: int, new_axis: int = 0) -> Tensor:
    """The items joined along an axis, or stacked along a new one."""
    tensors = [to_tensor(item) for item in items]
    return torch.stack(tensors, axis) if new_axis else torch.cat(tensors, axis)


@operators.reference("SplitToSequence", raw=True)
def split_to_sequence(call: Call, x: Any, split: Any = None, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    """x cut along an axis: in pieces of one size, of given sizes, or (default) of 1, whose axis `keepdims` keeps."""
    tensor: Tensor = to_tensor(x)
    require(isinstance(tensor, Tensor), "sequences of strings have no torch reference")
    sizes = [1] if split is None else to_ints(split) or []
    if split is None or not split.ndim:
        pieces = tensor.shape[axis] // max(sizes[0], 1)
        most = _MOST_FAKE_PIECES if isinstance(tensor, FakeTensor) else _MOST_PIECES
        require(not isinstance(pieces, int) or pieces <= most, f"a sequence of {pieces} pieces is too long")
    if split is None and not keepdims:
        return list(tensor.unbind(axis))
    return list(torch.split(tensor, sizes if split is not None and split.ndim else sizes[0], axis))


@operators.reference("Optional", "OptionalGetElement", raw=True)
def optional(call: Call, value: Any = None, type: Any = None) -> Any:
    """The value, which may be None."""
    return value


@operators.reference("OptionalHasElement", raw=True)
def optional_has_element(call: Call, value: Any = None) -> Tensor:
    """Whether the value is there."""
    return torch.tensor(value is not None)
