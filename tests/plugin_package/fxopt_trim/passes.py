"""relu(relu(x)) -> relu(x)"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxopt.ir.graph import Graph, label
from fxopt.passes.base import Context, ExactPass


@dataclass(frozen=True)
class DropRepeatedActivations(ExactPass):
    """Remove ONNX operators that change nothing because their input is their own kind of output."""

    operators: str = "Relu,Abs,Ceil,Floor,Round,Sign"  # each of them is idempotent

    def run(self, graph: Graph, ctx: Context) -> int:
        """The number of operators removed."""
        repeated = [node for node in graph.calls() if self._repeats(node) and not ctx.excluded(label(node))]
        for node in repeated:
            (before,) = node.all_input_nodes
            graph.replace(node, before)
        return len(repeated)

    def _repeats(self, node: fx.Node) -> bool:
        kind = getattr(node.target, "op_type", "")
        if kind not in self.operators.split(","):
            return False
        return [getattr(before.target, "op_type", "") for before in node.all_input_nodes] == [kind]
