"""Spell residual additions so that the backend does not fuse them into a kernel that is slower than its parts.

ONNX Runtime fuses Add -> LayerNormalization into SkipLayerNormalization; in the versions in which that was measured to
be slower, the addition is written as `Sum`, which is not fused and computes the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxopt.ir.graph import Graph, shape_of
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.views.common import is_onnx
from fxopt.passes.base import Context, ExactPass


@dataclass(frozen=True)
class AvoidSlowFusions(ExactPass):
    """Spell residual additions so that the backend does not fuse them into a slow kernel."""

    def run(self, graph: Graph, ctx: Context) -> int:
        """Write Add -> LayerNormalization as Sum -> LayerNormalization."""
        prefers = getattr(ctx.capabilities, "prefers", None)
        if graph.origin != "onnx" or prefers is None or not prefers("SkipLayerNormalization"):
            return 0
        assert graph.model is not None
        if graph.model.opsets.get("", 0) < 8:
            return 0  # Sum broadcasts since opset 8
        changes = 0
        for node in list(graph.calls()):
            if _residual(node):
                total = graph.call(
                    OnnxOp("", "Sum", 13 if graph.model.opsets[""] >= 13 else 8),
                    node.args,
                    before=node,
                    made_by=self.name,
                )
                graph.replace(node, total)
                changes += 1
        return changes


def _residual(node: fx.Node) -> bool:
    """An addition of two values of one shape (but for the batch) that a layer norm consumes: not that of a bias."""
    if not is_onnx(node, "Add") or node.kwargs or not any(is_onnx(user, "LayerNormalization") for user in node.users):
        return False
    first, second = (shape_of(operand) if isinstance(operand, fx.Node) else None for operand in node.args[:2])
    if first is None or second is None or min(len(first), len(second)) < 2:
        return False
    return list(map(str, first[-2:])) == list(map(str, second[-2:]))
