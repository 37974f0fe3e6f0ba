"""How one attention is fused: its operands with the heads on an axis of their own, and its mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label, shape_of, tensor_value
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.views.attention import Attention, Operand, Term
from fxopt.ir.views.attention.numbers import is_one, same_sizes, shown
from fxopt.ir.views.attention.operands import untransposed
from fxopt.ir.views.common import reads_shape
from fxopt.passes.fuse_attention_heads.masking import Mask, Part, mask_of

HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class Plan:
    """One attention that can be fused. `view` has operands of equal rank; `end` gets the result's value.

    Attributes:
        windows: as many heads are made of each, of which the batch has fewer (windows of an image share the batch).
        end: `view.node`, or a reshape of it that separates batch and heads again.
    """

    view: Attention
    mask: Mask
    end: fx.Node
    windows: int = 1

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of the scores: [..., heads, queries, keys]."""
        q, k = self.view.q.shape, self.view.k.shape
        assert q is not None and k is not None, "planned() has looked at them"
        return (*q[:-1], k[-2])

    def folds(self, part: Part) -> bool:
        """Whether a part is [batch * heads, ...], where the scores are [batch, heads, ...]."""
        shape = part.shape or ()
        folded = part.frame is not None and len(part.frame) == 3 and len(self.shape) == 4
        return folded and len(shape) == 3 and not is_one(shape[0])

    def windowed(self, value: torch.Tensor) -> torch.Tensor:
        """A constant of the mask, for scores [batch, windows * heads, queries, keys]."""
        if self.windows == 1:
            return value
        heads, *lengths = self.shape[-3:]
        wide = value.reshape([1] * (5 - value.dim()) + list(value.shape))
        return wide.expand(1, self.windows, heads, *lengths).reshape(1, self.windows * heads, *lengths)


def planned(graph: Graph, view: Attention, bands: bool = False) -> Plan | Refusal:
    """How an attention is fused, whatever runs it, or why it cannot be; `bands` as in `mask_of`."""
    scale = view.factor
    if scale is None or any(tensor_value(operand.node) is None for operand in (view.q, view.k, view.v)):
        return Refusal("the type of its query is unknown")
    dtypes = [dtype_of(operand) for operand in (view.q, view.k, view.v)]
    if len(set(dtypes)) != 1:
        return Refusal("its query, key and value are {}, {} and {}", *(str(x).removeprefix("torch.") for x in dtypes))
    refused = _shapes(view)
    if refused is not None:
        return refused
    lifted = _lifted(graph, view)
    if isinstance(lifted, Refusal):
        return lifted
    view, end, windows = lifted
    mask = mask_of(graph, view, bands)
    if isinstance(mask, Refusal):
        return mask
    return Plan(view, mask, end, windows)


def dtype_of(operand: Operand) -> torch.dtype:
    """The element type of an operand whose type is known."""
    value = tensor_value(operand.node)
    assert value is not None, "planned() has looked at it"
    return value.dtype


def _shapes(view: Attention) -> Refusal | None:
    """Why the operands do not fit each other."""
    q, k, v = (operand.shape for operand in (view.q, view.k, view.v))
    if q is None or k is None or v is None or not len(q) == len(k) == len(v) or len(q) < 3:
        return Refusal("its operands are not of the form [batch, heads, length, width]")
    if not same_sizes(k[:-1], v[:-1]):
        return Refusal("its keys {} and values {} differ in batch, heads or length", shown(k), shown(v))
    if view.heads is None and str(q[-1]) != str(k[-1]):
        return Refusal("its queries {} and keys {} differ in width", shown(q), shown(k))
    lead = [str(size) for size in q[:-2]]
    if view.groups > 1 and view.heads is None:
        if not isinstance(q[-3], int) or not isinstance(k[-3], int) or q[-3] != k[-3] * view.groups:
            return Refusal("{} heads of q cannot share {} of k and v evenly", q[-3], k[-3])
        lead[-1] = str(k[-3])
    if lead != [str(size) for size in k[:-2]]:
        return Refusal("its operands differ in batch or heads: {}, {}, {}", shown(q), shown(k), shown(v))
    return None


# ---- heads that are folded into the batch


def _lifted(graph: Graph, view: Attention) -> tuple[Attention, fx.Node, int] | Refusal:
    """(the view with an axis for the heads, what gets the result, windows)."""
    q = view.q.shape or ()
    if len(q) == 3 and view.heads is None:
        unfolded = _unfolded(graph, view)
        if unfolded is not None and all(_is_known(term, q, unfolded[0]) for term in view.terms):
            return *unfolded, 1
    if len(q) == 5 and view.groups > 1:
        merged = _unfolded(graph, view)
        if merged is not None and not view.terms:
            return *merged, 1
    frame = (*q[:-1], (view.k.shape or (None, None))[-2])
    for term in view.terms:
        if term.frame is None or same_sizes(term.frame, frame) or view.kind != "spelled-out":
            continue
        windows = _windows(graph, view, term, frame)
        if windows is None:
            shapes = shown(term.frame), shown(frame)
            return Refusal("its mask {} meets scores {}, which are {} in the product", label(term.node), *shapes)
        return view, view.node, windows
    return view, view.node, 1


def _unfolded(graph: Graph, view: Attention) -> tuple[Attention, fx.Node] | None:
    """The view before batch and heads were made one axis, or heads two; its result is reshaped back."""
    before = _before_fold if len(view.q.shape or ()) == 3 else _before_split
    operands = [before(graph, operand) for operand in (view.q, view.k, view.v)]
    users = [user for user in view.node.users if not reads_shape(user)]
    if any(operand is None for operand in operands) or len(users) != 1 or view.result_perm is not None:
        return None
    q, k, v = (operand for operand in operands if operand is not None)
    made = (*(q.shape or ())[:-1], (v.shape or (None,))[-1])
    if read(graph, users[0], "reshape") is None or not same_sizes(shape_of(users[0]), made):
        return None
    sizes: list[tuple[Any, ...]] = [operand.shape or () for operand in (q, k, v)]
    if not (same_sizes(sizes[0][:1], sizes[1][:1]) and same_sizes(sizes[1][:3], sizes[2][:3])):
        return None
    shared = sizes[1][1]
    if not isinstance(shared, int) or sizes[0][1] != shared * view.groups:
        return None
    return replace(view, q=q, k=k, v=v), users[0]


def _is_known(term: Term, folded: tuple[Any, ...], view: Attention) -> bool:
    """Whether a term meets scores [batch, heads, ...] or [batch * heads, ...]."""
    frame, q = term.frame or (), view.q.shape or ()
    return same_sizes(frame[:-1], folded[:-1]) or same_sizes(frame[:-1], q[:-1])


def _before_fold(graph: Graph, operand: Operand) -> Operand | None:
    """[batch, heads, ...] when the operand is [batch * heads, ...] of it."""
    folded = read(graph, operand.node, "reshape")
    if folded is None or operand.replay or operand.perm not in (None, (0, 1, 2), (0, 2, 1)):
        return None
    before, after = shape_of(folded[0]), shape_of(operand.node)
    if before is None or after is None or len(before) != 4 or not same_sizes(before[2:], after[1:]):
        return None
    perm = None if operand.perm is None else (0, 1, *(axis + 1 for axis in operand.perm[1:]))
    return untransposed(graph, Operand(folded[0], None if perm == (0, 1, 2, 3) else perm))


def _before_split(graph: Graph, operand: Operand) -> Operand | None:
    """[batch, heads, ...] when the operand is [batch, groups, heads of a group, ...] of it."""
    shaped = read(graph, operand.node, "reshape") or read(graph, operand.node, "unsqueeze")
    if shaped is None or operand.replay or operand.perm not in (None, (0, 1, 2, 3, 4), (0, 1, 2, 4, 3)):
        return None
    before, after = shape_of(shaped[0]), shape_of(operand.node)
    if before is None or after is None or len(before) != 4 or not same_sizes(before[2:], after[3:]):
        return None
    if not same_sizes(before[:1], after[:1]):
        return None
    perm = None if operand.perm is None else (0, 1, *(axis - 1 for axis in operand.perm[3:]))
    return untransposed(graph, Operand(shaped[0], None if perm == (0, 1, 2, 3) else perm))


def _windows(graph: Graph, view: Attention, term: Term, frame: tuple[Any, ...]) -> int | None:
    """The windows of scores [batch * windows, heads, ...] that meet constants as [batch, windows, heads, ...]."""
    met = term.frame
    if met is None or len(met) != 5 or len(frame) != 4 or not same_sizes(met[2:], frame[1:]):
        return None
    fixed = [*met[1:], *frame[1:]]
    constants = all(graph.constant(each.node) is not None for each in view.terms)
    return met[1] if constants and view.groups == 1 and all(isinstance(size, int) for size in fixed) else None


# ---- making operands


def materialised(b: Builder, operand: Operand) -> fx.Node:
    """The operand's value, from a transpose that is there where one is."""
    node = operand.node
    for moved in operand.replay:
        target: Any = moved.target
        node = b.call(target, node, *moved.args[1:], **moved.kwargs)
    if operand.perm is None:
        return node
    for user in node.users:
        turn = read(b.graph, user, "transpose")
        if turn is not None and tuple(turn[1]) == operand.perm and user < b.before:
            return user
    return b.transpose(node, operand.perm)


def is_flat(graph: Graph, operand: Operand) -> fx.Node | None:
    """x [batch, length, heads * width] when the operand is transpose(reshape(x, [batch, length, heads, width]))."""
    if operand.perm != HEADS_FIRST:
        return None
    if operand.replay:
        source: Any = operand.node
        node = operand.replay[-1]
        if len(operand.replay) != 1 or read(graph, node, "reshape") is None:
            return None
    else:
        node = operand.node
        split = read(graph, node, "reshape")
        source = None if split is None else split[0]
    inner, outer = shape_of(source), shape_of(node)
    if inner is None or outer is None or len(inner) != 3 or len(outer) != 4 or not same_sizes(inner[:2], outer[:2]):
        return None
    whole = all(isinstance(size, int) for size in (inner[2], *outer[2:])) and inner[2] == outer[2] * outer[3]
    return source if whole else None
