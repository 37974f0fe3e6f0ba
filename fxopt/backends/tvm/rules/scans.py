"""Running sums, places of the largest, and reductions of integers and truth values."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.backends.tvm.kernels.scans import cumulate, fold, in_order, place_of_largest
from fxopt.backends.tvm.lowering import Call, Lowering, Rule, dtype_of
from fxopt.backends.tvm.rules.normalise import RULES as NORMALISE
from fxopt.backends.tvm.values import Value
from fxopt.errors import Unsupported

_MOST_STEPS = 1 << 24  # of ordering an axis


def _cumsum(low: Lowering, call: Call) -> Value:
    meta, source = low.metas[call.node], low.dense(call["self"])
    axis = low.number(call["dim"]) % max(meta.dim(), 1)
    kind = dtype_of(meta, call.node)
    if source.dtype != kind:
        cast = low.program.value(source.shape, kind)
        low.emit(("cast", ("load", 0), source.dtype, kind), (source,), cast)
        source = cast
    if kind == "uint8":
        raise Unsupported("adds truth values")
    made = low.program.value(tuple(meta.shape), kind)
    if made.count and meta.dim():
        outer, size, inner = _split(source.shape, axis)
        low.program.call(cumulate, (outer, size, inner, kind), source.slot, made.slot)
        return made
    return source


def _place(*, smallest: bool) -> Rule:
    def rule(low: Lowering, call: Call) -> Value:
        source, shape = low.dense(call["self"]), low.shape(call.node)
        if source.dtype == "uint8" or not math.prod(source.shape):
            raise Unsupported(f"takes numbers, not {source.dtype} of shape {source.shape}")
        axis = call["dim"]
        outer, size, inner = (1, source.count, 1) if axis is None else _split(source.shape, low.number(axis))
        made = low.program.value(shape, "int64")
        if made.count:
            sizes = (outer, size, inner, source.dtype)
            low.program.call(place_of_largest, sizes, source.slot, made.slot, smallest=smallest)
        return made

    return rule


def _extreme(how: str) -> Rule:
    """max and min: of all, of an axis with their places, or of two operands."""

    def rule(low: Lowering, call: Call) -> Any:
        if "other" in call.arguments:
            raise Unsupported("takes one operand")
        if "dim" not in call.arguments:
            return folded(low, call, how)
        values = folded(low, call, how)
        place = _place(smallest=how == "amin")
        return [values, _placed(low, call, place)]

    return rule


def _placed(low: Lowering, call: Call, place: Rule) -> Any:
    """The places, whose type is that of the operator's second result."""
    low.metas[call.node], kept = low.metas[call.node][1], low.metas[call.node]
    found = place(low, call)
    low.metas[call.node] = kept
    return found


def _ordered(low: Lowering, call: Call) -> list[Value]:
    """topk and sort: the elements and their places."""
    source, meta = low.dense(call["self"]), low.metas[call.node][0]
    axis = low.number(call["dim"] if call.get("dim") is not None else -1)
    outer, size, inner = _split(source.shape, axis)
    shape = tuple(meta.shape)
    count = shape[axis] if shape else 1
    if size * count > _MOST_STEPS:
        raise Unsupported(f"orders {count} of {size} values; at most {_MOST_STEPS} comparisons are made")
    if source.dtype == "uint8":
        raise Unsupported("orders truth values")
    largest = bool(call.get("largest", call.get("descending")))
    values, places = low.program.value(shape, source.dtype), low.program.value(shape, "int64")
    if values.count:
        sizes = (outer, size, inner, count, source.dtype)
        low.program.call(in_order, sizes, source.slot, values.slot, places.slot, largest=largest)
    return [values, places]


def _fold(how: str) -> Rule:
    def rule(low: Lowering, call: Call) -> Value:
        source = call["self"]
        if low.metas[source].dtype == torch.float32 and how in NORMALISE:
            found: Value = NORMALISE[how](low, call)
            return found
        return folded(low, call, how)

    return rule


def folded(low: Lowering, call: Call, how: str) -> Value:
    """A reduction of any type: axes are turned to the end."""
    meta = low.metas[call.node]
    meta = meta[0] if isinstance(meta, (tuple, list)) else meta
    kind, value = dtype_of(meta, call.node), low.value(call["self"])
    given = call.get("dim")
    rank = len(value.shape)
    axes = sorted({axis % max(rank, 1) for axis in ([given] if isinstance(given, int) else given or range(rank))})
    order = [*(axis for axis in range(rank) if axis not in axes), *axes]
    turned = low.dense(value.viewed(tuple(value.shape[i] for i in order), tuple(value.strides[i] for i in order)))
    size = math.prod(value.shape[axis] for axis in axes)
    if size == 0:
        raise Unsupported("reduces no values")
    if turned.dtype != kind and not (turned.dtype == "uint8" and kind == "uint8"):
        cast = low.program.value(turned.shape, kind)
        low.emit(("cast", ("load", 0), turned.dtype, kind), (turned,), cast)
        turned = cast
    made = low.program.value(tuple(meta.shape), kind)
    if made.count:
        low.program.call(fold, (how, made.count, size, 1, kind), turned.slot, made.slot)
    return made


def _split(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    axis %= max(len(shape), 1)
    return math.prod(shape[:axis]), shape[axis] if shape else 1, math.prod(shape[axis + 1 :])


RULES: dict[str, Rule] = {
    "cumsum": _cumsum,
    "argmax": _place(smallest=False),
    "argmin": _place(smallest=True),
    "max": _extreme("amax"),
    "min": _extreme("amin"),
    "topk": _ordered,
    "sort": _ordered,
    "any": _fold("amax"),
    "all": _fold("amin"),
    **{how: _fold(how) for how in ("sum", "amax", "amin", "prod")},
}
