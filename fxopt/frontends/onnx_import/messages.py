"""What is kept of ONNX messages, and what names a sub-graph takes from around it."""

from __future__ import annotations

from onnx import GraphProto, ModelProto, NodeProto

from fxopt.frontends.onnx_import.tensors import copy_field
from fxopt.ir.onnx.walk import graphs_of

_BODY_FIELDS = ("node", "initializer", "sparse_initializer")


def without_graph_body(proto: ModelProto) -> ModelProto:
    """A copy of the message without nodes and initializers; weights are never copied."""
    copied = ModelProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name != "graph":
            copy_field(copied, descriptor, value)
    copied.graph.CopyFrom(graph_header(proto.graph))
    copied.graph.SetInParent()
    return copied


def graph_header(proto: GraphProto) -> GraphProto:
    """A copy of the graph without nodes and initializers."""
    copied = GraphProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name not in _BODY_FIELDS:
            copy_field(copied, descriptor, value)
    return copied


def without_subgraphs(proto: NodeProto) -> NodeProto:
    """A copy of the node whose sub-graphs are empty: the nested graphs hold what was in them."""
    if not any(True for _ in graphs_of(proto)):
        copied: NodeProto = NodeProto.FromString(proto.SerializeToString())
        return copied
    copied = NodeProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name != "attribute":
            copy_field(copied, descriptor, value)
    for attribute in proto.attribute:
        kept = copied.attribute.add()
        for descriptor, value in attribute.ListFields():
            if descriptor.name not in ("g", "graphs"):
                copy_field(kept, descriptor, value)
    return copied


def captured_names(body: GraphProto) -> list[str]:
    """Names that a sub-graph takes from the graphs around it, in order of first use; sub-graphs in it included."""
    local = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
    local |= {tensor.values.name for tensor in body.sparse_initializer}
    captured: dict[str, None] = {}
    for node in body.node:
        names = list(node.input)
        for graph in graphs_of(node):
            names += captured_names(graph)
        captured.update(dict.fromkeys(name for name in names if name and name not in local))
        local.update(node.output)
    captured.update(dict.fromkeys(value.name for value in body.output if value.name and value.name not in local))
    return list(captured)
