"""The terms that meet the scores, as the fused operator takes them: a window, and one mask that is boolean or added.

Rows of which a mask hides every key keep their meaning. With hidden scores of minus infinity the fused operators give
zeros for them, as the replacement of NaN by 0 does; with large negative ones, the mean of v. Of these some backends
take the largest for minus infinity, so that they are replaced by -1e30, which hides a key as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.views.attention import Attention, Term
from fxopt.ir.views.attention.conditions import triangle_of
from fxopt.ir.views.attention.masks import boolean, seen_by
from fxopt.ir.views.attention.numbers import number, same_sizes, sizes
from fxopt.ir.views.attention.seen import Seen

HIDDEN = -1e30  # the exponential of its distance to any other score is 0


@dataclass(frozen=True)
class Part:
    """`value` is added times `factor`, or keeps or hides scores, which become `hidden` then."""

    value: fx.Node | torch.Tensor
    keeps: bool | None = None  # None: it is added
    factor: float = 1.0
    hidden: float = -math.inf
    frame: tuple[Any, ...] | None = None  # the shape of the scores that it meets

    @property
    def shape(self) -> tuple[Any, ...] | None:
        """The shape of the value; None when it is unknown."""
        return tuple(self.value.shape) if isinstance(self.value, torch.Tensor) else sizes(self.value)

    @property
    def hides_exactly(self) -> bool:
        """Whether hidden keys have no weight at all, and rows without keys give zeros."""
        return self.keeps is not None and self.hidden == -math.inf


@dataclass(frozen=True)
class Mask:
    """What the terms do: hide keys further away than `left` and `right` (None: none), and what `parts` say."""

    left: int | None = None
    right: int | None = None
    parts: tuple[Part, ...] = ()

    @property
    def is_boolean(self) -> bool:
        """Whether all parts can be one boolean mask."""
        return bool(self.parts) and all(part.hides_exactly for part in self.parts)


def mask_of(graph: Graph, view: Attention, bands: bool) -> Mask | Refusal:
    """The mask of an attention, or why it cannot be given to a fused operator.

    Args:
        bands: the operator has attributes for any window, not only for a causal one.
    """
    own = Seen(view.left, view.right)
    seen = [seen_by(graph, term) for term in view.terms]
    window = own
    for each in seen:
        window = window.both(each)
    if window.is_window and (bands or window.kind in ("none", "causal")) and _is_exact(graph, view, window):
        return Mask(window.left, window.right)
    terms = [term for term, each in zip(view.terms, seen, strict=True) if each != Seen()]
    constants = [term for term in terms if graph.constant(term.node) is not None]
    parts: list[Part] = []
    if constants:
        part = _constant(graph, view, constants, alone=len(constants) == len(terms))
        if isinstance(part, Refusal):
            return part
        parts.append(part)
    for term in terms:
        if term not in constants:
            part = _computed(graph, view, term)
            if isinstance(part, Refusal):
                return part
            parts.append(part)
    return Mask(own.left, own.right, tuple(parts))


def _is_exact(graph: Graph, view: Attention, window: Seen) -> bool:
    """Whether a window leaves the same weights: what it hides has none, and every query has a key."""
    lengths = (view.q.shape or (None,))[-2:-1], (view.k.shape or (None,))[-2:-1]
    if window.left is not None and not same_sizes(*lengths):
        return False
    return all(_highest_hidden(graph, term) <= HIDDEN for term in view.terms)


def _highest_hidden(graph: Graph, term: Term) -> float:
    """The largest score that a term puts where it hides."""
    value = graph.constant(term.node)
    if value is None or term.form != "added":
        found = boolean(graph, term)
        if found is None:  # a triangle
            return _of_triangle(graph, term)
        return found.hidden if term.form == "added" else _replacing(found.hidden)
    wide = value.double() * term.factor
    hidden = wide[wide != 0]
    return float(hidden.max()) if hidden.numel() else -math.inf


def _of_triangle(graph: Graph, term: Term) -> float:
    """What triu(low, k) and tril(low, k) add."""
    found = triangle_of(graph, term.node)
    low = None if found is None else number(graph, found[0])
    return 0.0 if low is None else low * term.factor


def _constant(graph: Graph, view: Attention, terms: list[Term], alone: bool) -> Part | Refusal:
    """Constants as one: boolean where they only hide."""
    value = torch.zeros((), dtype=torch.float64)
    for term in terms:
        constant = graph.constant(term.node)
        assert constant is not None, "the caller has looked"
        constant = _separated(constant, term, view)
        if term.form == "added":
            value = value + constant.double() * term.factor
        else:
            keeps = constant.bool() if term.form == "keeps" else ~constant.bool()
            value = torch.where(keeps, value, torch.tensor(_replacing(term.hidden), dtype=torch.float64))
    empty = bool((value == -math.inf).all(-1).any()) if value.dim() else False
    if empty and not view.empty_rows_are_zero:
        return Refusal("its mask hides every key of some rows")
    hides = value <= HIDDEN
    only_hides, infinite = bool(((value == 0) | hides).all()), bool(value[hides].isinf().all())
    if only_hides and (infinite or (alone and not bool(hides.all(-1).any()))):
        return Part(~hides, True)
    if empty or (not alone and bool(value.isinf().any()) and view.empty_rows_are_zero):
        return Refusal("its mask mixes rows without keys with finite numbers")
    return Part(value.clamp(min=HIDDEN).float())


def _separated(constant: torch.Tensor, term: Term, view: Attention) -> torch.Tensor:
    """[batch, heads, ...] of a constant [batch * heads, ...], where the scores are [batch, heads, ...]."""
    shape = view.q.shape or ()
    if len(term.frame or ()) != 3 or len(shape) != 4 or constant.dim() != 3 or constant.shape[0] == 1:
        return constant
    return constant.reshape(-1, shape[1], *constant.shape[1:])


def _replacing(hidden: float) -> float:
    """What a boolean mask puts where it hides; where that is finite, rows without keys get the mean."""
    return -math.inf if hidden == -math.inf else HIDDEN


def _computed(graph: Graph, view: Attention, term: Term) -> Part | Refusal:
    found = boolean(graph, term)
    if found is None:
        return Part(term.node, None, term.factor, frame=term.frame)
    hidden = found.hidden if term.form == "added" else _replacing(found.hidden)
    if hidden == -math.inf and not view.empty_rows_are_zero:
        return Refusal("its mask {} may leave rows without keys, which are NaN and would become 0", label(term.node))
    hidden = max(hidden, HIDDEN) if hidden > -math.inf else hidden
    return Part(found.node, found.keeps, hidden=hidden, frame=term.frame)
