"""Attention as the ONNX operator `Attention` of opsets 23 and 24.

Where the heads were only separated for the product, q, k and v are taken as [batch, length, heads * width], and nothing
is transposed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, shape_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.views.attention.numbers import same_sizes, shown
from fxopt.ir.views.common import only_user
from fxopt.passes.fuse_attention_heads.masking import HIDDEN, Part
from fxopt.passes.fuse_attention_heads.plan import HEADS_FIRST, Plan, dtype_of, is_flat, materialised
from fxopt.passes.fuse_attention_heads.shape_readers import reread, unreadable

OPSETS = (23, 24)  # in which backends have a kernel for Attention
_OPTIONS = {"scale", "softcap", "is_causal", "qk_matmul_output_mode", "_outputs"}  # the mode of another result
Masks = dict[Any, fx.Node]  # made once for all attentions that share one


def onnx_refusal(plan: Plan) -> Refusal | None:
    """Why the operator cannot do what is planned."""
    view, shape = plan.view, plan.shape
    if view.sink is not None:
        return Refusal("its softmax has one sink per head, which the operator Attention has not")
    if not (view.factor or 0.0) > 0:
        return Refusal("the scale {} of its scores is not positive, which the operator Attention asks for", view.factor)
    fixed = [*shape[1:-2], *((operand.shape or (None,))[-1] for operand in (view.q, view.v))]
    if len(shape) not in (3, 4) or not all(isinstance(size, int) for size in fixed):
        return Refusal("the number or the width of its heads is known at run time only: scores {}", shown(shape))
    if plan.mask.right == 0 and not same_sizes(shape[-2:-1], shape[-1:]):
        return Refusal("its causal mask is of another length than its keys")
    for part in plan.mask.parts:
        size = part.shape
        if size is None or len(size) > len(shape) + (plan.windows > 1):
            return Refusal("its mask is {}, not [batch, heads, length, keys]", shown(size))
    return unreadable(plan)


def simplifies_onnx(graph: Graph, plan: Plan) -> bool:
    """Whether the operator, which is there already, gets less to do: no transposes, no mask, no repeated heads."""
    view = plan.view
    if view.kind != "onnx" or view.heads is not None or set(view.node.kwargs) - _OPTIONS or onnx_refusal(plan):
        return False
    if all(is_flat(graph, operand) is not None for operand in (view.q, view.k, view.v)):
        return True
    if view.terms and not plan.mask.parts:
        return True
    given = shape_of(view.node.args[1])
    return view.groups > 1 and given is not None and same_sizes(given[1:2], plan.shape[1:2])


def fuse_onnx(graph: Graph, plan: Plan, masks: Masks, opset: int, name: str) -> None:
    """Write the operator in the place of the parts."""
    view = plan.view
    b = Builder(graph, view.node, name)
    heads = view.q.shape[-3] if len(plan.shape) == 4 and view.q.shape is not None else 1
    flat = [is_flat(graph, operand) for operand in (view.q, view.k, view.v)] if plan.windows == 1 else [None]
    taken = [value for value in flat if value is not None]
    is_joined = len(taken) == 3
    if not is_joined:
        taken = [materialised(b, operand) for operand in (view.q, view.k, view.v)]
    if plan.windows > 1:
        sizes = [(operand.shape or ())[-2:] for operand in (view.q, view.k, view.v)]
        taken = [b.reshape(x, [-1, plan.windows * heads, *size]) for x, size in zip(taken, sizes, strict=True)]
    axis = 1 if is_joined or len(plan.shape) == 3 else 2
    mask = _mask(b, plan, taken, axis, masks)
    reread(graph, b, plan, taken, axis)
    options: dict[str, Any] = {"scale": view.factor}
    if view.softcap:
        options["softcap"] = view.softcap
    if is_joined or len(plan.shape) == 3:
        options |= {"q_num_heads": heads, "kv_num_heads": heads // view.groups}
    if plan.mask.right == 0:
        options["is_causal"] = 1
    inputs = (*taken, *(() if mask is None else (mask,)))
    result = b.call(OnnxOp("", "Attention", opset), *inputs, **options)
    if is_joined:
        _split(graph, b, plan, result, heads)
        return
    if plan.windows > 1:
        result = b.reshape(result, [-1, heads, *(view.v.shape or ())[-2:]])
    if view.result_perm is not None:
        result = b.transpose(result, view.result_perm)
    graph.replace(plan.end, result)


# ---- the result, [batch, length, heads * width]


def _split(graph: Graph, b: Builder, plan: Plan, result: fx.Node, heads: int) -> None:
    """Give the joined heads to what joins them, or separate them."""
    view = plan.view
    width = (view.v.shape or (0,))[-1]
    turn = _turned(graph, plan)
    join = None if turn is None else _joined(graph, turn)
    if join is not None:
        flat = len(shape_of(join) or ()) == 2
        graph.replace(join, b.reshape(result, [-1, heads * width]) if flat else result)
        return
    split = b.onnx("Reshape", result, b.ints([0, 0, heads, width], "heads"))
    if turn is not None:
        graph.replace(turn, split)
        return
    result = b.transpose(split, HEADS_FIRST)
    graph.replace(plan.end, result if view.result_perm is None else b.transpose(result, view.result_perm))


def _turned(graph: Graph, plan: Plan) -> fx.Node | None:
    """The value [batch, length, heads, width] that the result becomes."""
    view = plan.view
    if view.result_perm is not None:
        return view.node if view.result_perm == HEADS_FIRST else None
    turn = only_user(view.node)
    turned = None if turn is None else read(graph, turn, "transpose")
    return turn if turned is not None and tuple(turned[1]) == HEADS_FIRST else None


def _joined(graph: Graph, turn: fx.Node) -> fx.Node | None:
    """The reshape that joins the heads; batch and length may be joined too."""
    join = only_user(turn)
    joined = None if join is None else read(graph, join, "reshape")
    before, after = shape_of(turn), shape_of(join)
    if joined is None or joined[0] is not turn or before is None or after is None or len(after) not in (2, 3):
        return None
    same = len(after) == 2 or same_sizes(before[:2], after[:2])
    return join if same and str(after[-1]) == str(before[2] * before[3]) else None


# ---- the mask, its last two axes [length, keys]


def _mask(b: Builder, plan: Plan, taken: list[fx.Node], axis: int, masks: Masks) -> fx.Node | None:
    """The mask as Attention takes it; `axis` is that of the length in `taken`."""
    if not plan.mask.parts:
        return None
    if plan.view.kind == "onnx":
        return plan.view.terms[0].node
    view, sizes = plan.view, list(plan.shape[-2:])
    terms = tuple((term.node, term.form, term.factor, term.hidden) for term in view.terms)
    key = (terms, view.empty_rows_are_zero, str(plan.shape[-3:]), plan.windows, dtype_of(view.q))
    if key not in masks:
        node, shape = _boolean(b, plan) if plan.mask.is_boolean else _added(b, plan)
        if not same_sizes(shape[-2:], sizes):
            node = b.expand(node, _full_shape(b, sizes, taken, axis))
        if len(plan.shape) == 3 and len(shape) == 3:  # one head
            node = b.unsqueeze(node, (1,))
        masks[key] = node
    return masks[key]


def _full_shape(b: Builder, sizes: list[Any], taken: list[fx.Node], axis: int) -> fx.Node | list[Any]:
    """[1, length, keys]; what is before it broadcasts."""
    if all(isinstance(size, int) for size in sizes):
        return [1, *sizes]
    lengths = [b.onnx("Shape", value, start=axis, end=axis + 1) for value in (taken[0], taken[2])]
    return b.concat([b.const(torch.ones(1, dtype=torch.int64), "ones"), *lengths], 0)


def _value(b: Builder, plan: Plan, part: Part) -> tuple[fx.Node, tuple[Any, ...]]:
    """The part's node and its shape."""
    if isinstance(part.value, torch.Tensor):
        value = plan.windowed(part.value)
        if part.keeps is None:
            value = value.to(dtype_of(plan.view.q))
        return b.const(value, "attention_mask"), tuple(value.shape)
    shape = part.shape or ()
    if not plan.folds(part):
        return part.value, shape
    heads = plan.shape[-3]
    ends = b.onnx("Shape", part.value, start=1, end=3)  # [batch * heads, ...]
    whole = b.concat([b.const(torch.tensor([-1, heads], dtype=torch.int64), "heads"), ends], 0)
    return b.reshape(part.value, whole), (plan.shape[0], heads, *shape[1:])


def _boolean(b: Builder, plan: Plan) -> tuple[fx.Node, tuple[Any, ...]]:
    """True where all parts keep."""
    made: list[tuple[fx.Node, tuple[Any, ...]]] = []
    for part in plan.mask.parts:
        node, shape = _value(b, plan, part)
        made.append((node if part.keeps else b.onnx("Not", node), shape))
    node, shape = made[0]
    for other, other_shape in made[1:]:
        node, shape = b.onnx("And", node, other), _broadcast(shape, other_shape)
    return node, shape


def _added(b: Builder, plan: Plan) -> tuple[fx.Node, tuple[Any, ...]]:
    """The sum of all parts, hidden scores bounded from below."""
    made = [_as_number(b, plan, part) for part in plan.mask.parts]
    node, shape = made[0]
    for other, other_shape in made[1:]:
        node, shape = b.add(node, other), _broadcast(shape, other_shape)
    bounded = all(part.keeps is not None or isinstance(part.value, torch.Tensor) for part in plan.mask.parts)
    infinite = any(part.hides_exactly for part in plan.mask.parts)
    if bounded and not infinite and len(made) == 1:
        return node, shape
    low = b.maximum(node, _lowest(plan))
    if plan.view.empty_rows_are_zero:
        hidden = b.const(torch.tensor(-math.inf, dtype=dtype_of(plan.view.q)), "hidden")
        low = b.where(b.onnx("IsInf", node, detect_positive=0), hidden, low)
    return low, shape


def _as_number(b: Builder, plan: Plan, part: Part) -> tuple[fx.Node, tuple[Any, ...]]:
    node, shape = _value(b, plan, part)
    if part.keeps is None:
        return (node if part.factor == 1.0 else b.mul(node, part.factor)), shape
    dtype = dtype_of(plan.view.q)
    shown, hidden = (
        b.const(torch.tensor(x, dtype=dtype), "score")
        for x in (0.0, part.hidden if part.hides_exactly else max(part.hidden, _lowest(plan)))
    )
    return b.where(node, *((shown, hidden) if part.keeps else (hidden, shown))), shape


def _lowest(plan: Plan) -> float:
    return max(HIDDEN, torch.finfo(dtype_of(plan.view.q)).min)


def _broadcast(one: tuple[Any, ...], two: tuple[Any, ...]) -> tuple[Any, ...]:
    """The shape of a sum."""
    if len(one) < len(two):
        one, two = two, one
    two = (1,) * (len(one) - len(two)) + tuple(two)
    return tuple(b if isinstance(a, int) and a == 1 else a for a, b in zip(one, two, strict=True))
