"""Conditions on sizes: comparisons that only steer If and Loop are computed at run time, never guarded on.

A comparison of symbolic sizes in the host lane makes torch assume its outcome, for all sizes. What the symbols do not
decide becomes a comparison of tensors, and the If a `torch.cond`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fxopt.ir.onnx.lane import has_symbol, to_tensor
from fxopt.ir.onnx.op import OnnxOp

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Equal": operator.eq,
}
_PASSING = frozenset({"Not", "And", "Or", "Xor", "Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity", "ReduceMin"})
_STEERED = {"If": (0,), "Loop": (1,)}  # the positions of conditions


def undecided(node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments as tensors when the node compares sizes, steers control flow only, and symbols do not decide it."""
    op_type = node.target.op_type if isinstance(node.target, OnnxOp) else ""
    if op_type not in _COMPARISONS or not any(isinstance(arg, np.ndarray) and has_symbol(arg) for arg in args):
        return None
    if not all(isinstance(arg, np.ndarray) for arg in args) or not _steers(node):
        return None
    left, right = np.broadcast_arrays(*args)
    compare = _COMPARISONS[op_type]
    outcomes = (compare(a, b) for a, b in zip(left.reshape(-1), right.reshape(-1), strict=True))
    if all(_known(outcome) for outcome in outcomes):
        return None
    return tuple(map(to_tensor, args))


def _known(outcome: Any) -> bool:
    if isinstance(outcome, (bool, np.bool_)):
        return True
    return statically_known_true(outcome) or statically_known_true(outcome.__sym_not__())


def _steers(node: fx.Node) -> bool:
    """Whether every use of the value is, in the end, a condition."""
    for user in node.users:
        op_type = getattr(user.target, "op_type", "")
        if op_type in _STEERED:
            positions = [index for index, arg in enumerate(user.args) if arg is node]
            captured: list[fx.Node] = []
            fx.map_arg(user.kwargs, captured.append)
            if not positions or node in captured or not set(positions) <= set(_STEERED[op_type]):
                return False
        elif op_type not in _PASSING or not _steers(user):
            return False
    return bool(node.users)
