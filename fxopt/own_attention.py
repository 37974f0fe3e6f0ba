"""Attention between 8-bit linears -> `attention_u8`: queries, keys and values are rounded to bytes where they are made.

Unlike linears that are joined with what follows them, this rounds values that were floats, so it needs their calibrated
ranges, and its loss is measured against the budget. Per channel, queries are divided and keys multiplied by the same
factors, which evens out their ranges and leaves the scores as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.builder import Builder, constant_before
from fxopt.ir.graph import Graph, label, shape_of, tensor_value
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.neutral import read
from fxopt.ir.ops.attention_u8 import MIDDLE, attention_u8
from fxopt.ir.ops.linear_u8s8 import linear_u8s8, quantize_u8
from fxopt.ir.views.common import is_onnx, only_user
from fxopt.passes.base import Context
from fxopt.passes.stats import Stats

NAME = "attention-int8"
_COLUMNS = 32  # heads are a multiple of this many channels wide: the kernel's tile
_OPTIONS = {"scale", "q_num_heads", "kv_num_heads", "is_causal", "_outputs"}


@dataclass(frozen=True)
class Place:
    """An attention whose operands are results of 8-bit linears; `takers` round its result."""

    node: fx.Node
    linears: tuple[fx.Node, fx.Node, fx.Node]
    mask: fx.Node | None
    heads: int
    scale: float
    reshape: fx.Node | None
    takers: tuple[fx.Node, ...]


def places(graph: Graph, ctx: Context) -> list[Place]:
    """The attentions that can be computed on bytes; why others cannot goes to the ledger."""
    found = []
    for node in graph.calls():
        if is_onnx(node, "Attention"):
            place = _place(graph, node, ctx)
            if isinstance(place, Place):
                found.append(place)
            else:
                ctx.ledger.add(Verdict(NAME, label(node), "refused", str(place)))
    return found


def on_bytes(graph: Graph, place: Place, stats: Stats, scores: dict[fx.Node, fx.Node]) -> None:
    """Rewrite one place in the graph; `stats` has its linears, `scores` what masks were made into."""
    node = place.node
    q, k, v = (stats[linear].largest().double().clamp(min=1e-6) for linear in place.linears)
    even = (q / k).sqrt()
    peaks = (torch.full_like(q, float((q / even).max())), torch.full_like(k, float((k * even).max())), v)
    factors = (1 / even, even, torch.ones_like(v))
    codes = [_rounded(graph, *each) for each in zip(place.linears, factors, peaks, strict=True)]
    taken, zero = place.takers[0].args[1:3]
    wanted = graph.constant(taken)
    assert wanted is not None and isinstance(zero, int)
    inverse = constant_before(graph, node, (v / 127 * wanted.double()).float(), f"{label(node)}_inverse", (NAME,))
    factor = float(peaks[0][0] * peaks[1][0]) / 127**2 * place.scale
    mask = None if place.mask is None else _scores(graph, place, scores)
    args = (*codes, inverse, mask, place.heads, factor, zero)
    result = graph.call(attention_u8.target, args, before=node, made_by=NAME, like=node)
    if place.reshape is not None:
        target, rest = place.reshape.target, place.reshape.args[1:]
        assert callable(target)
        options = dict(place.reshape.kwargs)
        result = graph.call(target, (result, *rest), options, before=place.reshape, made_by=NAME, like=place.reshape)
    for taker in place.takers:
        taker.replace_all_uses_with(result)
        graph.erase(taker)


def _rounded(graph: Graph, linear: fx.Node, factors: torch.Tensor, peak: torch.Tensor) -> fx.Node:
    """The linear with its outputs times factors, whose magnitude is at most `peak`, as codes around 128."""
    args = list(linear.args)
    for index in (2, 3):
        value = graph.constant(args[index])
        assert value is not None
        args[index] = constant_before(
            graph, linear, (value.double() * factors).float(), f"{label(linear)}_even", (NAME,)
        )
    made = graph.call(linear_u8s8.target, tuple(args), before=linear, made_by=NAME, like=linear)
    constant = constant_before(graph, linear, (127 / peak).float(), f"{label(linear)}_inverse", (NAME,))
    return graph.call(quantize_u8.target, (made, constant, MIDDLE), before=linear, made_by=NAME, like=linear)


def _scores(graph: Graph, place: Place, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The mask as numbers that are added: a boolean one hides keys, whose scores are minus infinity then."""
    assert place.mask is not None
    value = tensor_value(place.mask)
    if value is None or value.dtype != torch.bool:
        return place.mask
    if place.mask not in made:
        b = Builder(graph, place.node, NAME)
        shown, hidden = b.const(torch.tensor(0.0), "shown"), b.const(torch.tensor(-math.inf), "hidden")
        made[place.mask] = b.where(place.mask, shown, hidden)
    return made[place.mask]


def _place(graph: Graph, node: fx.Node, ctx: Context) -> Place | Refusal:
    excluded = ctx.excluded(label(node))
    if excluded is not None:
        return excluded
    operands = node.args[:3]
    if len(node.args) > 4 or set(node.kwargs) - _OPTIONS or node.kwargs.get("_outputs", 1) != 1:
        return Refusal("it has more operands, options or results than the kernel")
    if node.kwargs.get("is_causal"):
        return Refusal("it is causal")
    options: dict[str, Any] = dict(node.kwargs)
    heads = options.get("q_num_heads")
    linears = [value for value in operands if isinstance(value, fx.Node) and value.target is linear_u8s8.target]
    if len(set(linears)) != 3 or any(only_user(value) is not node or value.args[5] != "none" for value in linears):
        return Refusal("its query, key and value are not the results of three linears on codes that only it uses")
    shapes = [shape_of(value) for value in linears]
    q, k = shapes[0], shapes[1]
    if heads is None or options.get("kv_num_heads") != heads or q is None or k is None or len(q) != 3:
        return Refusal("its heads are not joined, or shared")
    size = q[2]
    if not isinstance(size, int) or k[2] != size or size // heads % _COLUMNS:
        return Refusal("its {} heads in {} channels are not a multiple of {} channels wide", heads, size, _COLUMNS)
    mask = _mask(graph, node, q, k)
    if isinstance(mask, Refusal):
        return mask
    user = only_user(node)
    reshape = user if user is not None and is_onnx(user, "Reshape") else None
    result = node if reshape is None else reshape
    takers = tuple(result.users)
    same = all(user.target is quantize_u8.target and user.args[1:] == takers[0].args[1:] for user in takers)
    if not takers or not same:
        return Refusal("its result is not taken as codes only")
    scale = options.get("scale") or 1 / math.sqrt(size // heads)
    return Place(node, (linears[0], linears[1], linears[2]), mask, heads, float(scale), reshape, takers)


def _mask(graph: Graph, node: fx.Node, q: Any, k: Any) -> fx.Node | Refusal | None:
    """The mask before it is expanded to all queries, [1 or batch, 1, 1 or queries, keys]."""
    mask = node.args[3] if len(node.args) > 3 else None
    if not isinstance(mask, fx.Node):
        return None
    shape = shape_of(mask)
    wide: Any = read(graph, mask, "expand")
    if wide is not None and isinstance(wide[0], fx.Node):
        inner = shape_of(wide[0])
        if inner is not None and len(inner) == 4 and str(inner[3]) == str(k[1]):
            mask, shape = wide[0], inner
    value = tensor_value(mask)
    if value is None or shape is None or len(shape) != 4 or value.dtype not in (torch.bool, torch.float32):
        return Refusal("its mask is not of the form [batch, 1, queries, keys]")
    batch, one, queries, keys = map(str, shape)
    if batch not in ("1", str(q[0])) or one != "1" or queries not in ("1", str(q[1])) or keys != str(k[1]):
        return Refusal("its mask is of the shape {}, its query of {}", tuple(shape), tuple(q))
    return mask


__all__ = ["NAME", "Place", "on_bytes", "places"]
