"""Operators on shapes that give the shape, and so the value, that they got."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.ir.pattern import Builder, Match, Mismatch, OpNames, P, Refusal, Rule
from fxopt.passes.rules.checks import changed_type, is_exact_shape


class DropSameShape(Rule):
    """reshape(x, shape of x)  ->  x"""

    def pattern(self, op: OpNames, /, x: P, shape: P) -> tuple[P, ...]:
        """Reshapes and broadcasts."""
        return op.reshape(x, shape), op.expand(x, shape)

    def check(self, match: Match, /, x: fx.Node, shape: Any) -> Refusal | None:
        """The shape is known and the same."""
        if isinstance(shape, fx.Node) and not is_exact_shape(shape):
            return Mismatch("the shape {} depends on more than sizes", shape)
        changed = changed_type(match, x)
        return None if changed is None else Mismatch("{}", changed)

    def replace(self, b: Builder, /, x: fx.Node, shape: Any) -> fx.Node:
        """x"""
        return x
