"""A pad by nothing."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.ir.pattern import Builder, Match, Mismatch, OpNames, P, Refusal, Rule
from fxopt.passes.rules.checks import changed_type


class DropEmptyPad(Rule):
    """pad(x, (0, 0, ...))  ->  x"""

    def pattern(self, op: OpNames, /, x: P, pads: P) -> P:
        """A pad."""
        return op.pad(x, pads)

    def check(self, match: Match, /, x: fx.Node, pads: Any) -> Refusal | None:
        """Every number is 0, and the shape stays."""
        empty = isinstance(pads, tuple) and all(isinstance(pad, int) and pad == 0 for pad in pads)
        if not empty:
            return Mismatch("the pads are {}", pads)
        changed = changed_type(match, x)
        return None if changed is None else Mismatch("{}", changed)

    def replace(self, b: Builder, /, x: fx.Node, pads: Any) -> fx.Node:
        """x"""
        return x
