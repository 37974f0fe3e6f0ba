"""Run the rest of a graph from values that are known."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import Evaluator, constant_value, evaluate, plain_tensor


def resume(
    graph: Graph, known: Mapping[str, Any], original: Collection[str], evaluator: Evaluator | None = None
) -> list[Any]:
    """The outputs of a rewritten graph: only new nodes and what depends on them run.

    Args:
        known: the values of the inputs and operators of the graph before it was rewritten, by node name.
        original: the names of all nodes that the graph had then; every other node is new.
    """
    fresh: dict[fx.Node, Any] = {}
    changed: set[fx.Node] = set()

    def value(node: fx.Node) -> Any:
        if node in fresh:
            return fresh[node]
        return constant_value(graph, node) if node.op == "get_attr" else known[node.name]

    with torch.no_grad():
        for node in graph.nodes:
            if node.op == "output" or (node.name in original and changed.isdisjoint(node.all_input_nodes)):
                continue
            changed.add(node)
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                fresh[node] = evaluate(graph, node, tuple(args), dict(kwargs), evaluator)
    return [plain_tensor(value(node) if isinstance(node, fx.Node) else node) for node in graph.result_nodes]
