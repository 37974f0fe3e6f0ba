"""Copies, concatenations of one value, dropout at inference."""

from __future__ import annotations

from torch import fx

from fxopt.ir.pattern import Builder, OpNames, P, Rule


class DropIdentity(Rule):
    """identity(x)  ->  x"""

    def pattern(self, op: OpNames, /, x: P) -> P:
        """Whatever gives its input unchanged."""
        return op.identity(x)

    def replace(self, b: Builder, /, x: fx.Node) -> fx.Node:
        """x"""
        return x
