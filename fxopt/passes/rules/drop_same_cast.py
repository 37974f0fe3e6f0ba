"""A cast to the element type that the value has already."""

from __future__ import annotations

import torch
from torch import fx

from fxopt.ir.pattern import Builder, Match, Mismatch, OpNames, P, Refusal, Rule


class DropSameCast(Rule):
    """cast(x, dtype)  ->  x"""

    def pattern(self, op: OpNames, /, x: P, dtype: P) -> P:
        """A cast."""
        return op.cast(x, dtype)

    def check(self, match: Match, /, x: fx.Node, dtype: torch.dtype) -> Refusal | None:
        """x has the type already."""
        given = match.dtype(x)
        if given is None:
            return Mismatch("the element type of {} is unknown", x)
        return None if given == dtype else Mismatch("{} is cast from {} to {}", x, given, dtype)

    def replace(self, b: Builder, /, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """x"""
        return x
