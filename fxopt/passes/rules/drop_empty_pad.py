"""A pad by nothing."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.ir.pattern import Builder, Match, Mismatch, OpNames, P, Refusal, Rule


class DropEmptyPad(Rule):
    """pad(x, (0, 0, ...))  ->  x"""

    def pattern(self, op: OpNames, /, x: P, pads: P) -> P:
        """A pad."""
        return op.pad(x, pads)

    def check(self, match: Match, /, x: fx.Node, pads: Any) -> Refusal | None:
        """Every number is 0."""
        empty = isinstance(pads, tuple) and all(isinstance(pad, int) and pad == 0 for pad in pads)
        return None if empty else Mismatch("the pads are {}", pads)

    def replace(self, b: Builder, /, x: fx.Node, pads: Any) -> fx.Node:
        """x"""
        return x
