"""A slice that takes everything."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.ir.graph import DynamicSize
from fxopt.ir.pattern import Builder, Match, Mismatch, OpNames, P, Refusal, Rule
from fxopt.passes.rules.checks import changed_type, is_exact_shape

_NO_END = 2**31 - 1  # exporters write this or more for "to the end"


class DropFullSlice(Rule):
    """x[:]  ->  x"""

    def pattern(self, op: OpNames, /, x: P, starts: P, ends: P, axes: P, steps: P) -> P:
        """A slice."""
        return op.slice(x, starts, ends, axes, steps)

    def check(self, match: Match, /, x: fx.Node, starts: Any, ends: Any, axes: Any, steps: Any) -> Refusal | None:
        """The shape stays, and steps go forward: then every element is taken, in order."""
        if not isinstance(steps, tuple) or any(not isinstance(step, int) or step < 1 for step in steps):
            return Mismatch("the steps are {}", steps)
        if match.graph.origin == "onnx" and not _takes_all(match.shape(x), starts, ends, axes, steps):
            return Mismatch("the bounds {} to {} are not those of every size", starts, ends)
        changed = changed_type(match, x)
        return None if changed is None else Mismatch("{}", changed)

    def replace(self, b: Builder, /, x: fx.Node, starts: Any, ends: Any, axes: Any, steps: Any) -> fx.Node:
        """x"""
        return x


def _takes_all(shape: Any, starts: Any, ends: Any, axes: Any, steps: Any) -> bool:
    """Whether a dynamic axis is taken whatever its size: shapes are known at two sizes only."""
    if shape is None or not isinstance(starts, tuple) or not isinstance(axes, tuple):
        return False
    if isinstance(ends, fx.Node):
        return is_exact_shape(ends) and set(starts) <= {0} and set(steps) <= {1}
    if not len(starts) == len(ends) == len(axes) == len(steps):
        return False
    return all(
        not isinstance(shape[axis], DynamicSize) or (start == 0 and step == 1 and end >= _NO_END)
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    )
