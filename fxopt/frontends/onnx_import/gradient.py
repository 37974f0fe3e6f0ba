"""The graph that a `Gradient` node differentiates, as a nested graph.

The node names values: `y`, and the independent `xs` and `zs` that it takes other values for. What lies between them
is copied; constants are shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from onnx import NodeProto
from torch import fx

from fxopt.errors import InvalidModel
from fxopt.frontends.onnx_import.functions import plain_value
from fxopt.ir.graph import Graph, ValueSpec, label, set_attribute
from fxopt.ir.onnx.records import ConstantRecord

if TYPE_CHECKING:
    from fxopt.frontends.onnx_import.importer import Importer

DOMAIN = "ai.onnx.preview.training"


def differentiated(importer: Importer, proto: NodeProto) -> tuple[fx.Node, dict[str, None]]:
    """The constant with the graph from `xs` and `zs` to `y`, and the names that must stay in the graph around it.

    Raises:
        InvalidModel: an attribute is missing, names no value, or `y` depends on something else that is an input.
    """
    given = {attribute.name: plain_value(attribute) for attribute in proto.attribute}
    if not isinstance(given.get("y"), str) or not given.get("xs"):
        raise InvalidModel(f"node {proto.name or proto.op_type!r}: Gradient needs the attributes `xs` and `y`")
    leaves = [*given["xs"], *given.get("zs", [])]
    if len(leaves) != len(proto.input):
        raise InvalidModel(
            f"node {proto.name or proto.op_type!r}: {len(proto.input)} inputs for {len(leaves)} names in xs and zs"
        )
    names = dict.fromkeys([*leaves, given["y"]])
    nodes = [importer.value(name, proto) for name in names]
    graph = _slice(importer, proto, dict(zip(leaves, nodes, strict=False)), importer.value(given["y"], proto))
    name = f"{proto.name or proto.output[0]}_graph"
    return importer.constant(name, graph, ConstantRecord(name, "attribute", None)), names


def _slice(importer: Importer, proto: NodeProto, leaves: dict[str, fx.Node], y: fx.Node) -> Graph:
    copied, root = fx.Graph(), torch.nn.Module()
    made: dict[fx.Node, fx.Node] = {node: copied.placeholder(node.name) for node in leaves.values()}
    needed = _needed(y, set(made))
    for node in importer.fx.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            raise InvalidModel(
                f"node {proto.name or proto.op_type!r}: its `y` depends on {label(node)!r}, "
                "which is in neither xs nor zs"
            )
        made[node] = copied.node_copy(node, made.__getitem__)
        made[node].meta = dict(node.meta)
        if node.op == "get_attr":
            value = getattr(importer.root, str(node.target))
            set_attribute(root, str(node.target), value.copy() if isinstance(value, Graph) else value)
    copied.output((made[y],))
    specs = tuple(ValueSpec(name, None, None) for name in leaves)
    return Graph(copied, root, "onnx", specs, (ValueSpec("y", None, None),), "gradient")


def _needed(y: fx.Node, leaves: set[fx.Node]) -> set[fx.Node]:
    needed: set[fx.Node] = set()
    stack = [y]
    while stack:
        node = stack.pop()
        if node not in needed and node not in leaves:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return needed
