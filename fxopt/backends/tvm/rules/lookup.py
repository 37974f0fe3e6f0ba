"""Elements by position: gather, index_select, flips, indexing behind the first axes, repetition."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.backends.tvm.kernels.lookup import lookup, put_along, take_along
from fxopt.backends.tvm.lowering import Call, Lowering, Rule
from fxopt.backends.tvm.rules.arrange import RULES as ARRANGE
from fxopt.backends.tvm.values import Slot, Value
from fxopt.errors import Unsupported


def selected(low: Lowering, value: Value, axis: int, positions: Slot, shape: tuple[int, ...]) -> Value:
    """The value's elements at positions (integers, [count]) of an axis, as `shape`."""
    source = low.dense(value)
    outer, size = math.prod(source.shape[:axis]), source.shape[axis]
    inner = math.prod(source.shape[axis + 1 :])
    made = low.program.value(shape, source.dtype)
    if made.count:
        sizes = (outer, size, positions.count, inner, positions.dtype, source.dtype)
        low.program.call(lookup, sizes, source.slot, positions, made.slot, rows=False)
    return made


def _positions(low: Lowering, argument: Any) -> Slot:
    """Indices in order."""
    value = low.dense(argument)
    if value.dtype not in ("int64", "int32"):
        raise Unsupported(f"takes indices of integers, not {value.dtype}")
    return value.slot


def _index_select(low: Lowering, call: Call) -> Value:
    value = low.value(call["self"])
    axis = low.number(call["dim"]) % len(value.shape)
    return selected(low, value, axis, _positions(low, call["index"]), low.shape(call.node))


def _gather(low: Lowering, call: Call) -> Value:
    """Sizes of other axes may be smaller than the operand's."""
    value, shape = low.value(call["self"]), low.shape(call.node)
    axis = low.number(call["dim"]) % max(len(shape), 1)
    cut = tuple(size if i == axis else shape[i] for i, size in enumerate(value.shape))
    source = low.dense(value.viewed(cut, value.strides))
    made = low.program.value(shape, source.dtype)
    positions = low.dense(call["index"])
    if positions.dtype not in ("int64", "int32"):
        raise Unsupported(f"takes indices of integers, not {positions.dtype}")
    if made.count:
        outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        sizes = (outer, cut[axis], shape[axis], inner, positions.dtype, source.dtype)
        low.program.call(take_along, sizes, source.slot, positions.slot, made.slot)
    return made


def _scatter(low: Lowering, call: Call) -> Value:
    """A copy of the operand, then the values in their places."""
    value, shape = low.value(call["self"]), low.shape(call.node)
    axis = low.number(call["dim"]) % max(len(shape), 1)
    positions = low.dense(call["index"])
    count = positions.shape[axis]
    wanted = tuple(count if i == axis else size for i, size in enumerate(shape))
    if positions.shape != wanted or call.get("reduce") is not None:
        raise Unsupported(f"has an index of shape {positions.shape}, expected {wanted}, and no reduction")
    if positions.dtype not in ("int64", "int32"):
        raise Unsupported(f"takes indices of integers, not {positions.dtype}")
    made = low.program.value(shape, value.dtype)
    low.copy(value, made)
    given = low.program.value(positions.shape, value.dtype)
    if call.get("src") is not None:
        source = low.value(call["src"])
        low.copy(source.viewed(positions.shape, source.strides), given)
    else:
        low.emit(("constant", low.number(call["value"]), value.dtype), (), given)
    if given.count:
        outer, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        sizes = (outer, shape[axis], count, inner, positions.dtype, value.dtype)
        low.program.call(put_along, sizes, positions.slot, given.slot, made.slot)
    return made


def _flip(low: Lowering, call: Call) -> Value:
    """Axis after axis."""
    value = low.value(call["self"])
    for given in call["dims"]:
        axis = low.number(given) % len(value.shape)
        backwards = torch.arange(value.shape[axis] - 1, -1, -1).numpy()
        value = selected(low, value, axis, low.program.constant(backwards), value.shape)
    return value


def _index(low: Lowering, call: Call) -> Any:
    """x[:, ..., i, j]: constants i, j, ... on neighbouring axes behind others become positions on one axis."""
    given = list(call["indices"])
    behind = next((place for place, item in enumerate(given) if item is not None), 0)
    indexed = [item for item in given if item is not None]
    if behind == 0 and None not in given:
        return ARRANGE["index"](low, call)
    if None in given[behind : behind + len(indexed)]:
        raise Unsupported("indexes axes that are no neighbours")
    value, axes = low.value(call["self"]), range(behind, behind + len(indexed))
    sizes = [value.shape[axis] for axis in axes]
    joined = low.dense(value)
    flat = (*joined.shape[:behind], math.prod(sizes), *joined.shape[behind + len(indexed) :])
    known = [low.constant(item) for item in indexed]
    if len(indexed) == 1:
        places = _positions(low, indexed[0])
    elif all(item is not None for item in known):
        pairs = zip((item for item in known if item is not None), sizes, strict=True)
        whole = torch.broadcast_tensors(*(torch.where(i < 0, i + n, i) for i, n in pairs))  # type: ignore[no-untyped-call]
        steps = [math.prod(sizes[number + 1 :]) for number in range(len(sizes))]
        offsets = torch.stack([i * step for i, step in zip(whole, steps, strict=True)]).sum(0)
        places = low.program.constant(offsets.flatten().numpy())
    else:
        raise Unsupported("indexes several axes behind the first ones by values that are not known")
    source = joined.viewed(flat, tuple(math.prod(flat[i + 1 :]) for i in range(len(flat))))
    return selected(low, source, behind, places, low.shape(call.node))


def _repeat(low: Lowering, call: Call) -> Value:
    """Every axis is walked several times: strides of 0 beside the operand's, then a copy."""
    value, counts = low.value(call["self"]), [low.number(item) for item in call["repeats"]]
    missing = len(counts) - len(value.shape)
    sizes, strides = (1,) * missing + value.shape, (0,) * missing + value.strides
    shape = tuple(item for count, size in zip(counts, sizes, strict=True) for item in (count, size))
    steps = tuple(item for stride in strides for item in (0, stride))
    wide = low.dense(value.viewed(shape, steps))
    whole = low.shape(call.node)
    return wide.viewed(whole, tuple(math.prod(whole[i + 1 :]) for i in range(len(whole))))


RULES: dict[str, Rule] = {
    "index_select": _index_select,
    "gather": _gather,
    "scatter": _scatter,
    "flip": _flip,
    "index": _index,
    "_unsafe_index": _index,
    "repeat": _repeat,
}
