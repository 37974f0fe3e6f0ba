"""The Triton backend: kernels with packed weights for NVIDIA GPUs, compiled without one; the rest by torch.compile."""

from __future__ import annotations

from pathlib import Path

from torch import fx

from fxopt.backends.base import Backend, Executable
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.pattern_work import Tile
from fxopt.ir.target import Cost, Prediction, Target


class Triton(Backend):
    """NVIDIA GPUs from compute capability 8.0 on."""

    needs = ("triton",)
    extra = "triton"

    @property
    def name(self) -> str:
        """The name on the command line."""
        return "triton"

    def refuses(self, node: fx.Node, target: Target) -> str:
        """Operators without a torch reference."""
        if isinstance(node.target, OnnxOp) and not node.target.has_reference:
            return f"{node.target!r} has no torch reference"
        return ""

    def supports(self, op: str, dtype: str, pattern: str = "") -> str:
        """Whether an operator has a kernel, and (where its sizes are given) whether it is predicted to pay.

        Args:
            pattern: `key=value` pairs: group, activations; for a prediction rows, out, in (or heads, length, width,
                density, renumbered) and type.
        """
        from fxopt.backends.triton.asked import answer

        return answer(self.target, op, dtype, pattern)

    def attention_tile(self, dtype: str, width: int, renumbered: bool = False) -> Tile | None:
        """The tile that the kernel is launched with on the target; 64 x 64 where none is known."""
        from fxopt.backends.triton.asked import attention_tile

        return attention_tile(self.target, dtype, width, renumbered)

    def predicted(self, cost: Cost, target: Target) -> Prediction | None:
        """From the static report of the kernel that would be launched: linears with packed weights, patterns."""
        from fxopt.backends.triton.asked import predicted

        return predicted(cost, target)

    def compile(self, graph: Graph, target: Target, *, threads: int | None = None) -> Executable:
        """An executable that lowers and compiles the graph when its kernels are needed.

        Raises:
            Unsupported: the target is no NVIDIA GPU, or has a compute capability before 8.0.
            MissingDependency: Triton is not installed.
        """
        return self.open(graph.copy(), target)

    def open(self, graph: Graph, target: Target, saved: Path | None = None) -> Executable:
        """The same, of a graph that is kept, with kernels that were saved."""
        self.require()
        from fxopt.backends.triton.chips import chip_of
        from fxopt.backends.triton.executable import TritonExecutable

        chip_of(target)
        evaluator = None
        if graph.origin == "onnx":
            from fxopt.backends.onnxruntime.evaluator import OnnxEvaluator

            evaluator = OnnxEvaluator()
        return TritonExecutable(graph, target, evaluator, saved)
