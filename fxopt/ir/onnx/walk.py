"""What lies inside ONNX messages: sub-graphs, nodes, tensors; without recursion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto


def graphs_of(node: NodeProto) -> Iterator[GraphProto]:
    """The sub-graphs of a node's attributes, whatever type the attribute claims."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """The nodes and those of their sub-graphs, in no order."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        for graph in graphs_of(node):
            waiting += graph.node


def tensors_of(attribute: AttributeProto) -> Iterator[TensorProto]:
    """The tensors of an attribute, those of sparse tensors too."""
    if attribute.HasField("t"):
        yield attribute.t
    yield from attribute.tensors
    sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for item in (*sparse, *attribute.sparse_tensors):
        yield item.values
        yield item.indices


def inner_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model but the initializers of its main graph."""
    graphs = [model.graph]
    for node in all_nodes([*model.graph.node, *(node for function in model.functions for node in function.node)]):
        for attribute in node.attribute:
            yield from tensors_of(attribute)
        for graph in graphs_of(node):
            yield from graph.initializer
            graphs.append(graph)
    for graph in graphs:
        for item in graph.sparse_initializer:
            yield item.values
            yield item.indices
