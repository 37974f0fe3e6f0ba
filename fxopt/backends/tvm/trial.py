"""Ask whether nodes have a kernel by lowering them, alone or all of a graph; nothing is generated."""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping
from typing import Any

import torch
from torch import fx

from fxopt.backends.tvm.lowering import Lowering, operator_name, tensors
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.program import Program
from fxopt.backends.tvm.rules import RULES
from fxopt.backends.tvm.source import Source
from fxopt.backends.tvm.values import DTYPES, TYPES, Slot
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, ValueSpec, hint, label

_ANY = Machine("x86", "x86_64-linux-gnu", (), "", 8, 6, 16, 4, 24, "vpmaddubsw")


class DryProgram(Program):
    """Neither makes kernels nor keeps constants."""

    def constant(self, array: Any) -> Slot:
        """Memory of the array's size."""
        return self.slot(array.size, {"bool": "uint8"}.get(str(array.dtype), str(array.dtype)), "constant")

    def call(self, template: Any, sizes: tuple[Hashable, ...], *slots: Slot, **options: Any) -> None:
        """Nothing."""


def refusals(source: Source, machine: Machine) -> tuple[dict[fx.Node, str], dict[fx.Node, Any]]:
    """Why operators have no kernel at the source's sizes, each as if the others had one; and all values' types.

    Raises:
        Unsupported: an input has a type that no kernel takes.
    """
    graph = source.graph
    try:
        lowering = Lowering(graph, DryProgram(machine), list(source.shapes), RULES)
    except Unsupported:
        found = {node: reason for node in graph.calls() if (reason := refusal(node))}
        if not found:
            raise
        return found, {}
    lowering.run_inputs()
    found = {}
    for node in graph.nodes:
        meta = lowering.metas.get(node)
        if node.op != "call_function" or node in lowering.known or not any(True for _ in tensors(meta)):
            continue
        try:
            _check_types(node, found, lowering.metas)
            lowering.lower(node)
        except Unsupported as error:
            found[node] = str(error).removeprefix(f"node {label(node)!r}: ")
            lowering.values[node] = _stand_in(lowering, meta)
    return found, lowering.metas


def _check_types(node: fx.Node, refused: Container[fx.Node], metas: Mapping[fx.Node, Any]) -> None:
    """What stands in for a refused operand has another type than the operand where no kernel has that type."""
    for used in node.all_input_nodes:
        for tensor in tensors(metas[used]) if used in refused else ():
            if tensor.dtype not in DTYPES:
                raise Unsupported(f"{node.target}: takes {tensor.dtype}; the kernels have {TYPES}")


def _stand_in(lowering: Lowering, meta: Any) -> Any:
    """Memory of the result's type, as if something had written it."""
    if isinstance(meta, torch.Tensor):
        return lowering.program.value(tuple(meta.shape), DTYPES.get(meta.dtype, "float32"))
    return [_stand_in(lowering, item) for item in meta]


def refusal(node: fx.Node) -> str:
    """ "" when the node has a kernel for its types and options, else the reason; sizes are those of fake tensors."""
    if isinstance(node.meta.get("val"), (int, torch.SymInt)):
        return ""  # a size: it is known when shapes are
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
            root.register_buffer(name, torch.full(shape, int(value.is_floating_point()), dtype=value.dtype))
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


def _is_computed_now(node: fx.Node) -> bool:
    """Whether all its operands are constants or sizes."""
    return all(
        used.op == "get_attr" or not isinstance(used.meta.get("val"), torch.Tensor) for used in node.all_input_nodes
    )
