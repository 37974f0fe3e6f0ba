"""Ask whether a node has a kernel by lowering it alone; nothing is generated."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxopt.backends.tvm.lowering import Lowering, operator_name
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.program import Program
from fxopt.backends.tvm.rules import RULES
from fxopt.backends.tvm.values import Slot
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, ValueSpec, hint

_ANY = Machine("x86", "x86_64-linux-gnu", (), "", 8, 6, 16, 4, 24, "vpmaddubsw")


class DryProgram(Program):
    """Counts calls without making kernels."""

    def call(self, template: Any, sizes: tuple[Hashable, ...], *slots: Slot, **options: Any) -> None:
        """Nothing."""


def refusal(node: fx.Node) -> str:
    """ "" when the node has a kernel for its types and options, else the reason."""
    if operator_name(node) not in RULES and not _is_computed_now(node):
        return f"{node.target} has no kernel"
    body, root, shapes, specs = fx.Graph(), torch.nn.Module(), [], []
    made: dict[fx.Node, fx.Node] = {}
    for index, used in enumerate(node.all_input_nodes):
        value = used.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            return ""  # an operator on sizes: its value is known when shapes are
        if not isinstance(value, torch.Tensor):
            return f"the type of {used.name} is not known"
        shape = tuple(int(hint(dim)) for dim in value.shape)
        if used.op == "get_attr":
            name = f"c{index}"
            root.register_buffer(name, torch.zeros(shape, dtype=value.dtype))
            made[used] = body.create_node("get_attr", name)
        else:
            made[used] = body.placeholder(f"x{index}")
            shapes.append(shape)
            specs.append(ValueSpec(f"x{index}", value.dtype, shape))
    copied = body.node_copy(node, made.__getitem__)
    return _tried(body, root, copied, shapes, specs)


def _tried(body: fx.Graph, root: Any, node: fx.Node, shapes: list[Any], specs: list[ValueSpec]) -> str:
    body.output((node,))
    graph = Graph(body, root, "torch", tuple(specs), ())
    try:
        lowering = Lowering(graph, DryProgram(_ANY), shapes, RULES)
        lowering.run_inputs()
        if node not in lowering.known and isinstance(lowering.metas[node], (torch.Tensor, tuple, list)):
            lowering.lower(node)
    except Unsupported as error:
        reason = str(error)
        start = f"node {node.name!r}: "
        return reason.removeprefix(start)
    return ""


def refusals(graph: Graph) -> dict[fx.Node, str]:
    """The reasons of the nodes that have no kernel; equal nodes on equal types are tried once."""
    known, tried, found = known_now(graph), dict[Hashable, str](), dict[fx.Node, str]()
    for node in graph.calls():
        if node in known:
            continue
        key = _signature(node)
        if key not in tried:
            tried[key] = refusal(node)
        if tried[key]:
            found[node] = tried[key]
    return found


def _signature(node: fx.Node) -> Hashable:
    """What `refusal` looks at."""

    def described(used: fx.Node) -> Any:
        value = used.meta.get("val")
        return used.op == "get_attr", str(getattr(value, "dtype", type(value))), str(getattr(value, "shape", ""))

    order = {used: index for index, used in enumerate(node.all_input_nodes)}
    arguments = map_arg((node.args, node.kwargs), lambda used: f"%{order[used]}")
    return node.target, str(arguments), tuple(map(described, order))


def known_now(graph: Graph) -> set[fx.Node]:
    """Operators on constants and sizes alone: lowering computes them, whatever they are."""
    known: set[fx.Node] = set()
    for node in graph.calls():
        if all(
            used.op == "get_attr" or used in known or not isinstance(used.meta.get("val"), torch.Tensor)
            for used in node.all_input_nodes
        ):
            known.add(node)
    return known


def _is_computed_now(node: fx.Node) -> bool:
    """Whether all its operands are constants or sizes."""
    return all(
        used.op == "get_attr" or not isinstance(used.meta.get("val"), torch.Tensor) for used in node.all_input_nodes
    )
