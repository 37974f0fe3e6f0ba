"""Attention as `scaled_dot_product_attention`, or, with a soft cap or sinks, as `fxopt::attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label, shape_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.ops.attention import attention
from fxopt.ir.views.attention import Attention
from fxopt.ir.views.attention.numbers import shown
from fxopt.ir.views.common import aten
from fxopt.passes.fuse_attention_heads.masking import HIDDEN, Part
from fxopt.passes.fuse_attention_heads.plan import Plan, dtype_of, materialised
from fxopt.passes.fuse_attention_heads.shape_readers import readers

Masks = dict[Any, fx.Node]  # made once for all attentions that share one


def needs_fxopt(view: Attention) -> bool:
    """Whether torch's operator cannot do it."""
    return bool(view.softcap) or view.sink is not None


def torch_refusal(plan: Plan) -> Refusal | None:
    """Why the operator cannot do what is planned."""
    for user, value in readers(plan):
        return Refusal("{} reads the shape of its inner value {}", label(user), label(value))
    for part in plan.mask.parts:
        if part.shape is None or len(part.shape) > len(plan.shape) + (plan.windows > 1):
            return Refusal("its mask is {}, its scores are {}", shown(part.shape), shown(plan.shape))
    return None


def simplifies_torch(graph: Graph, plan: Plan) -> bool:
    """Whether torch's operator, which is there already, gets less: no mask, or heads before they were repeated."""
    view = plan.view
    if view.kind != "sdpa" or torch_refusal(plan) is not None:
        return False
    if view.terms and not plan.mask.parts:
        return True
    given = view.node.args[1]
    return view.groups > 1 and not view.node.kwargs.get("enable_gqa") and isinstance(given, fx.Node)


def fuse_torch(graph: Graph, plan: Plan, masks: Masks, name: str) -> None:
    """Write the operator in the place of the parts."""
    view = plan.view
    b = Builder(graph, view.node, name)
    taken = [materialised(b, operand) for operand in (view.q, view.k, view.v)]
    heads = plan.shape[-3]
    if plan.windows > 1:
        sizes = [(operand.shape or ())[-2:] for operand in (view.q, view.k, view.v)]
        taken = [b.reshape(x, [-1, plan.windows * heads, *size]) for x, size in zip(taken, sizes, strict=True)]
    mask = _mask(b, plan, masks)
    if needs_fxopt(view):
        left, right = (-1 if side is None else side for side in (plan.mask.left, plan.mask.right))
        sink = None if view.sink is None else _row(b, view.sink)
        arguments = (*taken, mask, sink, float(view.factor or 0.0), view.softcap, left, right)
        result = b.call(attention.target, *arguments)
    else:
        options: dict[str, Any] = {"scale": view.factor}
        if view.groups > 1:
            options["enable_gqa"] = True
        target = aten.scaled_dot_product_attention.default
        result = b.call(target, *taken, mask, 0.0, plan.mask.right == 0, **options)
    if plan.windows > 1:
        result = b.reshape(result, [-1, heads, *(view.v.shape or ())[-2:]])
    if view.result_perm is not None:
        result = b.transpose(result, view.result_perm)
    graph.replace(plan.end, result)


def _row(b: Builder, sink: fx.Node) -> fx.Node:
    """One number per head."""
    constant = b.graph.constant(sink)
    if constant is not None and constant.dim() == 4:
        return b.const(constant[0, :, 0, 0].clone(), "sink")
    return sink if len(shape_of(sink) or ()) == 1 else b.reshape(sink, [-1])


def _mask(b: Builder, plan: Plan, masks: Masks) -> fx.Node | None:
    if not plan.mask.parts:
        return None
    terms = tuple((term.node, term.form, term.factor, term.hidden) for term in plan.view.terms)
    key = (terms, str(plan.shape[-3:]), plan.windows, dtype_of(plan.view.q))
    if key not in masks:
        masks[key] = _boolean(b, plan) if plan.mask.is_boolean else _added(b, plan)
    return masks[key]


def _boolean(b: Builder, plan: Plan) -> fx.Node:
    made = [_kept(b, plan, part) for part in plan.mask.parts]
    node = made[0]
    for other in made[1:]:
        node = b.call(aten.logical_and.default, node, other)
    return node


def _kept(b: Builder, plan: Plan, part: Part) -> fx.Node:
    node = _value(b, plan, part)
    return node if part.keeps else b.call(aten.logical_not.default, node)


def _added(b: Builder, plan: Plan) -> fx.Node:
    made = [_number(b, plan, part) for part in plan.mask.parts]
    node = made[0]
    for other in made[1:]:
        node = b.add(node, other)
    return node


def _number(b: Builder, plan: Plan, part: Part) -> fx.Node:
    node = _value(b, plan, part)
    if part.keeps is None:
        return node if part.factor == 1.0 else b.mul(node, part.factor)
    dtype = dtype_of(plan.view.q)
    lowest = max(HIDDEN, torch.finfo(dtype).min)
    shown_, hidden = (
        b.const(torch.tensor(x, dtype=dtype), "score")
        for x in (0.0, part.hidden if part.hidden == -math.inf else max(part.hidden, lowest))
    )
    return b.where(node, *((shown_, hidden) if part.keeps else (hidden, shown_)))


def _value(b: Builder, plan: Plan, part: Part) -> fx.Node:
    if not isinstance(part.value, torch.Tensor):
        return part.value if not plan.folds(part) else _separated(b, part, plan.shape[-3])
    value = part.value if part.keeps is not None else part.value.to(dtype_of(plan.view.q))
    return b.const(plan.windowed(value), "attention_mask")


def _separated(b: Builder, part: Part, heads: int) -> fx.Node:
    """[batch, heads, ...] of a value [batch * heads, ...]."""
    value: Any = part.value
    ends = [
        size if isinstance(size, int) else b.call(aten.sym_size.int, value, axis)
        for axis, size in enumerate(part.shape or ())
    ][1:]
    return b.reshape(value, [-1, heads, *ends])
