"""Run single operators that have no torch reference through ONNX Runtime, inside the interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import fx

from fxopt.errors import MissingReference
from fxopt.ir.graph import Graph, Opaque, label
from fxopt.ir.onnx.dtypes import FROM_TORCH, from_numpy, to_numpy
from fxopt.ir.onnx.emitter import with_bodies
from fxopt.ir.onnx.foreign import CODES
from fxopt.ir.onnx.lane import to_tensor
from fxopt.ir.onnx.records import NodeRecord


class OnnxEvaluator:
    """An `Evaluator`; keeps one session per node and input signature, and counts the nodes it ran."""

    def __init__(self) -> None:
        self.nodes: set[str] = set()
        self._sessions: dict[Any, tuple[NodeRecord, Any]] = {}  # with the record: its id is part of the key

    def __call__(self, graph: Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The node's value.

        Raises:
            MissingReference: ONNX Runtime cannot run the operator either.
        """
        record = node.meta.get("onnx")
        if not isinstance(record, NodeRecord) or record.proto is None or graph.model is None:
            raise MissingReference(f"node {label(node)!r}: {node.target} runs neither in torch nor in ONNX Runtime")
        names = list(record.proto.input) + list(kwargs.get("_captured_names", ()))
        values = list(args) + list(kwargs.get("_captured", ()))
        pairs = [(name, value) for name, value in zip(names, values, strict=True) if name and value is not None]
        results = self._results(graph, node, record, pairs)
        self.nodes.add(label(node))
        given = iter(results)
        outputs = tuple(next(given) if name else None for name in record.proto.output)
        return outputs[0] if len(outputs) == 1 else outputs

    def _results(self, graph: Graph, node: fx.Node, record: NodeRecord, values: list[tuple[str, Any]]) -> list[Any]:
        """The outputs; operators that do not take widened inputs get them in the model's own type."""
        feeds = {name: _array(value) for name, value in values}
        try:
            return [_value(item) for item in self._session(graph, node, record, feeds).run(None, feeds)]
        except MissingReference:
            dtype = _own_float(node)
            if not any(_is_double(value) for _, value in values) or dtype == torch.float64:
                raise
        feeds = {name: _array(value.to(dtype) if _is_double(value) else value) for name, value in values}
        results = [_value(item) for item in self._session(graph, node, record, feeds).run(None, feeds)]
        return [item.double() if isinstance(item, torch.Tensor) and item.dtype == dtype else item for item in results]

    def _session(self, graph: Graph, node: fx.Node, record: NodeRecord, feeds: dict[str, Any]) -> Any:
        signature = tuple((name, str(getattr(value, "dtype", "")), np.ndim(value)) for name, value in feeds.items())
        key = (id(record), signature)
        if key in self._sessions:
            return _session_or_raise(self._sessions[key][1])
        import onnxruntime

        assert record.proto is not None and graph.model is not None
        proto = with_bodies(graph, node, record.proto)
        inputs = [_value_info(name, value) for name, value in feeds.items()]
        outputs = [onnx.ValueInfoProto(name=name) for name in record.proto.output if name]
        body = helper.make_graph([proto], "node", inputs, outputs)
        model = helper.make_model(
            body,
            opset_imports=list(graph.model.proto.opset_import),
            functions=list(graph.model.proto.functions),
            ir_version=min(graph.model.proto.ir_version, 13),
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no public base class
            reason = " ".join(str(error).split())
            session = MissingReference(f"node {record.name!r}: ONNX Runtime cannot run it either: {reason}")
            session.__cause__ = error
        self._sessions[key] = record, session
        return _session_or_raise(session)


def _session_or_raise(found: Any) -> Any:
    if isinstance(found, MissingReference):
        raise found
    return found


def _own_float(node: fx.Node) -> torch.dtype:
    """The floating-point type of the node's inputs in the model."""
    for used in node.all_input_nodes:
        value = used.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            return value.dtype
    return torch.float32


def _is_double(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


def _array(value: Any) -> Any:
    value = to_tensor(value)
    if isinstance(value, torch.Tensor):
        return to_numpy(value)
    if isinstance(value, Opaque) and isinstance(value.proto, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value.proto)
    return value


def _value_info(name: str, value: Any) -> onnx.ValueInfoProto:
    if not isinstance(value, np.ndarray):
        raise MissingReference(f"value {name!r} of type {type(value).__name__} cannot be given to ONNX Runtime")
    if value.dtype.name in CODES:
        raise MissingReference(f"value {name!r} of type {value.dtype} cannot be given to ONNX Runtime")
    if value.dtype.kind in "OUS":
        element = int(onnx.TensorProto.STRING)
    else:
        element = FROM_TORCH[from_numpy(value[..., :0] if value.ndim else value).dtype]
    return helper.make_tensor_value_info(name, element, [None] * value.ndim)


def _value(item: Any) -> Any:
    if isinstance(item, np.ndarray) and item.dtype.kind not in "OUS":
        return from_numpy(item)
    return item
