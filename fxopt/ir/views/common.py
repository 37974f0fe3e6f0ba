"""What the recognisers share."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import fx

from fxopt.ir.graph import Graph, has_effect, shape_of
from fxopt.ir.onnx.op import OnnxOp

aten = torch.ops.aten


def is_onnx(node: object, *op_types: str, domain: str = "") -> TypeGuard[fx.Node]:
    """True for a node of the ONNX dialect with one of these operator types."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, OnnxOp):
        return False
    return node.target.domain == domain and node.target.op_type in op_types


def is_aten(node: object, *targets: Any) -> TypeGuard[fx.Node]:
    """True for a call of one of these aten overloads."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, index: int, name: str = "", default: Any = None) -> Any:
    """An argument by position or keyword."""
    if index < len(node.args):
        return node.args[index]
    return node.kwargs.get(name, default)


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a value; None when there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def scalar_constant(graph: Graph, value: object) -> float | None:
    """A Python number, or a one-element constant, as a float."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    tensor = graph.constant(value)
    return float(tensor.reshape(()).item()) if tensor is not None and tensor.numel() == 1 else None


def reads_shape(node: fx.Node) -> bool:
    """True for an operator that takes only the shape of its operand."""
    return is_onnx(node, "Shape", "Size") or is_aten(node, aten.sym_size.int, aten.sym_numel.default)


def escapes(inner: tuple[fx.Node, ...], node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(inner node, user) where a value inside a view that ends in `node` is used outside, for more than its shape."""
    owned = {*inner, node}
    for each in inner:
        for user in each.users:
            dead = user.op == "call_function" and not user.users and not has_effect(user)
            if user not in owned and not dead and not reads_shape(user):
                return each, user
    return None


def trailing_axes(x: object, axes: object) -> int | None:
    """How many axes, when they are the last ones of `x`; axes may count from the end while the rank is unknown."""
    if not isinstance(axes, tuple) or not axes:
        return None
    shape = shape_of(x)
    rank = 0 if shape is None else len(shape)
    return len(axes) if sorted(axes) == list(range(rank - len(axes), rank)) else None
