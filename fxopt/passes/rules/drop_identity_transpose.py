"""A transpose that leaves every axis where it is."""

from __future__ import annotations

from torch import fx

from fxopt.ir.pattern import Builder, Match, Mismatch, OpNames, P, Refusal, Rule


class DropIdentityTranspose(Rule):
    """transpose(x, (0, 1, ...))  ->  x"""

    def pattern(self, op: OpNames, /, x: P, perm: P) -> P:
        """A transpose."""
        return op.transpose(x, perm)

    def check(self, match: Match, /, x: fx.Node, perm: tuple[int, ...]) -> Refusal | None:
        """Nothing moves."""
        shape = match.shape(x)
        stays = perm == tuple(range(len(perm))) and (shape is None or len(shape) == len(perm))
        return None if stays else Mismatch("the axes are put in the order {}", perm)

    def replace(self, b: Builder, /, x: fx.Node, perm: tuple[int, ...]) -> fx.Node:
        """x"""
        return x
