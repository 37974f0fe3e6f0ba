"""Views, copies, concatenation: how elements lie. torch computes the strides of views, on tensors without data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx.node import map_arg

from fxopt.backends.tvm.codes import Coded
from fxopt.backends.tvm.kernels.gather import gather
from fxopt.backends.tvm.kernels.pointwise import Tree
from fxopt.backends.tvm.lowering import Call, Lowering, Rule, dtype_of
from fxopt.backends.tvm.values import Value
from fxopt.errors import Unsupported

_VIEWS = (
    *("view", "permute", "transpose", "t", "expand", "expand_as", "slice", "select", "unsqueeze", "squeeze"),
    *("unflatten", "narrow", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "movedim", "mT"),
    *("swapaxes", "view_as", "unfold", "diagonal", "lift_fresh_copy"),
)
_RESHAPES = ("reshape", "_unsafe_view", "flatten", "reshape_as", "_reshape_copy")


def described(value: Value) -> torch.Tensor:
    """A tensor without data with the value's shape, strides and offset."""
    return torch.empty(value.slot.count, device="meta").as_strided(value.shape, value.strides, value.offset)


def _viewed(value: Value, found: Any) -> Any:
    if isinstance(found, torch.Tensor):
        return Value(value.slot, tuple(found.shape), tuple(found.stride()), int(found.storage_offset()))
    return [_viewed(value, item) for item in found]


def _applied(low: Lowering, call: Call, tensor: torch.Tensor) -> Any:
    args, kwargs = map_arg((tuple(call.node.args[1:]), call.node.kwargs), low.metas.__getitem__)
    target: Any = call.node.target
    return target(tensor, *args, **kwargs)


def _view(low: Lowering, call: Call) -> Any:
    value = low.value(call.node.args[0])
    try:
        return _viewed(value, _applied(low, call, described(value)))
    except RuntimeError:  # the elements do not lie so that the view exists: ours may lie elsewhere than torch's
        value = low.dense(value)
        return _viewed(value, _applied(low, call, described(value)))


def _reshape(low: Lowering, call: Call) -> Value:
    value = low.value(call.node.args[0])
    shape = low.shape(call.node)
    try:
        found = described(value).view(shape)
    except RuntimeError:
        value = low.dense(value)
        found = described(value).view(shape)
    made: Value = _viewed(value, found)
    return made


def _same(low: Lowering, call: Call) -> Value:
    return low.value(call.node.args[0])


def _dropout(low: Lowering, call: Call) -> Value:
    if call.get("train", call.get("training")):
        raise Unsupported("drops values at random: call model.eval() before")
    return low.value(call.node.args[0])


def _cat(low: Lowering, call: Call) -> Value:
    return _joined(low, call, call["tensors"], low.number(call["dim"]))


def _joined(low: Lowering, call: Call, parts: Any, axis: int) -> Value:
    meta = low.metas[call.node]
    axis %= max(meta.dim(), 1)
    made = low.program.value(tuple(meta.shape), dtype_of(meta, call.node))
    start = 0
    for part in parts:
        if low.metas[part].numel() == 0:
            continue
        value = low.value(part)
        if value.dtype != made.dtype:
            raise Unsupported(f"joins {value.dtype} and {made.dtype}; expected one type")
        place = made.viewed(value.shape, made.strides, start * made.strides[axis])
        low.copy(value, place)
        start += value.shape[axis]
    return made


def _stack(low: Lowering, call: Call) -> Value:
    meta = low.metas[call.node]
    axis = low.number(call["dim"]) % meta.dim()
    made = low.program.value(tuple(meta.shape), dtype_of(meta, call.node))
    strides = made.strides[:axis] + made.strides[axis + 1 :]
    for index, part in enumerate(call["tensors"]):
        value = low.value(part)
        low.copy(value, made.viewed(value.shape, strides, index * made.strides[axis]))
    return made


def _pad(low: Lowering, call: Call) -> Value:
    """Constant padding: a result full of the value, then the operand in its middle."""
    if call.get("mode", "constant") not in (None, "constant"):
        raise Unsupported(f"pads with mode {call['mode']!r}; expected constant")
    value, meta = low.value(call["self"]), low.metas[call.node]
    pads = [low.number(item) for item in call["pad"]]
    if min(pads, default=0) < 0:
        raise Unsupported("has negative pads")
    made = low.program.value(tuple(meta.shape), dtype_of(meta, call.node))
    low.emit(("constant", call.get("value") or 0, made.dtype), (), made)
    begins = [0] * (meta.dim() - len(pads) // 2) + list(reversed(pads[::2]))
    offset = sum(begin * stride for begin, stride in zip(begins, made.strides, strict=True))
    low.copy(value, made.viewed(value.shape, made.strides, offset))
    return made


def _embedding(low: Lowering, call: Call) -> Value:
    table = low.weight(call["weight"], "table")
    indices = low.dense(call["indices"])
    if indices.dtype not in ("int64", "int32"):
        raise Unsupported(f"takes indices of integers, not {indices.dtype}")
    made = low.program.value(low.shape(call.node))
    rows, width = table.shape
    slot = low.program.constant(table.numpy())
    low.program.call(gather, (indices.count, rows, width, indices.dtype), slot, indices.slot, made.slot)
    return made


def _index(low: Lowering, call: Call) -> Value:
    """x[i, j, ...] by integers on the first axes: a strided view where known ones step evenly, else a lookup."""
    value = low.value(call["self"])
    given = list(call["indices"])
    if not given or any(item is None for item in given):
        raise Unsupported("indexes other axes than the first ones")
    kinds = {str(low.metas[item].dtype).removeprefix("torch.") for item in given}
    if not kinds <= {"int64", "int32"}:
        raise Unsupported(f"takes indices of integers, not {', '.join(sorted(kinds))}")
    constants = [low.constant(item) for item in given]
    if all(item is not None for item in constants):
        order = torch.arange(value.slot.count).as_strided(value.shape, value.strides, value.offset)
        found = torch.ops.aten.index.Tensor(order, constants)
        strides = even_strides(found)
        if strides is not None:
            return Value(value.slot, tuple(found.shape), strides, int(found.flatten()[0]) if found.numel() else 0)
    source, sizes = low.dense(value), value.shape[: len(given)]
    shape = low.shape(call.node)
    lead = shape[: len(shape) - len(value.shape) + len(given)]
    places = low.program.value(lead, "int64")
    low.emit(_flat_index([str(low.metas[item].dtype) for item in given], sizes), tuple(map(low.value, given)), places)
    made = low.program.value(shape, source.dtype)
    width = math.prod(value.shape[len(given) :])
    table = (places.count, math.prod(sizes), width, "int64")
    if made.count:
        low.program.call(gather, table, source.slot, places.slot, made.slot, kind=source.dtype)
    return made


def _flat_index(kinds: list[str], sizes: tuple[int, ...]) -> Tree:
    """i * size + j ..., counted from the end where negative; -1 where one lies outside."""
    zero: Tree = ("constant", 0, "int64")
    flat: Tree = zero
    inside: Tree | None = None
    for number, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
        index: Tree = ("load", number)
        index = index if kind == "torch.int64" else ("cast", index, "int32", "int64")
        end: Tree = ("constant", size, "int64")
        index = ("where", ("lt", index, zero), ("add", index, end), index)
        within: Tree = ("and", ("ge", index, zero), ("lt", index, end))
        inside = within if inside is None else ("and", inside, within)
        flat = index if number == 0 else ("add", ("mul", flat, end), index)
    return ("where", inside, flat, ("constant", -1, "int64"))


def even_strides(places: torch.Tensor) -> tuple[int, ...] | None:
    """Strides of a view whose elements lie at these places; None when there is none.

    >>> even_strides(torch.tensor([[1, 3], [1, 3]]))
    (0, 2)
    """
    if places.numel() == 0:
        return (1,) * places.dim()
    strides = []
    for axis, size in enumerate(places.shape):
        rows = places.movedim(axis, 0).flatten(1) if places.dim() > 1 else places[:, None]
        strides.append(int(rows[1, 0] - rows[0, 0]) if size > 1 else 0)
    steps = torch.stack(torch.meshgrid(*map(torch.arange, places.shape), indexing="ij"), -1)
    expected = places.flatten()[0] + (steps * torch.tensor(strides)).sum(-1)
    return tuple(strides) if min(strides) >= 0 and bool((places == expected).all()) else None


def _on_codes(rule: Rule) -> Rule:
    """The rule on the codes of a coded tensor: how elements lie does not depend on what they stand for."""

    def on_codes(low: Lowering, call: Call) -> Any:
        node = call.node.args[0]
        coded = low.coded(node)
        if coded is None:
            return rule(low, call)
        low.values[node] = coded.value  # type: ignore[index]
        found = rule(low, call)
        low.values[node] = coded  # type: ignore[index]
        return [Coded(item, coded.levels) for item in found] if isinstance(found, list) else Coded(found, coded.levels)

    return on_codes


VIEWS: dict[str, Rule] = {
    **dict.fromkeys(_VIEWS, _on_codes(_view)),
    **dict.fromkeys(_RESHAPES, _on_codes(_reshape)),
    **dict.fromkeys(("contiguous", "clone"), _on_codes(_same)),
    **dict.fromkeys(("dropout", "native_dropout", "feature_dropout", "alpha_dropout"), _on_codes(_dropout)),
}
RULES: dict[str, Rule] = {
    **VIEWS,
    "index": _index,
    "cat": _cat,
    "concat": _cat,
    "stack": _stack,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "embedding": _embedding,
}
