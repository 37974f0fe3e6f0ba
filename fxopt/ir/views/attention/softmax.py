"""Softmaxes in their spellings, and the way from one up to the product with the values."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph, has_effect, label, shape_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.views.attention.numbers import same_sizes
from fxopt.ir.views.attention.products import Product, flipped, product, swapped
from fxopt.ir.views.common import argument, aten, is_aten, is_onnx, reads_shape, scalar_constant

_CASTS = (aten._to_copy.default, aten.to.dtype, aten.type_as.default, aten.to.other)


@dataclass(frozen=True)
class Softmax:
    """Probabilities `node` of `scores` along `axis`; `inner` are the nodes between them."""

    node: fx.Node
    scores: fx.Node
    axis: int
    empty_rows_are_zero: bool = False
    inner: tuple[fx.Node, ...] = ()


@dataclass
class Above:
    """What lies between the probabilities and the product with the values."""

    product: Product | None = None
    inner: list[fx.Node] = field(default_factory=list)
    empty_rows_are_zero: bool = False
    drops_sink: bool = False


def called(node: fx.Node) -> str:
    """A node by name and operator, for reasons."""
    kind = getattr(node.target, "op_type", None) or str(node.target).removeprefix("aten.")
    return label(node) if node.op != "call_function" else f"{label(node)} ({kind})"


def is_last(axis: int, x: object) -> bool:
    """Whether an axis is the last one of x."""
    rank = len(shape_of(x) or ())
    return axis == -1 or (rank > 0 and axis == rank - 1)


def softmax(graph: Graph, node: fx.Node) -> Softmax | None:
    """The softmax whose probabilities the node is; None when it is something else."""
    plain: Any = read(graph, node, "softmax")
    if is_aten(node, aten.softmax.int):
        plain = node.args[:2]  # with an element type for the result, too
    if plain is not None:
        return Softmax(node, plain[0], plain[1])
    if is_aten(node, aten._safe_softmax.default):
        return Softmax(node, node.args[0], node.args[1], True)  # type: ignore[arg-type]
    return _quotient(graph, node)


def _quotient(graph: Graph, node: fx.Node) -> Softmax | None:
    """e / sum(e) with e = exp(x): the maximum that is subtracted from x is seen below."""
    ratio = read(graph, node, "div")
    total = None if ratio is None else read(graph, ratio[1], "sum")
    if ratio is None or total is None or total[0] is not ratio[0] or not total[2] or not isinstance(total[1], tuple):
        return None
    power = read(graph, ratio[0], "exp")
    if power is None or len(total[1]) != 1 or not isinstance(power[0], fx.Node):
        return None
    return Softmax(node, power[0], total[1][0], inner=(ratio[0], ratio[1]))


def without_maximum(graph: Graph, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """(x, nodes between) when the node is x - max(x) along the last axis, which a softmax does not see."""
    difference = read(graph, node, "sub")
    if difference is None or not all(isinstance(operand, fx.Node) for operand in difference):
        return None
    x, highest = difference
    extremum = read(graph, highest, "amax")
    if extremum is not None and extremum[0] is x and extremum[2] and len(extremum[1]) == 1:
        return (x, (highest,)) if is_last(extremum[1][0], x) else None
    source = highest.args[0] if highest.target is operator.getitem and highest.args[1] == 0 else None
    if is_aten(source, aten.max.dim) and source.args[0] is x and argument(source, 2, "keepdim", False):
        return (x, (highest, source)) if is_last(source.args[1], x) else None  # type: ignore[arg-type, return-value]
    return None


def cast_below(graph: Graph, node: fx.Node) -> fx.Node | None:
    """What the node converts to another floating-point type, or gives as it is."""
    for name in ("cast", "identity"):
        found = read(graph, node, name)
        if found is not None and isinstance(found[0], fx.Node):
            return _floating(found[0], node)
    if is_aten(node, *_CASTS) and isinstance(node.args[0], fx.Node):
        return _floating(node.args[0], node)
    return _floating(node.args[0], node) if is_onnx(node, "CastLike") else None  # type: ignore[arg-type]


def _floating(x: fx.Node, node: fx.Node) -> fx.Node | None:
    """x, unless one of the two is known to hold other than floating-point numbers."""
    for value in (x.meta.get("val"), node.meta.get("val")):
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            return None
    return x


def keeps_rows(node: fx.Node, x: fx.Node) -> bool:
    """Whether a reshape of x leaves the last two axes as they are."""
    before, after = shape_of(x), shape_of(node)
    if before is None or after is None or min(len(before), len(after)) < 2:
        return False
    return same_sizes(before[-2:], after[-2:])


def above(graph: Graph, found: Softmax) -> Above | Refusal:
    """The way from the probabilities to the product with the values, or the first thing that is in it."""
    way, node = Above(empty_rows_are_zero=found.empty_rows_are_zero), found.node
    turned: tuple[int, ...] | None = None
    while True:
        users = _users(node)
        guard = _guarded(graph, node, users)
        if guard is not None:
            way.inner += [node, *(user for user in users if user is not guard)]
            way.empty_rows_are_zero, node = True, guard
            continue
        if len(users) != 1:
            return _not_alone(node, users)
        user = users[0]
        if user.op == "output":
            return Refusal("its probabilities {} are an output of the model", label(node))
        made = product(graph, user)
        if made is not None:
            way.inner.append(node)
            return _taken(graph, way, made, node, turned)
        if cast_below(graph, user) is node or _reshapes_rows(graph, user, node):
            pass
        elif turned is None and _swap(graph, user) is not None:
            turned = _swap(graph, user)
        elif _all_but_last(graph, user) and not way.drops_sink:
            way.drops_sink = True
        else:
            what = label(node), called(user)
            return Refusal("its probabilities {} are taken by {}, not by a product with values", *what)
        way.inner.append(node)
        node = user


def _reshapes_rows(graph: Graph, node: fx.Node, x: fx.Node) -> bool:
    return read(graph, node, "reshape") is not None and node.args[0] is x and keeps_rows(node, x)


def _users(node: fx.Node) -> list[fx.Node]:
    """The users that are not dead and take more than the shape."""
    return [
        user
        for user in node.users
        if not reads_shape(user) and (user.op != "call_function" or user.users or has_effect(user))
    ]


def _not_alone(node: fx.Node, users: list[fx.Node]) -> Refusal:
    if not users:
        return Refusal("nothing takes its probabilities {}", label(node))
    first, second = (user for user in users[:2])
    if "output" in (first.op, second.op):
        return Refusal("its probabilities {} are also an output of the model", label(node))
    return Refusal("its probabilities {} are taken by {} and by {}", label(node), called(first), called(second))


def _guarded(graph: Graph, node: fx.Node, users: list[fx.Node]) -> fx.Node | None:
    """where(isnan(p), 0, p), with p the node."""
    choice = next((user for user in users if read(graph, user, "where") is not None), None)
    if choice is None or len(users) != 2:
        return None
    condition, filler, value = read(graph, choice, "where") or (None, None, None)
    test = next(user for user in users if user is not choice)
    tests = is_onnx(test, "IsNaN") or is_aten(test, aten.isnan.default)
    same = tests and condition is test and value is node and scalar_constant(graph, filler) == 0
    return choice if same and len(_users(test)) == 1 else None


def _swap(graph: Graph, node: fx.Node) -> tuple[int, ...] | None:
    """The permutation of a transpose of the last two axes."""
    turn = read(graph, node, "transpose")
    perm = () if turn is None else tuple(turn[1])
    return perm if len(perm) >= 2 and perm == swapped(len(perm)) else None


def _all_but_last(graph: Graph, node: fx.Node) -> bool:
    """x[..., :-1]"""
    cut = read(graph, node, "slice")
    if cut is None or not isinstance(cut[0], fx.Node):
        return False
    x, starts, ends, axes, steps = cut
    size = (shape_of(x) or (None,))[-1]
    ends_before = isinstance(ends, tuple) and (ends == (-1,) or (isinstance(size, int) and ends == (size - 1,)))
    if not ends_before and size is not None:
        shorter = (shape_of(node) or (None,))[-1]
        ends_before = _is_one_less(shorter, size)
    one = starts == (0,) and steps == (1,) and isinstance(axes, tuple) and len(axes) == 1
    return bool(one and ends_before and is_last(axes[0], x))


def _is_one_less(shorter: Any, size: Any) -> bool:
    """Whether a size is the other minus one, at every size of the inputs."""
    if hasattr(size, "other") and hasattr(shorter, "other"):
        return bool(shorter.size == size.size - 1 and shorter.other == size.other - 1)
    return isinstance(size, torch.SymInt) and str(shorter - size) == "-1"


def _taken(graph: Graph, way: Above, made: Product, node: fx.Node, order: tuple[int, ...] | None) -> Above | Refusal:
    """The product in the form probabilities @ values; `order` is that in which it has the axes of the probabilities."""
    for candidate in (made, flipped(made)):
        if candidate is None or candidate.left.node is not node or candidate.left.perm != order:
            continue
        if candidate.added is not None or candidate.right.node is node:
            return Refusal("the product {} does more than multiply probabilities with values", called(made.node))
        if candidate.holds_matrix(graph):
            return Refusal("{} multiplies its probabilities with a constant matrix: a linear", called(made.node))
        way.product = candidate
        return way
    return Refusal("{} does not sum its probabilities {} over the keys", called(made.node), label(node))
