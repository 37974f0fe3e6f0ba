"""Queries, keys and values as linears of one input -> one linear, of which they are slices.

Not where something is added to one of them first, such as a low-rank adapter: that is no linear of the input.
"""

from __future__ import annotations

import torch
from torch import fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label, shape_of, tensor_value
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.views.attention import Attention, Operand
from fxopt.ir.views.attention.rotary import rotary
from fxopt.ir.views.attention.scores import factored
from fxopt.ir.views.attention.softmax import called
from fxopt.ir.views.linear import Linear, linear
from fxopt.passes.base import Context

_MOVES = ("reshape", "transpose", "identity", "unsqueeze", "squeeze")


def projections(graph: Graph, view: Attention, ctx: Context) -> tuple[Linear, ...] | Refusal | None:
    """The three linears of one input, or why they are not made one; None when at most one is a linear of it."""
    found = [_source(graph, operand) for operand in (view.q, view.k, view.v)]
    linears = [each for each in found if isinstance(each, Linear)]
    inputs = {each.x for each in linears}
    if len({each.node for each in linears}) < 2 or len(inputs) != 1:
        return None
    other = next((each for each in found if isinstance(each, Refusal)), None)
    if other is not None or len({each.node for each in linears}) != 3:
        return other
    value = tensor_value(linears[0].x)
    if value is None:
        return Refusal("the type of their input is unknown")
    refused = next(filter(None, (ctx.excluded(label(each.node)) for each in linears)), None)
    unsupported = refused or ctx.supports("linear_qkv", str(value.dtype).removeprefix("torch."))
    return Refusal("{}", unsupported) if unsupported else tuple(linears)


def _source(graph: Graph, operand: Operand) -> Linear | Refusal:
    """The linear below what moves elements, scales, and turns pairs of features."""
    node: object = operand.node
    while isinstance(node, fx.Node):
        found = linear(graph, node)
        if isinstance(found, Linear):
            return found
        turn, scaled = rotary(graph, node), factored(graph, node)
        step = next(filter(None, (read(graph, node, name) for name in _MOVES)), None)
        if turn is not None:
            node = turn.x
        elif scaled is not None:
            node = scaled[0]
        elif step is not None:
            node = step[0]
        else:
            return Refusal("{} is no linear of an input", called(node))
    return Refusal("{} is no linear of an input", node)


def merge(graph: Graph, parts: tuple[Linear, ...], name: str) -> None:
    """Write one linear in the place of several of one input."""
    first = min(parts, key=lambda each: each.node)
    b = Builder(graph, first.node, name)
    weight = torch.cat([each.weight(graph) for each in parts])
    known = [each.bias(graph) for each in parts]
    rows = [len(each.weight(graph)) for each in parts]
    bias = None
    if any(each is not None for each in known):
        bias = torch.cat(
            [weight.new_zeros(count) if each is None else each for each, count in zip(known, rows, strict=True)]
        )
    whole = b.linear(first.x, weight, bias, label(first.node))
    axis = len(shape_of(first.node) or (0, 0)) - 1
    start = 0
    for each, count in zip(parts, rows, strict=True):
        before = Builder(graph, each.node, name)
        graph.replace(each.node, before.slice(whole, [start], [start + count], [axis], [1]))
        start += count
