"""What follows a linear and fits into its kernel: an activation, and one operand that is added or multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import tensor_value

_ATEN = torch.ops.aten
_PLAIN: dict[Any, str] = {_ATEN.relu.default: "relu", _ATEN.silu.default: "silu"}
_COMBINES: dict[Any, str] = {_ATEN.add.Tensor: "add", _ATEN.mul.Tensor: "mul"}


@dataclass(frozen=True)
class Following:
    """`last` is the node whose value the kernel gives; `other` the second operand."""

    last: fx.Node
    activation: str = ""
    combine: str = ""
    other: fx.Node | None = None


def following(node: fx.Node) -> Following:
    """What the kernel of a linear takes over."""
    last, activation = node, ""
    user = _only_user(node)
    if user is not None and _activation(user):
        last, activation = user, _activation(user)
        user = _only_user(user)
    if user is None or user.target not in _COMBINES or user.kwargs:
        return Following(last, activation)
    first, second = user.args[:2]
    other = second if first is last else first
    if not isinstance(other, fx.Node) or other is last or not _alike(other, last) or not _alike(user, last):
        return Following(last, activation)
    return Following(user, activation, _COMBINES[user.target], other)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: fx.Node) -> str:
    if node.target in _PLAIN:
        return _PLAIN[node.target]
    if node.target is _ATEN.gelu.default:
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return "gelu_tanh" if approximate == "tanh" else "gelu"
    return ""


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Tensors of one type and shape, also at other sizes of dynamic dimensions."""
    for key in ("val", "probe"):
        first, second = a.meta.get(key, a.meta.get("val")), b.meta.get(key, b.meta.get("val"))
        if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
            return False
        if first.dtype != second.dtype or tuple(first.shape) != tuple(second.shape):
            return False
    return tensor_value(a) is not None
