"""Graph theory over a graph: partition by capability, dominators, regions, the critical path.

Constants (`get_attr` nodes) belong to no region: each region that uses one holds it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import fx

from fxopt.errors import InvalidInput
from fxopt.ir.graph import Graph, ValueSpec, label, set_attribute
from fxopt.ir.interpreter import constant_value
from fxopt.ir.ledger import Refusal
from fxopt.ir.onnx.foreign import is_foreign
from fxopt.ir.onnx.lane import to_tensor
from fxopt.ir.text import DimNames

Runner = Callable[[Sequence[Any]], Sequence[Any]]  # the values of a region's inputs -> those of its outputs


def to_networkx(graph: Graph) -> nx.DiGraph[fx.Node]:
    """The graph with fx nodes as nodes (attributes `op` and `label`) and an edge from each value to its users."""
    found: nx.DiGraph[fx.Node] = nx.DiGraph()
    for node in graph.nodes:
        found.add_node(node, op=node.op, label=label(node))
        found.add_edges_from((used, node) for used in node.all_input_nodes)
    return found


# ---- partition by capability


@dataclass(frozen=True)
class Region:
    """Operators that run together; nothing outside lies between two of them."""

    index: int  # regions run in this order
    accepted: bool
    nodes: tuple[fx.Node, ...]  # operators, in execution order
    inputs: tuple[fx.Node, ...]  # placeholders and operators of earlier regions, in order of first use
    outputs: tuple[fx.Node, ...]  # operators whose values are used outside
    constants: tuple[fx.Node, ...]
    reasons: dict[fx.Node, str]  # why each operator was refused; empty when accepted

    def __str__(self) -> str:
        refused = "; ".join(f"{label(node)}: {reason}" for node, reason in self.reasons.items())
        kind = "accepted" if self.accepted else f"refused ({refused})"
        return f"region {self.index}: {len(self.nodes)} operators, {kind}"


@dataclass(frozen=True)
class Partition:
    """The regions of a graph in an order in which they can run."""

    regions: tuple[Region, ...]
    _where: dict[fx.Node, int] = field(repr=False)

    def region_of(self, node: fx.Node) -> Region:
        """The region that runs an operator."""
        return self.regions[self._where[node]]

    def __str__(self) -> str:
        return "\n".join(map(str, self.regions))


def partition(graph: Graph, refuses: Callable[[fx.Node], str]) -> Partition:
    """Cut the graph into maximal regions that a backend accepts and fallback regions; linear in its size.

    No region depends on itself through another one, and no two accepted regions can be made one without that.

    Args:
        refuses: "" when the backend runs the operator, else the reason; `getitem` follows the operator it reads.
    """
    reasons: dict[fx.Node, str] = {}
    levels: dict[fx.Node, int] = {}  # even: accepted, odd: refused; a change of side is one level more
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, fx.Node) and source in levels:
            levels[node] = levels[source]
            continue
        reasons[node] = refuses(node)
        side = 1 if reasons[node] else 0
        level = max([levels[used] for used in node.all_input_nodes if used in levels], default=-side)
        levels[node] = level + (level % 2 != side)
    order = {level: index for index, level in enumerate(sorted(set(levels.values())))}
    where = {node: order[level] for node, level in levels.items()}
    members: list[list[fx.Node]] = [[] for _ in order]
    for node, index in where.items():
        members[index].append(node)
    sides = dict(zip(order.values(), order, strict=True))
    regions = [_region(index, sides[index] % 2 == 0, nodes, where, reasons) for index, nodes in enumerate(members)]
    return Partition(tuple(regions), where)


def _region(
    index: int, accepted: bool, nodes: Sequence[fx.Node], where: dict[fx.Node, int], reasons: dict[fx.Node, str]
) -> Region:
    used = dict.fromkeys(value for node in nodes for value in node.all_input_nodes if where.get(value) != index)
    return Region(
        index,
        accepted,
        tuple(nodes),
        tuple(value for value in used if value.op != "get_attr"),
        tuple(node for node in nodes if any(where.get(user) != index for user in node.users)),
        tuple(value for value in used if value.op == "get_attr"),
        {} if accepted else {node: reasons[node] for node in nodes if node in reasons},
    )


def run_partitioned(graph: Graph, parts: Partition, runners: Sequence[Runner], inputs: Sequence[Any]) -> list[Any]:
    """The graph's outputs, region by region; values are freed after the last region that uses them.

    Args:
        runners: for each region what computes its outputs, such as `extract(graph, region).run`.

    Raises:
        InvalidInput: the number of runners or inputs is wrong.
    """
    placeholders = graph.placeholders
    if len(runners) != len(parts.regions):
        raise InvalidInput(f"{len(runners)} runners for {len(parts.regions)} regions; expected one for each")
    if len(inputs) != len(placeholders):
        raise InvalidInput(f"{len(inputs)} inputs given, the model takes {len(placeholders)}")
    values: dict[fx.Node, Any] = dict(zip(placeholders, inputs, strict=True))
    last = {used: region.index for region in parts.regions for used in region.inputs}
    returned = {node for node in graph.result_nodes if isinstance(node, fx.Node)}
    for region, runner in zip(parts.regions, runners, strict=True):
        results = runner([values[node] for node in region.inputs])
        values.update(zip(region.outputs, results, strict=True))
        for node in region.inputs:
            if last[node] == region.index and node not in returned:
                del values[node]
    values.update({node: constant_value(graph, node) for node in returned if node.op == "get_attr"})
    return [to_tensor(values[node] if isinstance(node, fx.Node) else node) for node in graph.result_nodes]


# ---- a region as a graph


def extract(graph: Graph, region: Region) -> Graph:
    """The region as a graph of its own: inputs and outputs named after their values, constants shared.

    Its signature comes from `meta["val"]`; an unknown type has dtype and shape None. The extract of an ONNX graph can
    be written as a model. A size (int or SymInt) that crosses the border is declared as int64[].
    """
    body, root = fx.Graph(), torch.nn.Module()
    dims = DimNames(graph)
    names = _value_names(region)
    mapping: dict[fx.Node, fx.Node] = {}
    for node in region.inputs:
        mapping[node] = body.create_node("placeholder", node.name, name=node.name)
        mapping[node].meta = {key: node.meta[key] for key in ("val", "probe", "provenance") if key in node.meta}
        if graph.origin == "onnx":
            from fxopt.ir.onnx.records import InputRecord

            mapping[node].meta["onnx"] = InputRecord(names[node])
    for node in (*region.constants, *region.nodes):
        mapping[node] = body.node_copy(node, mapping.__getitem__)
        mapping[node].meta = dict(node.meta)
        if node.op == "get_attr":
            set_attribute(root, str(node.target), graph.attribute(str(node.target)))
    body.output(tuple(mapping[node] for node in region.outputs))
    inputs, outputs = (
        tuple(_value_spec(graph, node, names[node], dims) for node in nodes)
        for nodes in (region.inputs, region.outputs)
    )
    piece = Graph(body, root, graph.origin, inputs, outputs, f"{graph.name}.{region.index}", sizes=dict(graph.sizes))
    if graph.model is not None:
        from fxopt.ir.onnx.records import ModelRecord

        piece.model = ModelRecord(_model_message(graph, piece), graph.model.folder, graph.model.external)
    return piece


def _value_names(region: Region) -> dict[fx.Node, str]:
    """A name for each value that crosses the border: that of the file, else the node's, made unique in the region."""
    taken = {name for node in region.nodes for name in getattr(node.meta.get("onnx"), "outputs", ())}
    names: dict[fx.Node, str] = {}
    for node in (*region.inputs, *region.outputs):
        name = _file_name(node)
        if not name:
            name = node.name
            while name in taken:
                name += "_"
        taken.add(name)
        names[node] = name
    return names


def _file_name(node: fx.Node) -> str:
    """The name that the ONNX file gives a value; "" when it gives none."""
    index: Any = 0
    source: Any = node
    if node.target is operator.getitem:
        source, index = node.args[0], node.args[1]
    record = source.meta.get("onnx") if isinstance(source, fx.Node) else None
    outputs: tuple[str, ...] | None = getattr(record, "outputs", None)
    if outputs is None:
        return getattr(record, "name", "") if node.op == "placeholder" else ""
    return outputs[index] if isinstance(index, int) and index < len(outputs) else ""


def _value_spec(graph: Graph, node: fx.Node, name: str, dims: DimNames) -> ValueSpec:
    value = node.meta.get("val")
    if is_foreign(value):
        return ValueSpec(name, None, tuple(value.shape))
    if isinstance(value, np.ndarray):
        return ValueSpec(name, torch.int64 if value.dtype == object else to_tensor(value).dtype, tuple(value.shape))
    if isinstance(value, torch.Tensor):
        return ValueSpec(name, value.dtype, dims.of(node))
    if isinstance(value, (int, torch.SymInt)):
        return ValueSpec(name, torch.int64, ())
    known = dict(zip(graph.placeholders, graph.inputs, strict=True)).get(node) if node.op == "placeholder" else None
    return ValueSpec(name, known.dtype if known else None, known.shape if known else None)


def _model_message(graph: Graph, piece: Graph) -> Any:
    """The ONNX message of a piece without its nodes: opsets, functions and the declarations that concern it."""
    import onnx

    from fxopt.ir.onnx.dtypes import FROM_TORCH

    assert graph.model is not None
    source = graph.model.proto
    if "messages" not in graph.model.extra:
        listed = (*source.graph.value_info, *source.graph.input, *source.graph.output)
        graph.model.extra["messages"] = {value.name: value for value in listed}
    declared: dict[str, Any] = graph.model.extra["messages"]
    proto = onnx.ModelProto(ir_version=source.ir_version, producer_name="fxopt")
    proto.opset_import.extend(source.opset_import)
    proto.functions.extend(source.functions)
    proto.graph.name = piece.name
    for specs, field_ in ((piece.inputs, proto.graph.input), (piece.outputs, proto.graph.output)):
        for spec in specs:
            if spec.dtype in FROM_TORCH:
                field_.append(onnx.helper.make_tensor_value_info(spec.name, FROM_TORCH[spec.dtype], spec.shape))
            else:
                field_.append(declared.get(spec.name, onnx.ValueInfoProto(name=spec.name)))
    border = {spec.name for spec in (*piece.inputs, *piece.outputs)}
    inside = {name for node in piece.nodes for name in getattr(node.meta.get("onnx"), "outputs", ())} - border
    proto.graph.value_info.extend(declared[name] for name in sorted(inside) if name in declared)
    return proto


# ---- dominators


def immediate_dominators(graph: Graph, *, post: bool = False) -> dict[fx.Node, fx.Node | None]:
    """The last node that every path from the inputs to a node goes through (None: there is no such node).

    With `post`, the first node that every path from a node to the outputs goes through. Values that do not depend on an
    input are left out, as is what does not reach an output with `post`.
    """
    flow: nx.DiGraph[Any] = nx.DiGraph()
    root = object()
    flow.add_node(root)
    depends = set(graph.placeholders)
    flow.add_edges_from((root, node) for node in graph.placeholders if not post)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        used = [value for value in node.all_input_nodes if value in depends]
        if used:
            depends.add(node)
            flow.add_edges_from((node, value) if post else (value, node) for value in used)
    if post:
        flow.add_edges_from((root, node) for node in graph.result_nodes if node in depends)
    found = nx.immediate_dominators(flow, root)
    return {node: None if above is root else above for node, above in found.items() if node is not root}


def dominators(graph: Graph, node: fx.Node, *, post: bool = False) -> list[fx.Node]:
    """All nodes that every path from the inputs to `node` goes through, nearest first (`post`: to the outputs)."""
    tree = immediate_dominators(graph, post=post)
    found: list[fx.Node] = []
    above = tree.get(node)
    while above is not None:
        found.append(above)
        above = tree[above]
    return found


# ---- regions and paths


def single_entry_single_exit(graph: Graph, entry: fx.Node, exit: fx.Node) -> tuple[fx.Node, ...] | Refusal:
    """The operators between `entry` (left out) and `exit` (included), in execution order.

    Refused when a value enters beside `entry` (constants, and what is computed from them alone, may) or leaves beside
    `exit`. The value of `entry` may be used elsewhere.
    """
    forward = {entry}
    stack = [entry]
    while stack:
        for user in stack.pop().users:
            if user not in forward and user <= exit:
                forward.add(user)
                stack.append(user)
    if exit not in forward or exit is entry:
        return Refusal("{} does not reach {}", label(entry), label(exit))
    inner = {exit}
    stack = [exit]
    while stack:
        for used in stack.pop().all_input_nodes:
            if used in forward and used is not entry and used not in inner:
                inner.add(used)
                stack.append(used)
    for node in sorted(inner):
        for used in node.all_input_nodes:
            if used not in inner and used is not entry and _depends_on_input(used):
                return Refusal("{} also takes {}, which does not come from {}", label(node), label(used), label(entry))
        for user in node.users:
            if node is not exit and user not in inner:
                return Refusal("{} is also used by {}, outside of the region", label(node), label(user))
    return tuple(sorted(inner))


def _depends_on_input(node: fx.Node) -> bool:
    seen = {node}
    stack = [node]
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            return True
        fresh = [used for used in current.all_input_nodes if used not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return False


@dataclass(frozen=True)
class Path:
    """A chain of values and the sum of their weights."""

    length: float
    nodes: tuple[fx.Node, ...]


def critical_path(graph: Graph, weight: Callable[[fx.Node], float]) -> Path:
    """The chain of operators with the largest total weight (not negative): what limits a machine without end."""
    length: dict[fx.Node, float] = {}
    before: dict[fx.Node, fx.Node | None] = {}
    for node in graph.nodes:
        longest = max(node.all_input_nodes, key=length.__getitem__, default=None)
        own = weight(node) if node.op not in ("placeholder", "get_attr", "output") else 0.0
        length[node] = own + (length[longest] if longest is not None else 0.0)
        before[node] = longest
    chain: list[fx.Node] = []
    current = before[graph.output]
    while current is not None:
        chain.append(current)
        current = before[current]
    return Path(length[graph.output], tuple(reversed(chain)))
