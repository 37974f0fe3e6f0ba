"""Softmax, norms, reductions, attention."""

from __future__ import annotations

import math
from typing import Any

import torch

from fxopt.backends.tvm.kernels.attention import Attention, Placed, attention
from fxopt.backends.tvm.kernels.reduce import reduce
from fxopt.backends.tvm.kernels.rows import layer_norm, rms_norm, softmax
from fxopt.backends.tvm.lowering import Call, Lowering, Rule
from fxopt.backends.tvm.values import Value
from fxopt.errors import Unsupported


def _softmax(low: Lowering, call: Call) -> Value:
    rank = low.metas[call["self"]].dim()
    axis = low.number(call["dim"]) % max(rank, 1)
    if call.get("dtype") not in (None, torch.float32) or call.get("half_to_float"):
        raise Unsupported("changes the element type")
    value = low.value(call["self"])
    if axis == rank - 1:
        source = low.dense(value, "float32")
        made = low.program.value(source.shape)
        if made.count:
            low.program.call(softmax, (made.count // source.shape[-1], source.shape[-1]), source.slot, made.slot)
        return made
    order = [*(i for i in range(rank) if i != axis), axis]
    turned = value.viewed(tuple(value.shape[i] for i in order), tuple(value.strides[i] for i in order))
    source = low.dense(turned, "float32")
    made = low.program.value(source.shape)
    if made.count:
        low.program.call(softmax, (made.count // source.shape[-1], source.shape[-1]), source.slot, made.slot)
    back = [order.index(i) for i in range(rank)]
    return made.viewed(tuple(made.shape[i] for i in back), tuple(made.strides[i] for i in back))


def _layer_norm(low: Lowering, call: Call) -> Value:
    size = math.prod(low.number(item) for item in call["normalized_shape"])
    source = low.dense(call["input"], "float32")
    given = [None if call[key] is None else low.weight(call[key], key) for key in ("weight", "bias")]
    slots = [low.program.constant(item.numpy()) for item in given if item is not None]
    made = low.program.value(source.shape)
    affine = (given[0] is not None, given[1] is not None)
    if made.count:
        sizes = (made.count // size, size, float(call["eps"]))
        low.program.call(layer_norm, sizes, source.slot, *slots, made.slot, affine=affine)
    return made


def _rms_norm(low: Lowering, call: Call) -> Value:
    size = math.prod(low.number(item) for item in call["normalized_shape"])
    source = low.dense(call["input"], "float32")
    weight = None if call["weight"] is None else low.weight(call["weight"], "weight")
    slots = [] if weight is None else [low.program.constant(weight.numpy())]
    made = low.program.value(source.shape)
    eps = call["eps"] if call["eps"] is not None else torch.finfo(torch.float32).eps
    if made.count:
        sizes = (made.count // size, size, float(eps))
        low.program.call(rms_norm, sizes, source.slot, *slots, made.slot, weighted=weight is not None)
    return made


def _reduction(how: str) -> Rule:
    def rule(low: Lowering, call: Call) -> Value:
        if call.get("dtype") not in (None, torch.float32):
            raise Unsupported(f"reduces in {call['dtype']}, expected float32")
        return reduced(low, how, low.value(call["self"]), call.get("dim"), low.shape(call.node))

    return rule


def reduced(low: Lowering, how: str, value: Value, dim: Any, shape: tuple[int, ...]) -> Value:
    """A reduction over axes (None: all) to `shape`."""
    if value.dtype != "float32":
        raise Unsupported(f"reduces {value.dtype}, expected float32")
    rank = len(value.shape)
    axes = sorted({axis % max(rank, 1) for axis in ([dim] if isinstance(dim, int) else dim or range(rank))})
    kept = [axis for axis in range(rank) if axis not in axes]
    size = math.prod(value.shape[axis] for axis in axes)
    if size == 0 and how != "sum":
        raise Unsupported("reduces no values")
    made = low.program.value(shape)
    if axes == list(range(axes[0], axes[-1] + 1) if axes else []):
        source = low.dense(value)
        outer = math.prod(value.shape[: axes[0]] if axes else ())
        inner = math.prod(value.shape[axes[-1] + 1 :] if axes else ())
    else:
        order = [*kept, *axes]
        turned = value.viewed(tuple(value.shape[i] for i in order), tuple(value.strides[i] for i in order))
        source, outer, inner = low.dense(turned), math.prod(value.shape[i] for i in kept), 1
    if made.count:
        low.program.call(reduce, (how, outer, size, inner), source.slot, made.slot)
    return made


def _vector_norm(low: Lowering, call: Call) -> Value:
    """sqrt(sum(x**2))."""
    if call["ord"] != 2 or call.get("dtype") not in (None, torch.float32):
        raise Unsupported(f"has order {call['ord']}, expected 2")
    value = low.value(call["self"])
    if value.dtype != "float32":
        raise Unsupported(f"takes {value.dtype}, expected float32")
    squares, made = low.program.value(value.shape), low.program.value(low.shape(call.node))
    low.emit(("mul", ("load", 0), ("load", 0)), (value,), squares)
    total = reduced(low, "sum", squares, call["dim"], made.shape)
    low.emit(("sqrt", ("load", 0)), (total,), made)
    return made


def _attention(low: Lowering, call: Call) -> Value:
    if call["dropout_p"]:
        raise Unsupported("drops values at random: call model.eval() before")
    q, k, v = (_rows(low, call[name]) for name in ("query", "key", "value"))
    if any(len(item.shape) != 4 for item in (q, k, v)):
        raise Unsupported(f"its query has shape {q.shape}, expected [batch, heads, length, width]")
    batch, heads, queries, width = q.shape
    if k.shape[0] != batch or v.shape[:3] != k.shape[:3] or heads % k.shape[1]:
        raise Unsupported(f"its query has shape {q.shape}, its key {k.shape}, its value {v.shape}")
    scale = call["scale"] if call["scale"] is not None else 1 / math.sqrt(width)
    mask, slots, strides = "", [], (0, 0, 0)
    mask_size = 0
    if call["attn_mask"] is not None:
        value = low.value(call["attn_mask"])
        mask = {"float32": "float32", "uint8": "bool"}.get(value.dtype, "")
        if not mask:
            raise Unsupported(f"its mask is {value.dtype}, expected float32 or bool")
        value, strides = _mask(low, value, (batch, heads, queries, k.shape[2]))
        slots, mask_size = [value.slot], value.slot.count
    placed = tuple(Placed(item.strides[:3], item.offset, item.slot.count) for item in (q, k, v))  # type: ignore[arg-type]
    size = Attention(
        batch, heads, k.shape[1], queries, k.shape[2], width, v.shape[3], float(scale), placed,  # type: ignore[arg-type]
        bool(call["is_causal"]), mask, strides, mask_size,  # type: ignore[arg-type]
    )  # fmt: skip
    made = low.program.value((batch, queries, heads, v.shape[3]))
    if made.count:
        scratch = low.program.slot(size.scratch)
        low.program.call(attention, (size,), q.slot, k.slot, v.slot, *slots, scratch, made.slot)
    batch_step, row, head, column = made.strides
    return made.viewed((batch, heads, queries, v.shape[3]), (batch_step, head, row, column))


def _rows(low: Lowering, argument: Any) -> Value:
    """An operand of attention, with a contiguous last axis."""
    value = low.value(argument)
    if value.dtype != "float32":
        raise Unsupported(f"an operand is {value.dtype}, expected float32")
    if value.shape and value.strides[-1] != 1 and value.shape[-1] != 1:
        return low.dense(value)
    return value


def _mask(low: Lowering, value: Value, shape: tuple[int, ...]) -> tuple[Value, Any]:
    """The mask with contiguous keys, and its strides of batch, head and query."""
    lead = (1,) * (4 - len(value.shape))
    sizes = (*lead, *value.shape)
    if sizes[-1] != shape[-1]:
        raise Unsupported(f"its mask has shape {value.shape}, expected one value for each of {shape[-1]} keys")
    value = low.dense(value)
    steps = (*(0 for _ in lead), *value.strides)
    return value, tuple(0 if size == 1 else step for size, step in zip(sizes[:3], steps[:3], strict=True))


RULES: dict[str, Rule] = {
    "softmax": _softmax,
    "_softmax": _softmax,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _attention,
    "linalg_vector_norm": _vector_norm,
    **{how: _reduction(how) for how in ("sum", "mean", "amax", "amin")},
}
