"""Run the graph in torch, operator by operator: the reference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt.backends import eager_cpu, eager_cuda
from fxopt.backends.base import Backend, Executable
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import Evaluator
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.target import Target


class EagerExecutable(Executable):
    """The interpreter over a graph; on so many threads, or on as many as torch has."""

    executed_on = "eager (reference)"

    def __init__(self, graph: Graph, evaluator: Evaluator | None = None, threads: int | None = None) -> None:
        eager_cpu.register()
        if torch.cuda.is_available():
            eager_cuda.register()
        self.graph = graph
        self.evaluator = evaluator
        self.threads = threads

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs on flat inputs."""
        before = torch.get_num_threads()
        if self.threads is None or self.threads == before:
            return self.graph.run(inputs, evaluator=self.evaluator)
        torch.set_num_threads(self.threads)
        try:
            return self.graph.run(inputs, evaluator=self.evaluator)
        finally:
            torch.set_num_threads(before)

    def save(self, path: str | os.PathLike[str]) -> None:
        """The reference has no artifact of its own."""
        raise Unsupported("the reference has no artifact; save the graph instead")


class Eager(Backend):
    """The reference backend: takes everything that has a torch definition."""

    @property
    def name(self) -> str:
        """The name on the command line."""
        return "eager"

    def refuses(self, node: fx.Node, target: Target) -> str:
        """Operators without a torch reference."""
        if isinstance(node.target, OnnxOp) and not node.target.has_reference:
            return f"{node.target!r} has no torch reference"
        return ""

    def supports(self, op: str, dtype: str, pattern: str = "") -> str:
        """Every fxopt operator runs here."""
        return ""

    def skips_zeros(self, target: Target, dtype: str, pattern: str, shape: tuple[int, int] | None = None) -> str:
        """2:4 on CUDA devices whose matrix units skip it, in the types that torch has such products for."""
        if target.kind != "cuda":
            return super().skips_zeros(target, dtype, pattern, shape)
        return eager_cuda.unskipped(target, dtype, pattern, shape)

    def compile(self, graph: Graph, target: Target, *, threads: int | None = None) -> Executable:
        """An interpreter over a copy of the graph."""
        if graph.origin != "onnx":
            return EagerExecutable(graph.copy(), threads=threads)
        from fxopt.backends.onnxruntime.evaluator import OnnxEvaluator

        return EagerExecutable(graph.copy(), OnnxEvaluator(), threads)
