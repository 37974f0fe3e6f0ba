"""From a softmax down to q @ k.T: scales, masks, biases, a soft cap and sinks, each in all its spellings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph, shape_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.views.attention.numbers import is_one, number, same_sizes, shown
from fxopt.ir.views.attention.products import Product, product
from fxopt.ir.views.attention.softmax import called, cast_below, is_last, keeps_rows, without_maximum
from fxopt.ir.views.attention.view import HIDDEN_BELOW, Term
from fxopt.ir.views.common import aten, is_aten

_DEEPEST = 24  # operators between the softmax and the product


@dataclass
class Below:
    """What lies between the softmax and the product of queries and keys; `terms` from the softmax downwards."""

    product: Product | None = None
    inner: list[fx.Node] = field(default_factory=list)
    scale: float = 1.0
    softcap: float = 0.0
    terms: list[Term] = field(default_factory=list)
    sink: fx.Node | None = None


def below(graph: Graph, scores: fx.Node) -> Below | Refusal:
    """The way from the softmax's operand to the product, or the first thing in it that is not understood."""
    return _Descent(graph).descend(scores)


class _Descent:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.way = Below()
        self.reaches: dict[fx.Node, bool] = {}

    def descend(self, node: fx.Node) -> Below | Refusal:
        way = self.way
        while True:
            made = product(self.graph, node)
            if made is not None:
                return self.arrive(node, made)
            step: fx.Node | Refusal | None = (
                self.unshifted(node) or self.scaled(node) or self.masked(node) or self.capped(node)
            )
            step = step or self.with_sink(node) or self.moved(node)
            if isinstance(step, Refusal):
                return step
            if step is None:
                return Refusal("between q @ k.T and the softmax there is {}, which is not understood", called(node))
            way.inner.append(node)
            node = step

    def arrive(self, node: fx.Node, made: Product) -> Below | Refusal:
        """At the product of queries and keys."""
        way = self.way
        if made.holds_matrix(self.graph):
            return Refusal("its scores are {}, a product with a constant matrix: a linear", called(node))
        if made.perm is not None:
            return Refusal("the scores {} are not of the form [..., queries, keys]", called(node))
        way.inner.append(node)
        if made.added is not None:
            refused = self.with_term(node, node, Term(made.added, "added", way.scale))
            if refused is not None:
                return refused
        way.scale *= made.scale
        way.product = made
        return way

    # ---- one step each: the node below, a refusal, or None for "something else"

    def unshifted(self, node: fx.Node) -> fx.Node | None:
        """x - max(x): only right below the softmax, where nothing but a constant shift is lost."""
        way = self.way
        if way.terms or way.scale != 1.0 or way.softcap:
            return None
        found = without_maximum(self.graph, node)
        if found is None:
            return None
        way.inner += found[1]
        return found[0]

    def moved(self, node: fx.Node) -> fx.Node | None:
        """A cast, a copy, or a reshape that keeps the last two axes."""
        cast = cast_below(self.graph, node)
        if cast is not None:
            return cast
        shaped = read(self.graph, node, "reshape")
        if shaped is not None and isinstance(shaped[0], fx.Node) and keeps_rows(node, shaped[0]):
            return shaped[0]
        return None

    def scaled(self, node: fx.Node) -> fx.Node | Refusal | None:
        found = factored(self.graph, node)
        if found is None:
            return self.bad_factor(node)
        value, factor = found
        if read(self.graph, value, "tanh") is not None:
            return None  # a soft cap
        self.way.scale *= factor
        return value

    def bad_factor(self, node: fx.Node) -> Refusal | None:
        """A factor that is not one number, where one of the operands leads to the product."""
        for name in ("mul", "div"):
            pair = read(self.graph, node, name)
            if pair is None:
                continue
            for value, factor in (pair, pair[::-1]) if name == "mul" else (pair,):
                if self.leads(value) and isinstance(factor, fx.Node) and not _is_cap(self.graph, value):
                    verb = "multiplied" if name == "mul" else "divided"
                    return Refusal("the scores are {} by {}, which is not one constant number", verb, called(factor))
        return None

    def masked(self, node: fx.Node) -> fx.Node | Refusal | None:
        total, difference = read(self.graph, node, "add"), read(self.graph, node, "sub")
        for pair, sign in ((total, 1.0), (difference, -1.0)):
            if pair is None or not all(isinstance(operand, fx.Node) for operand in pair):
                continue
            found = self.summed(node, pair[0], pair[1], sign)
            if found is not None:
                return found
        return self.chosen(node)

    def summed(self, node: fx.Node, first: fx.Node, second: fx.Node, sign: float) -> fx.Node | Refusal | None:
        """value + term, in either order; value - term."""
        leads = self.leads(first), sign > 0 and self.leads(second)
        if all(leads):
            return Refusal(
                "two products are added before the softmax, {} and {} (a relative position term)",
                called(first), called(second),
            )  # fmt: skip
        if not any(leads):
            return None
        value, term = (first, second) if leads[0] else (second, first)
        blended = self.blended(node, value, term, sign)
        if blended is not None:
            return blended
        return self.with_term(node, value, Term(term, "added", sign * self.way.scale)) or value

    def blended(self, node: fx.Node, value: fx.Node, term: fx.Node, sign: float) -> fx.Node | Refusal | None:
        """scores * keep + (keep - 1) * large, with constants of zeros and ones: a boolean mask."""
        pair = read(self.graph, value, "mul")
        low = self.graph.constant(term)
        for scores, factor in (pair, pair[::-1]) if pair is not None and low is not None else ():
            keep = self.graph.constant(factor)
            if keep is None or keep.numel() == 1 or not self.leads(scores) or low is None:
                continue
            hidden = _blend(keep, low.double() * sign)
            if hidden is None:
                return Refusal("the scores are multiplied by {}, which is not one constant number", called(factor))
            self.way.inner.append(value)
            mask = Term(factor, "keeps", hidden=hidden * self.way.scale)
            return self.with_term(node, scores, mask) or scores
        return None

    def chosen(self, node: fx.Node) -> fx.Node | Refusal | None:
        """where(mask, scores, low) and masked_fill."""
        choice: Any = read(self.graph, node, "where")
        if choice is None and is_aten(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            choice = (node.args[1], node.args[2], node.args[0])
        if choice is None:
            return None
        for position in (1, 2):
            scores, other = choice[position], choice[3 - position]
            if not isinstance(scores, fx.Node) or not self.leads(scores):
                continue
            filler = number(self.graph, other)
            if filler is None:
                what = called(other) if isinstance(other, fx.Node) else other
                return Refusal("{} puts {} where it hides, which is not one constant number", called(node), what)
            hidden = filler * self.way.scale
            if hidden > HIDDEN_BELOW or hidden != hidden:
                return Refusal("{} puts {} where it hides; at most {} hides", called(node), hidden, HIDDEN_BELOW)
            mask = Term(choice[0], "keeps" if position == 1 else "hides", hidden=hidden)
            return self.with_term(node, scores, mask) or scores
        return None

    def with_term(self, node: fx.Node, scores: fx.Node, term: Term) -> Refusal | None:
        """Note a term that the scores meet, with the node as result."""
        if self.way.softcap:
            return Refusal("the soft cap is applied behind the mask {}", called(term.node))
        if not _same_shape(scores, node):
            shapes = (shown(shape_of(node)), shown(shape_of(scores)))
            return Refusal("the mask {} makes scores {} of scores {}", called(term.node), *shapes)
        self.way.terms.append(replace(term, frame=shape_of(node)))
        return None

    def capped(self, node: fx.Node) -> fx.Node | Refusal | None:
        """cap * tanh(x / cap)"""
        pair = read(self.graph, node, "mul")
        for value, constant in (pair, pair[::-1]) if pair is not None else ():
            cap, curve = number(self.graph, constant), read(self.graph, value, "tanh")
            if cap is None or curve is None:
                continue
            if self.way.softcap or self.way.scale != 1.0:
                return Refusal("the scores are scaled behind the soft cap {}", called(node))
            if not cap > 0:
                return Refusal("the soft cap {} is not positive", cap)
            x, factor = factored(self.graph, curve[0]) or (curve[0], 1.0)
            self.way.softcap = cap
            self.way.scale = 1.0 if math.isclose(factor * cap, 1, rel_tol=1e-6) else factor * cap
            self.way.inner += [value] if x is curve[0] else [value, curve[0]]
            return x
        return None

    def with_sink(self, node: fx.Node) -> fx.Node | Refusal | None:
        """concat(scores, sinks) along the keys, with one sink per head."""
        joined: Any = read(self.graph, node, "concat")
        if joined is None or len(joined[0]) != 2 or not is_last(joined[1], node):
            return None
        scores, sink = joined[0]
        if not self.leads(scores) or not isinstance(sink, fx.Node):
            return None
        if self.way.terms or self.way.scale != 1.0 or self.way.softcap or self.way.sink is not None:
            return Refusal("the scores that {} joins are changed behind it", called(node))
        source = _per_head(self.graph, sink)
        if source is None:
            return Refusal("{} adds more columns to the scores than one sink per head", called(node))
        self.way.sink = source
        return scores if isinstance(scores, fx.Node) else None

    # ---- which operand is the scores

    def leads(self, node: Any, depth: int = 0) -> bool:
        """True when the node is a product that is no linear, below what is understood."""
        if not isinstance(node, fx.Node) or depth > _DEEPEST:
            return False
        if node not in self.reaches:
            self.reaches[node] = False  # while it is looked at
            made = product(self.graph, node)
            self.reaches[node] = (
                not made.holds_matrix(self.graph)
                if made is not None
                else any(self.leads(operand, depth + 1) for operand in self.operands(node))
            )
        return self.reaches[node]

    def operands(self, node: fx.Node) -> list[Any]:
        """What the scores may be among the operands of something that is understood."""
        graph = self.graph
        moved = self.moved(node)
        if moved is not None:
            return [moved]
        shift = without_maximum(graph, node)
        if shift is not None:
            return [shift[0]]
        for name in ("mul", "add"):
            pair = read(graph, node, name)
            if pair is not None:
                return list(pair)
        for name in ("div", "sub", "tanh"):
            found = read(graph, node, name)
            if found is not None:
                return [found[0]]
        choice = read(graph, node, "where")
        if choice is not None:
            return list(choice[1:])
        return [node.args[0]] if is_aten(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor) else []


def factored(graph: Graph, node: object) -> tuple[fx.Node, float] | None:
    """(x, c) when the node is x times the constant number c, and of the shape of x."""
    pair, ratio = read(graph, node, "mul"), read(graph, node, "div")
    for value, constant in (pair, pair[::-1]) if pair is not None else ():
        factor = number(graph, constant)
        if factor is not None and isinstance(value, fx.Node) and _same_shape(value, node):
            return value, factor
    divisor = None if ratio is None else number(graph, ratio[1])
    if ratio is None or not divisor or not isinstance(ratio[0], fx.Node) or not _same_shape(ratio[0], node):
        return None
    return ratio[0], 1 / divisor


def _same_shape(x: object, y: object) -> bool:
    """Whether two values have the same shape, as far as it is known."""
    first, second = shape_of(x), shape_of(y)
    return first is None or second is None or same_sizes(first, second)


def _is_cap(graph: Graph, value: object) -> bool:
    return read(graph, value, "tanh") is not None


def _blend(keep: torch.Tensor, low: torch.Tensor) -> float | None:
    """The number that is added where `keep` is 0, with nothing added where it is 1; None when it is not so."""
    try:
        keep, low = torch.broadcast_tensors(keep.double(), low)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    kept, hidden = keep == 1, keep == 0
    if not bool((kept | hidden).all()) or not bool(hidden.any()) or bool((low[kept] != 0).any()):
        return None
    value = float(low[hidden][0])
    return value if value <= HIDDEN_BELOW and bool((low[hidden] == value).all()) else None


def _per_head(graph: Graph, node: fx.Node) -> fx.Node | None:
    """One number per head, below reshapes, expansions and casts to [batch, heads, queries, 1]; constants stay."""
    shape = shape_of(node)
    if shape is None or len(shape) != 4 or not is_one(shape[-1]):
        return None
    constant = graph.constant(node)
    if constant is not None:
        return node if bool((constant == constant[:1, :, :1]).all()) else None
    names, heads = ("expand", "reshape", "unsqueeze"), shape[1]
    for _ in range(8):
        found = next(filter(None, (read(graph, node, name) for name in names)), None)
        source = cast_below(graph, node) if found is None else found[0]
        if not isinstance(source, fx.Node) or not _spreads_heads(source, heads):
            break
        node = source
    return node if _spreads_heads(node, heads) else None


def _spreads_heads(x: fx.Node, heads: Any) -> bool:
    """Whether every axis of x but that of the heads has size 1."""
    shape = shape_of(x)
    if shape is None or (len(shape) == 4 and str(shape[1]) != str(heads)):
        return False
    return sorted(map(str, shape)) == sorted([str(heads), *["1"] * (len(shape) - 1)])
