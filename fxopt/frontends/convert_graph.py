"""A graph at a newer version of the ONNX operator set: converted without its weights, which both graphs share.

What is converted is the message without the bytes of its initializers (`convert_opset`), so that weights in external
data stay memory-mapped and a model may exceed what one message holds.
"""

from __future__ import annotations

from dataclasses import replace

from onnx import ModelProto, helper

from fxopt.frontends.convert_opset import Conversion, refuse_doubtful, rewritten, verified
from fxopt.frontends.onnx import load
from fxopt.ir.builder import since_version
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Ledger
from fxopt.ir.onnx.export import outline
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.onnx.records import ModelRecord, NodeRecord


def convert_graph(graph: Graph, opset: int, ledger: Ledger | None = None) -> Graph:
    """The graph of an ONNX model at `opset`, which a pass or backend needs; the ledger says so.

    Raises: as `converted`.
    """
    made, result = converted(graph, opset)
    if ledger is not None:
        for line in (str(result), *result.changed):
            ledger.note(line)
    return made


def converted(graph: Graph, opset: int) -> tuple[Graph, Conversion]:
    """The graph at `opset`, and how that went; `Conversion.model` lacks the bytes of large initializers.

    Raises:
        InvalidOption, Unsupported, VerificationError: as `convert_opset.convert`.
        Unsupported: the graph is not of ONNX origin, or holds an operator of fxopt's own.
    """
    model, weights = outline(graph)
    result, doubtful = rewritten(model, opset)
    record = graph.model
    if result.model is model or record is None:
        return graph, result
    if not result.changed and not doubtful:
        result = replace(result, error=0.0, unchanged=True)
        if not record.proto.functions and not any(graph.subgraphs()):
            return _relabelled(graph, record, opset), result
        return _like(graph, load(result.model, weights=weights, folder=record.folder)), result
    made = _like(graph, load(result.model, weights=weights, folder=record.folder))
    result = verified(graph, made, result)
    refuse_doubtful(result, doubtful)
    return made, result


def _like(graph: Graph, made: Graph) -> Graph:
    """The graph that was read anew, with what no message holds as the old one has it."""
    made.call_spec, made.store = graph.call_spec, graph.store
    if graph.model is not None and made.model is not None:
        made.model.external, made.model.files = graph.model.external, graph.model.files
    return made


def _relabelled(graph: Graph, record: ModelRecord, opset: int) -> Graph:
    """A copy of the graph of which no node has to be rewritten, at `opset`, with the same weights."""
    made = graph.copy()
    proto = ModelProto.FromString(record.proto.SerializeToString())
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    proto.ir_version = max(
        proto.ir_version, helper.find_min_ir_version_for(list(proto.opset_import), ignore_unknown=True)
    )
    made.model = replace(record, proto=proto)
    for node in made.calls():
        old, kept = node.target, node.meta.get("onnx")
        if isinstance(old, OnnxOp) and not old.domain:
            node.target = OnnxOp("", old.op_type, since_version(old.op_type, opset))
            if isinstance(kept, NodeRecord) and kept.target is old:
                node.meta["onnx"] = replace(kept, target=node.target)
    return made
