"""Computed boolean masks: comparisons of positions, triangles, blocks and padding, joined by "and"."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.neutral import read
from fxopt.ir.views.attention.indices import Affine, affine
from fxopt.ir.views.attention.numbers import is_one, number, same_sizes, sizes
from fxopt.ir.views.attention.seen import Seen
from fxopt.ir.views.common import argument, aten, is_aten, is_onnx, scalar_constant

_DEEPEST = 24
_AND = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_OR = (aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default)
_NOT = (aten.bitwise_not.default, aten.logical_not.default)
_CASTS = (aten._to_copy.default, aten.to.dtype)
_COMPARED = {  # x OP y as (sign of y - x, what is added): y - x + added >= 0
    "LessOrEqual": (1, 0), "Less": (1, -1), "GreaterOrEqual": (-1, 0), "Greater": (-1, -1),
    aten.le.Tensor: (1, 0), aten.lt.Tensor: (1, -1), aten.ge.Tensor: (-1, 0), aten.gt.Tensor: (-1, -1),
    aten.le.Scalar: (1, 0), aten.lt.Scalar: (1, -1), aten.ge.Scalar: (-1, 0), aten.gt.Scalar: (-1, -1),
}  # fmt: skip
_EQUAL = (aten.eq.Tensor, aten.eq.Scalar)
_UNEQUAL = (aten.ne.Tensor, aten.ne.Scalar)


def condition(graph: Graph, node: object, keeps: bool = True, depth: int = _DEEPEST) -> Seen:
    """Which keys are seen where the node is true (`keeps`), or where it is false."""
    everything = number(graph, node)
    if everything is not None:
        return Seen() if (everything != 0) == keeps else Seen(is_general=True)
    if not isinstance(node, fx.Node) or not depth:
        return Seen(is_general=True)
    constant = graph.constant(node)
    if constant is not None:
        return _constant(constant, keeps)
    found = _joined(graph, node, keeps, depth) or _compared(graph, node, keeps) or _below(graph, node, keeps, depth)
    if found is None or found.is_general:
        return _by_shape(node) if found is None or _by_shape(node).is_padding else found
    return found


def _by_shape(node: fx.Node) -> Seen:
    """Something unknown: padding where it does not differ along the queries and the heads."""
    shape = sizes(node)
    if shape is None or not shape:
        return Seen(is_general=True)
    middle = shape[-3:-1] if len(shape) > 2 else shape[-2:-1]
    return Seen(is_padding=True) if all(map(is_one, middle)) else Seen(is_general=True)


def _constant(value: torch.Tensor, keeps: bool) -> Seen:
    from fxopt.ir.views.attention.masks import pattern_of

    return pattern_of((value != 0) == keeps)


def _joined(graph: Graph, node: fx.Node, keeps: bool, depth: int) -> Seen | None:
    """and, or and not, by De Morgan."""
    if is_onnx(node, "Not") or is_aten(node, *_NOT):
        return condition(graph, node.args[0], not keeps, depth - 1)
    both = is_onnx(node, "And") or is_aten(node, *_AND)
    either = is_onnx(node, "Or") or is_aten(node, *_OR)
    if both == keeps and (both or either):
        first, second = (condition(graph, operand, keeps, depth - 1) for operand in node.args[:2])
        return first.both(second)
    return None


def _compared(graph: Graph, node: fx.Node, keeps: bool) -> Seen | None:
    key: Any = getattr(node.target, "op_type", node.target)
    if key in _COMPARED and len(node.args) == 2:
        sign, added = _COMPARED[key]
        band = _absolute(graph, node, sign, added, keeps)
        if band is not None:
            return band
        first, second = (affine(graph, operand) for operand in node.args)
        if first is None or second is None:
            return None
        difference = (second.plus(first, -1) if sign > 0 else first.plus(second, -1)).plus(Affine(0, 0, added))
        return _half(difference if keeps else Affine(0, 0, -1).plus(difference, -1))
    equal, unequal = is_onnx(node, "Equal") or is_aten(node, *_EQUAL), is_aten(node, *_UNEQUAL)
    if (equal and keeps) or (unequal and not keeps):
        return _same_block(graph, *node.args[:2])
    return None


def _half(form: Affine) -> Seen:
    """Where queries * i + keys * j + offset >= 0."""
    shape = (form.queries, form.keys)
    if shape == (1, -1) and form.offset >= 0:
        return Seen(right=form.offset)
    if shape == (-1, 1) and form.offset >= 0:
        return Seen(left=form.offset)
    if form.queries >= 0 and form.keys >= 0 and form.offset >= 0:
        return Seen()  # positions count from 0
    return Seen(is_general=True)


def _absolute(graph: Graph, node: fx.Node, sign: int, added: int, keeps: bool) -> Seen | None:
    """|i - j| <= width"""
    distance, width = node.args if sign > 0 else node.args[::-1]
    inner = read(graph, distance, "abs")
    bound = scalar_constant(graph, width)
    form = None if inner is None else affine(graph, inner[0])
    if form is None or bound is None or not keeps or sorted((form.queries, form.keys)) != [-1, 1] or form.offset:
        return None
    reach = int(bound) + added
    return Seen(reach, reach) if reach >= 0 else Seen(is_general=True)


def _same_block(graph: Graph, first: Any, second: Any) -> Seen | None:
    """block(i) == block(j): one value, along the queries in one operand and along the keys in the other."""
    shapes = [sizes(operand) for operand in (first, second)]
    if any(shape is None or len(shape) < 2 for shape in shapes):
        return None
    ends = [tuple(map(is_one, (shape or ())[-2:])) for shape in shapes]
    if sorted(ends) != [(False, True), (True, False)] or _source(graph, first) is not _source(graph, second):
        return None
    return Seen(blocks=())


def _source(graph: Graph, node: Any) -> Any:
    """What is only shaped, expanded or cast."""
    names = ("unsqueeze", "reshape", "expand", "cast", "identity")
    while isinstance(node, fx.Node):
        found = next(filter(None, (read(graph, node, name) for name in names)), None)
        if found is None:
            return node
        node = found[0]
    return node


def triangle_of(graph: Graph, node: fx.Node) -> tuple[Any, int, bool] | None:
    """(x, diagonal, whether it is the upper one) when the node is a triangle of x, zeros elsewhere."""
    if is_onnx(node, "Trilu"):
        diagonal = 0.0 if len(node.args) < 2 or node.args[1] is None else number(graph, node.args[1])
        return None if diagonal is None else (argument(node, 0, "x"), int(diagonal), bool(node.kwargs.get("upper", 1)))
    if is_aten(node, aten.triu.default, aten.tril.default):
        diagonal = number(graph, argument(node, 1, "diagonal", 0))
        return None if diagonal is None else (node.args[0], int(diagonal), node.target is aten.triu.default)
    return None


def _below(graph: Graph, node: fx.Node, keeps: bool, depth: int) -> Seen | None:
    """Below casts, copies, axes that are put in front, expansions, prefixes of a constant, and triangles of ones."""
    for name in ("identity", "expand"):
        found = read(graph, node, name)
        if found is not None:
            return condition(graph, found[0], keeps, depth - 1)
    cast: Any = read(graph, node, "cast") or (node.args if is_aten(node, *_CASTS) else None)
    if cast is not None:
        return condition(graph, cast[0], keeps, depth - 1)
    for name in ("unsqueeze", "reshape", "squeeze"):
        found = read(graph, node, name)
        if found is not None and _keeps_ends(found[0], node):
            return condition(graph, found[0], keeps, depth - 1)
    half = triangle_of(graph, node)
    if half is not None and number(graph, half[0]) not in (None, 0.0):
        _, diagonal, upper = half
        form = Affine(-1, 1, -diagonal) if upper else Affine(1, -1, diagonal)
        return _half(form if keeps else Affine(0, 0, -1).plus(form, -1))
    nonzero = is_onnx(node, "Equal") or is_aten(node, *_EQUAL, *_UNEQUAL)
    if nonzero and number(graph, node.args[1]) == 0 and not is_aten(node, *_UNEQUAL):
        return condition(graph, node.args[0], not keeps, depth - 1)
    if nonzero and number(graph, node.args[1]) == 0:
        return condition(graph, node.args[0], keeps, depth - 1)
    return _prefix(graph, node, keeps, depth)


def _keeps_ends(x: Any, node: fx.Node) -> bool:
    """Whether the last two axes stay, and only axes of size 1 come or go before them."""
    before, after = sizes(x), sizes(node)
    if before is None or after is None or min(len(before), len(after)) < 2:
        return False
    fronts = [[str(size) for size in shape[:-2] if not is_one(size)] for shape in (before, after)]
    return same_sizes(before[-2:], after[-2:]) and fronts[0] == fronts[1]


def _prefix(graph: Graph, node: fx.Node, keeps: bool, depth: int) -> Seen | None:
    """Slices that begin at the front, down to a constant or a triangle: windows stay what they are."""
    cut: Any = read(graph, node, "slice")
    if cut is None or not isinstance(cut[1], tuple) or any(cut[1]) or cut[4] != (1,) * len(cut[1]):
        return None
    found = condition(graph, cut[0], keeps, depth - 1)
    return found if found.is_window or found.is_padding else Seen(is_general=True)
