"""`Embedding`: rows of a constant matrix, looked up by index, in the spellings of both dialects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.views.common import argument, aten, is_aten, is_onnx


@dataclass(frozen=True)
class Embedding:
    """indices -> [*indices, features], from the table [rows, features] that `table_node` holds."""

    node: fx.Node  # its value is the result
    table_node: fx.Node
    indices: fx.Node

    def table(self, graph: Graph) -> torch.Tensor:
        """The table [rows, features]."""
        stored = graph.constant(self.table_node)
        assert stored is not None
        return stored


def embedding(graph: Graph, node: fx.Node) -> Embedding | None:
    """The lookup whose value `node` is; None when it is something else."""
    if is_onnx(node, "Gather"):
        if node.kwargs.get("axis", 0) not in (0, -2):
            return None
    elif not is_aten(node, aten.embedding.default):
        return None
    table, indices = argument(node, 0), argument(node, 1)
    stored = graph.constant(table)
    if not isinstance(table, fx.Node) or stored is None or stored.dim() != 2 or not stored.is_floating_point():
        return None
    if not isinstance(indices, fx.Node) or indices.op == "get_attr":
        return None
    return Embedding(node, table, indices)


def embeddings(graph: Graph) -> Iterator[Embedding]:
    """Every lookup in a constant matrix of floats, in execution order."""
    for node in list(graph.calls()):
        view = embedding(graph, node)
        if view is not None:
            yield view
