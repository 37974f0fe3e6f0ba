"""A slice that takes everything."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.ir.pattern import Builder, Match, Mismatch, OpNames, P, Refusal, Rule
from fxopt.passes.rules.checks import changed_type, is_exact_shape


class DropFullSlice(Rule):
    """x[:]  ->  x"""

    def pattern(self, op: OpNames, /, x: P, starts: P, ends: P, axes: P, steps: P) -> P:
        """A slice."""
        return op.slice(x, starts, ends, axes, steps)

    def check(self, match: Match, /, x: fx.Node, starts: Any, ends: Any, axes: Any, steps: Any) -> Refusal | None:
        """The shape stays, and steps go forward: then every element is taken, in order."""
        if not isinstance(steps, tuple) or any(not isinstance(step, int) or step < 1 for step in steps):
            return Mismatch("the steps are {}", steps)
        if any(isinstance(each, fx.Node) and not is_exact_shape(each) for each in (starts, ends, axes)):
            return Mismatch("the bounds depend on more than sizes")
        changed = changed_type(match, x)
        return None if changed is None else Mismatch("{}", changed)

    def replace(self, b: Builder, /, x: fx.Node, starts: Any, ends: Any, axes: Any, steps: Any) -> fx.Node:
        """x"""
        return x
