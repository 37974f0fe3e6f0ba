"""Run single operators in ONNX's own reference evaluator, inside the interpreter."""

from __future__ import annotations

from typing import Any

from onnx import TypeProto, ValueInfoProto, helper
from torch import fx

from fxopt.errors import MissingReference
from fxopt.ir.graph import Graph, label
from fxopt.ir.onnx.emitter import with_bodies
from fxopt.ir.onnx.records import NodeRecord
from fxopt.ir.onnx.values import from_array, to_array


def evaluate(graph: Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The node's value.

    Raises:
        MissingReference: ONNX's reference evaluator cannot run the operator either.
    """
    record = node.meta.get("onnx")
    if not isinstance(record, NodeRecord) or record.proto is None or graph.model is None:
        raise MissingReference(f"node {label(node)!r}: {node.target} is no operator of ONNX")
    proto = with_bodies(graph, node, record.proto)
    names = list(record.proto.input) + list(kwargs.get("_captured_names", ()))
    values = list(args) + list(kwargs.get("_captured", ()))
    feeds = {name: to_array(value) for name, value in zip(names, values, strict=True) if name}
    from onnx.reference import ReferenceEvaluator

    inputs = [ValueInfoProto(name=name, type=TypeProto()) for name in feeds]
    outputs = [ValueInfoProto(name=name, type=TypeProto()) for name in record.proto.output if name]
    model = helper.make_model(
        helper.make_graph([proto], "node", inputs, outputs),
        opset_imports=list(graph.model.proto.opset_import),
        functions=list(graph.model.proto.functions),
        ir_version=graph.model.proto.ir_version,
    )
    try:
        results = iter(ReferenceEvaluator(model).run(None, feeds))
    except Exception as error:  # the evaluator's exceptions share no base class
        reason = " ".join(str(error).split())
        raise MissingReference(f"node {label(node)!r}: ONNX's reference evaluator cannot run it: {reason}") from error
    found = tuple(from_array(next(results)) if name else None for name in record.proto.output)
    return found[0] if len(found) == 1 else found
