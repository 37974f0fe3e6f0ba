"""An axis of size 1 inserted and removed, or removed and inserted."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.ir.pattern import Builder, Match, Mismatch, OpNames, P, Refusal, Rule
from fxopt.passes.rules.checks import changed_type


class DropSqueezePair(Rule):
    """squeeze(unsqueeze(x, axes), axes)  ->  x"""

    shares_inner = True

    def pattern(self, op: OpNames, /, x: P, first: P, second: P) -> tuple[P, ...]:
        """Both orders."""
        return op.squeeze(op.unsqueeze(x, first), second), op.unsqueeze(op.squeeze(x, first), second)

    def check(self, match: Match, /, x: fx.Node, first: Any, second: Any) -> Refusal | None:
        """The same axes, and the shape of before."""
        if not isinstance(first, tuple) or not isinstance(second, tuple) or sorted(first) != sorted(second):
            return Mismatch("the axes are {} and {}", first, second)
        return changed_type(match, x)

    def replace(self, b: Builder, /, x: fx.Node, first: Any, second: Any) -> fx.Node:
        """x"""
        return x
