"""A model that is too large to be loaded whole: run node by node over its memory maps, written in a stream."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from fxopt.backends.base import Executable
from fxopt.backends.onnxruntime.evaluator import OnnxEvaluator
from fxopt.ir.graph import Graph


class Streamed(Executable):
    """Stands in for a session of ONNX Runtime: gives its results, not its time."""

    executed_on = "torch, node by node (a session would need more than half of the memory)"
    is_timed = False

    def __init__(self, graph: Graph, opening: Sequence[str] = ()) -> None:
        self.graph = graph
        self.evaluator = OnnxEvaluator()
        self.opening = opening

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs on flat inputs."""
        return self.graph.run(inputs, evaluator=self.evaluator)

    def notes(self) -> Sequence[str]:
        """What opening the file will take."""
        return self.opening

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model and its weights, tensor by tensor."""
        from fxopt.backends.onnxruntime.forms import FORMS
        from fxopt.ir.onnx.export import save

        save(self.graph, path, FORMS, external=True)
