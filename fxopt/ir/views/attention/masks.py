"""What masks do: hide keys before or after a query's position, keys of padding, other blocks of a row, or anything.

Constant masks are read element by element; computed ones as expressions over positions, with sizes left open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph, tensor_value
from fxopt.ir.neutral import read
from fxopt.ir.views.attention.conditions import condition, triangle_of
from fxopt.ir.views.attention.numbers import number
from fxopt.ir.views.attention.seen import Seen
from fxopt.ir.views.attention.view import HIDDEN_BELOW, Attention, Term
from fxopt.ir.views.common import aten, is_aten

_LARGEST = 1 << 26  # elements of a constant mask that is looked at


@dataclass(frozen=True)
class Boolean:
    """A term that only hides: where `node` is true keys are kept (`keeps`), or hidden; there scores are `hidden`."""

    node: fx.Node
    keeps: bool
    hidden: float


def seen(graph: Graph, view: Attention) -> Seen:
    """Which keys the queries see, by all terms together and by the window."""
    found = Seen(view.left, view.right)
    for term in view.terms:
        found = found.both(seen_by(graph, term))
    return found


def mask_kind(graph: Graph, view: Attention) -> str:
    """The kinds of what hides keys, joined by " + ": "causal + padding"; "none", "general"."""
    return seen(graph, view).kind


def seen_by(graph: Graph, term: Term) -> Seen:
    """Which keys the queries see by one term."""
    value = graph.constant(term.node)
    if value is not None:
        return constant_seen(value, term)
    if term.form == "added" and number(graph, term.node) == 0:
        return Seen()
    found = boolean(graph, term)
    if found is None:
        return _hidden_above(graph, term) or Seen(is_general=True)
    return condition(graph, found.node, found.keeps)


def boolean(graph: Graph, term: Term) -> Boolean | None:
    """The term as one that only hides, in its spellings: where(c, 0, low), c * low, (1 - c) * low; None: it is none."""
    if term.form != "added":
        return Boolean(term.node, term.form == "keeps", term.hidden)
    node: Any = term.node
    for _ in range(6):  # copies, casts and added axes of an additive mask
        found = _choice(graph, node) or _scaled(graph, node)
        if found is not None:
            low = found.hidden * term.factor
            return replace(found, hidden=low) if low <= HIDDEN_BELOW else None
        step = next(filter(None, (read(graph, node, name) for name in ("cast", "identity"))), None)
        if step is None or not isinstance(step[0], fx.Node):
            return None
        node = step[0]
    return None


def _choice(graph: Graph, node: fx.Node) -> Boolean | None:
    """where(c, 0, low) and masked_fill(0, c, low)."""
    choice: Any = read(graph, node, "where")
    if choice is None and is_aten(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        choice = (node.args[1], node.args[2], node.args[0])
    if choice is None or not isinstance(choice[0], fx.Node):
        return None
    first, second = number(graph, choice[1]), number(graph, choice[2])
    if first == 0 and second is not None and second < 0:
        return Boolean(choice[0], True, second)
    if second == 0 and first is not None and first < 0:
        return Boolean(choice[0], False, first)
    return None


def _scaled(graph: Graph, node: fx.Node) -> Boolean | None:
    """c * low and (1 - c) * low, with c a boolean as numbers."""
    pair = read(graph, node, "mul")
    for value, factor in (pair, pair[::-1]) if pair is not None else ():
        low = number(graph, factor)
        if low is None or not low < 0 or math.isinf(low):
            continue  # 0 * inf is no number
        flag, keeps = _flag(graph, value, False)
        if flag is not None:
            return Boolean(flag, keeps, low)
    return None


def _flag(graph: Graph, node: Any, keeps: bool) -> tuple[fx.Node | None, bool]:
    """(the condition, whether it keeps) behind 0 and 1 as numbers."""
    for _ in range(8):
        if not isinstance(node, fx.Node):
            break
        value = tensor_value(node)
        if value is not None and value.dtype == torch.bool:
            return node, keeps
        rest = read(graph, node, "sub")
        if rest is not None and number(graph, rest[0]) == 1:
            node, keeps = rest[1], not keeps
            continue
        step = next(filter(None, (read(graph, node, name) for name in ("cast", "identity"))), None)
        if step is None and is_aten(node, aten._to_copy.default, aten.to.dtype):
            step = node.args
        if step is None:
            break
        node = step[0]
    return None, keeps


def _hidden_above(graph: Graph, term: Term) -> Seen | None:
    """triu(low, k) and tril(low, k): numbers of a triangle, zeros elsewhere."""
    found = triangle_of(graph, term.node)
    if found is None or term.form != "added":
        return None
    x, diagonal, upper = found
    low = number(graph, x)
    if low is None or low * term.factor > HIDDEN_BELOW:
        return None
    return Seen(right=diagonal - 1) if upper else Seen(left=-diagonal - 1)


# ---- constants


def constant_seen(value: torch.Tensor, term: Term) -> Seen:
    """What a constant mask hides, read element by element."""
    shown = shown_by(value, term) if value.numel() <= _LARGEST else None
    return Seen(is_general=True) if shown is None else pattern_of(shown)


def shown_by(value: torch.Tensor, term: Term) -> torch.Tensor | None:
    """Where a constant keeps, when it only hides: nothing is added elsewhere; None else."""
    if value.dtype == torch.bool:
        if term.form == "added":
            return None
        return value if term.form == "keeps" else ~value
    if term.form != "added":
        return value != 0 if term.form == "keeps" else value == 0
    wide = value.double() * term.factor
    shown, hidden = wide == 0, wide <= HIDDEN_BELOW
    return shown if bool((shown | hidden).all()) else None


def pattern_of(shown: torch.Tensor) -> Seen:
    """The simplest pattern that is exactly what is shown [..., queries, keys]."""
    if bool(shown.all()):
        return Seen()
    if shown.dim() < 2 or shown.shape[-2] == 1 or bool((shown == shown[..., :1, :]).all()):
        return Seen(is_padding=True)
    if any(size != 1 for size in shown.shape[:-2]):
        first = shown.reshape(-1, *shown.shape[-2:])
        if not bool((first == first[:1]).all()):
            return Seen(is_general=True)
        shown = first[0]
    plane = shown.reshape(shown.shape[-2:])
    return _band(plane) or _blocks(plane) or Seen(is_general=True)


def _band(plane: torch.Tensor) -> Seen | None:
    """left and right when exactly the keys in between are shown."""
    rows, columns = plane.shape
    distance = torch.arange(columns) - torch.arange(rows).unsqueeze(1)
    inside = distance[plane]
    if not inside.numel():
        return None
    low, high = int(inside.min()), int(inside.max())
    if not torch.equal(plane, (distance >= low) & (distance <= high)):
        return None
    left = None if low <= 1 - rows else -low
    right = None if high >= columns - 1 else high
    sides = all(side is None or side >= 0 for side in (left, right))
    return Seen(left, right) if sides else None


def _blocks(plane: torch.Tensor) -> Seen | None:
    """The sizes of blocks along the diagonal when each query sees exactly the keys of its block."""
    if plane.shape[0] != plane.shape[1]:
        return None
    sizes, start, total = [], 0, plane.shape[0]
    expected = torch.zeros_like(plane)
    while start < total:
        size = int(plane[start].sum())
        if size < 1 or start + size > total:
            return None
        expected[start : start + size, start : start + size] = True
        sizes.append(size)
        start += size
    return Seen(blocks=tuple(sizes)) if torch.equal(plane, expected) else None
