"""A model and the software around it in figures."""

from __future__ import annotations

import importlib.metadata

from fxopt.ir.graph import Graph
from fxopt.ir.target import Prediction
from fxopt.report.report import Summary


def summary(graph: Graph, macs: int, predicted: Prediction | None) -> Summary:
    """Operators by name and bytes of the constants, beside the predicted figures."""
    counts: dict[str, int] = {}
    for node in graph.calls():
        name = getattr(node.target, "op_type", None) or str(node.target)
        counts[name] = counts.get(name, 0) + 1
    return Summary(sum(counts.values()), counts, graph.size_bytes(), macs, predicted)


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    import fxopt

    found = {"fxopt": fxopt.__version__}
    for name in ("torch", "onnx", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
