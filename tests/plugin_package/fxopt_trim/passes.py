"""x * 1 -> x"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph, shape_of, tensor_value
from fxopt.passes.base import Context, ExactPass


@dataclass(frozen=True)
class DropNeutralMultiplications(ExactPass):
    """Remove multiplications by constants that are all one."""

    largest: int = 1_000_000  # elements of a constant that is looked at

    def run(self, graph: Graph, ctx: Context) -> int:
        """The number of multiplications removed."""
        changes = 0
        for node in list(graph.calls()):
            kept = self._kept(graph, node)
            if kept is not None:
                graph.replace(node, kept)
                changes += 1
        if changes:
            graph.prune()
        return changes

    def _kept(self, graph: Graph, node: fx.Node) -> fx.Node | None:
        """The factor that the product equals."""
        if getattr(node.target, "op_type", "") != "Mul" and node.target is not torch.ops.aten.mul.Tensor:
            return None
        first, second = node.args[:2]
        for factor, other in ((first, second), (second, first)):
            if isinstance(other, fx.Node) and self._is_one(graph, factor) and _same_type(node, other):
                return other
        return None

    def _is_one(self, graph: Graph, factor: Any) -> bool:
        value = graph.constant(factor)
        return value is not None and value.numel() <= self.largest and bool((value == 1).all())


def _same_type(node: fx.Node, other: fx.Node) -> bool:
    """No broadcasting, no promotion."""
    value, kept = tensor_value(node), tensor_value(other)
    return value is not None and kept is not None and value.dtype == kept.dtype and shape_of(node) == shape_of(other)
