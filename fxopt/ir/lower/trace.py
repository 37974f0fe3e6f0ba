"""The graph as a module that `torch.export` can trace: host constants first, provenance with every operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.fx.traceback as traceback
from torch import fx

from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, label
from fxopt.ir.interpreter import GraphRun, constant_value, evaluate
from fxopt.ir.lower import flow
from fxopt.ir.lower.conditions import undecided
from fxopt.ir.onnx.lane import to_tensor
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.subgraphs import has_bodies

KEY = "fxopt"  # of the provenance in a traced node's meta["custom"]
Key = tuple[int, str]  # a constant: the id of its graph and its name there
SEPARATOR = "\n"
_SCALED = ("Resize", "Upsample")


def graphs_within(graph: Graph) -> list[Graph]:
    """The graph, its bodies and the functions that it calls, and what is in those; each once."""
    found: dict[int, Graph] = {}
    waiting = [graph]
    while waiting:
        current = waiting.pop()
        if id(current) in found:
            continue
        found[id(current)] = current
        held = (current.attribute(str(node.target)) for node in current.fx.find_nodes(op="get_attr"))
        waiting += [value for value in held if isinstance(value, Graph)]
    return list(found.values())


class Place:
    """Where the run is; an object, since torch.export undoes changes of a module's lists."""

    def __init__(self) -> None:
        self.labels: list[str] = []


class Traced(torch.nn.Module):
    """Runs a graph for the exporter; `where` is the path of nodes at which it is now, or failed."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        graphs = graphs_within(graph)
        self.roots = torch.nn.ModuleList([part.root for part in graphs])
        self.table: dict[Key, Any] = {}  # before tracing: torch.export makes fake tensors of all buffers
        for part in graphs:
            for node in part.fx.find_nodes(op="get_attr"):
                value = constant_value(part, node)
                if isinstance(value, torch.Tensor) and _is_option(node):
                    value = value.numpy()
                if isinstance(value, np.ndarray):
                    self.table[id(part), str(node.target)] = value
        self.flags: dict[Key, bool] = {
            (id(part), str(node.target)): bool(value)
            for part in graphs
            for node in part.fx.find_nodes(op="get_attr")
            if (value := part.constant(node)) is not None and value.dtype == torch.bool and value.numel() == 1
        }
        self.place = Place()

    @property
    def where(self) -> list[str]:
        """The labels of the node that runs now, after those of the nodes around it."""
        return self.place.labels

    def flag(self, graph: Graph, node: Any) -> bool | None:
        """The value of a constant condition; None for every other node."""
        return self.flags.get((id(graph), str(getattr(node, "target", ""))))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.where.clear()
        results = [to_tensor(value) for value in TracedRun(self.graph, self).run(list(inputs))]
        for spec, value in zip(self.graph.outputs, results, strict=True):
            if not isinstance(value, torch.Tensor):
                raise Unsupported(f"output {spec.name!r} is a {type(value).__name__}; a torch graph gives tensors only")
        return tuple(results)


def _is_option(node: fx.Node) -> bool:
    """Whether a constant only says how to compute: scales, whose values sizes follow from."""
    return bool(node.users) and all(getattr(user.target, "op_type", "") in _SCALED for user in node.users)


class TracedRun(GraphRun):
    """The interpreter under the exporter; `lifted` are constants that came in as operands of a branch or loop."""

    def __init__(self, graph: Graph, traced: Traced, lifted: Mapping[Key, Any] | None = None) -> None:
        super().__init__(graph)
        self.traced = traced
        self.lifted = lifted or {}

    def inside(self, graph: Graph) -> GraphRun:
        """The run of a body or function of this graph."""
        return TracedRun(graph, self.traced, self.lifted)

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], attributes: Mapping[str, Any] | None) -> Any:
        if node.op == "get_attr":
            return self.constant(self.graph, str(node.target))
        path = self.traced.where
        path.append(label(node))
        with traceback.annotate({KEY: SEPARATOR.join(_origin(node, path))}):
            value = self._operator(node, values, attributes)
        path.pop()
        return value

    def _operator(self, node: fx.Node, values: dict[fx.Node, Any], attributes: Mapping[str, Any] | None) -> Any:
        rule = flow.RULES.get(getattr(node.target, "op_type", "")) if isinstance(node.target, OnnxOp) else None
        if rule is not None and has_bodies(node, self.graph):
            found = rule(self, node, values, attributes)
            if found is not NotImplemented:
                return found
        args = undecided(node, fx.map_arg(node.args, values.__getitem__))
        if args is not None:
            return evaluate(self.graph, node, args, dict(node.kwargs))
        return super()._value(node, values, attributes)

    def constant(self, graph: Graph, target: str) -> Any:
        """The value of a constant of this graph or of one in it."""
        key = (id(graph), target)
        for known in (self.lifted, self.traced.table):
            if key in known:
                return known[key]
        return graph.attribute(target)


def _origin(node: fx.Node, path: list[str]) -> tuple[str, ...]:
    recorded = node.meta.get("provenance") or (label(node),)
    return ("/".join([*path[:-1], str(recorded[0])]), *recorded[1:])
