"""Attention that is spelled out: recognised from its softmax, upwards to the values, downwards to queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.views.attention.operands import Shared, shared_heads, unrepeated, unscaled, unscaled_below, untransposed
from fxopt.ir.views.attention.products import turned
from fxopt.ir.views.attention.rotary import rotary
from fxopt.ir.views.attention.scores import Below, below
from fxopt.ir.views.attention.softmax import Above, Softmax, above, called, is_last
from fxopt.ir.views.attention.view import Attention, NotAttention
from fxopt.ir.views.common import escapes


def spelled_out(graph: Graph, found: Softmax) -> Attention | NotAttention:
    """The attention around a softmax, or the first condition that failed."""
    up = above(graph, found)
    down = below(graph, found.scores)
    products = tuple(way.product.node for way in (down, up) if not isinstance(way, Refusal) and way.product is not None)
    if not is_last(found.axis, found.scores):
        reason = Refusal("the softmax runs over axis {}, not over the last one", found.axis)
        return NotAttention(found.node, reason, products)
    for way in (down, up) if products else (up,):
        if isinstance(way, Refusal):
            return NotAttention(found.node, way, products)
    assert isinstance(up, Above) and isinstance(down, Below), "refusals are handled"
    view = _assembled(graph, found, up, down)
    return NotAttention(found.node, view, products) if isinstance(view, Refusal) else view


def _assembled(graph: Graph, found: Softmax, up: Above, down: Below) -> Attention | Refusal:
    first, second = down.product, up.product
    assert first is not None and second is not None, "both ways end at a product"
    if up.drops_sink != (down.sink is not None):
        what = "adds a column to its scores and keeps it" if down.sink is not None else "drops a key behind the softmax"
        return Refusal("it {}", what)
    inner = tuple(dict.fromkeys([*down.inner, *found.inner, *up.inner]))
    outside = escapes(inner, second.node)
    if outside is not None:
        return Refusal("its inner value {} is also used by {}", label(outside[0]), called(outside[1]))
    keys = turned(first.right)
    if keys is None:
        return Refusal("the shape of its keys {} is unknown", label(first.right.node))
    view = Attention(
        second.node, first.left, keys, second.right, "spelled-out", down.scale, down.softcap,
        tuple(reversed(down.terms)), sink=down.sink, empty_rows_are_zero=up.empty_rows_are_zero,
        result_perm=second.perm, softmax=found.node, inner=inner,
    )  # fmt: skip
    return normalised(graph, view)


def normalised(graph: Graph, view: Attention) -> Attention | Refusal:
    """The view with operands before scales, transposes and repeated heads, and with the rotary embedding in front."""
    scale = view.scale
    q, k = view.q, view.k
    if scale is not None:
        q, q_scale = unscaled(graph, q)
        k, k_scale = unscaled(graph, k)
        scale *= q_scale * k_scale
    else:
        q, k = untransposed(graph, q), untransposed(graph, k)
    keys, values = unrepeated(graph, k), unrepeated(graph, untransposed(graph, view.v))
    if scale is not None and keys.times > 1:
        operand, k_scale = unscaled(graph, keys.operand)
        keys, scale = Shared(operand, keys.times), scale * k_scale
    groups: Any = view.groups
    if view.groups == 1:
        groups = shared_heads(q, keys, values)
        if isinstance(groups, Refusal):
            return groups
    elif keys.times > 1 or values.times > 1:
        keys, values = Shared(k, 1), Shared(untransposed(graph, view.v), 1)
    turns = rotary(graph, q.node), rotary(graph, keys.operand.node)
    if scale is not None and turns[0] is None:
        q, q_scale = unscaled_below(graph, q)
        scale *= q_scale
    return replace(view, q=q, k=keys.operand, v=values.operand, scale=scale, groups=groups, rotary=turns)
