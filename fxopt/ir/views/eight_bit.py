"""Which 8-bit levels a value lies on, and what passes them on: what quantising passes and forms agree about."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.ops.concat_a8 import concat_a8
from fxopt.ir.ops.conv_w8a8 import conv_w8a8
from fxopt.ir.ops.elementwise_a8 import add_a8, mul_a8
from fxopt.ir.ops.linear_w8a8 import linear_w8a8
from fxopt.ir.ops.pool_a8 import average_pool_a8, global_average_pool_a8
from fxopt.ir.views.common import argument, aten, is_aten, is_onnx, only_user, scalar_constant

Levels = tuple[float, int]  # scale and zero point: scale * (0 - zero ... 255 - zero)

_PASS_ON = ("MaxPool", "Reshape", "Transpose", "Slice", "Gather", "Flatten", "Squeeze", "Unsqueeze", "Identity")
# The position of the scale of each operand, and of the result; the zero point follows the scale.
_TAKEN: dict[object, tuple[int, ...]] = {
    conv_w8a8.target: (4,),
    linear_w8a8.target: (4,),
    add_a8.target: (2, 4),
    mul_a8.target: (2, 4),
    global_average_pool_a8.target: (2,),
    average_pool_a8.target: (5,),
}
_GIVEN: dict[object, int] = {
    conv_w8a8.target: 6,
    add_a8.target: 6,
    mul_a8.target: 6,
    concat_a8.target: 4,
    global_average_pool_a8.target: 4,
    average_pool_a8.target: 7,
}


def passes_levels_on(node: object) -> bool:
    """True for an operator whose result holds elements of its first operand only."""
    return is_onnx(node, *_PASS_ON)


def source(node: fx.Node) -> fx.Node:
    """The value whose elements `node` holds: its producer behind operators that only move or select."""
    while passes_levels_on(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def takers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(operator, operand) for everything that computes with the value, behind operators that only move or select."""
    for user in node.users:
        if passes_levels_on(user) and user.args[0] is node:
            yield from takers(user)
        else:
            yield user, node


def given(node: fx.Node) -> Levels | None:
    """The levels that an 8-bit operator gives its result; None for other operators."""
    place = _GIVEN.get(node.target)
    return None if place is None else _levels(node, place)


def taken(user: fx.Node, value: fx.Node) -> Levels | None:
    """The levels to which an 8-bit operator rounds its operand `value`; None for other operators."""
    if user.target is concat_a8.target:
        operands, scales, zeros = user.args[:3]
        index = list(operands).index(value)  # type: ignore[arg-type]
        return float(scales[index]), int(zeros[index])  # type: ignore[index,arg-type]
    for index, place in enumerate(_TAKEN.get(user.target, ())):
        if user.args[index] is value:
            return _levels(user, place)
    return None


def levels(node: fx.Node) -> Levels | None:
    """The levels on which a value lies: those that it was given, else those to which one of its takers rounds it."""
    origin = source(node)
    found = given(origin)
    return found if found is not None else wanted(origin)


def wanted(node: fx.Node) -> Levels | None:
    """The levels to which a taker rounds the value; None when no 8-bit operator takes it."""
    for user, value in takers(node):
        found = taken(user, value)
        if found is not None:
            return found
    return None


def saturated(graph: Graph, node: fx.Node) -> fx.Node:
    """The ReLU or clip to 0 ... c behind a value, if nothing else uses it; else `node`.

    On levels that start at 0 and end at the largest value behind it, saturation computes it.
    """
    user = only_user(node)
    if user is None:
        return node
    if is_onnx(user, "Relu") or is_aten(user, aten.relu.default):
        return user
    if is_onnx(user, "Clip") or is_aten(user, aten.clamp.default, aten.hardtanh.default):
        low = scalar_constant(graph, argument(user, 1, "min"))
        top = argument(user, 2, "max")
        high = math.inf if top is None else scalar_constant(graph, top)
        if user.args[0] is node and low == 0.0 and high is not None and high > 0.0:
            return user
    return node


def _levels(node: fx.Node, place: int) -> Levels:
    scale, zero = node.args[place : place + 2]
    assert isinstance(scale, float) and isinstance(zero, int)
    return scale, zero
