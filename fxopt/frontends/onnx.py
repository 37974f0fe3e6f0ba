"""ONNX files and `ModelProto`s: one node of the dialect per ONNX node, nothing lost."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError, EncodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper
from torch import fx

from fxopt.errors import InvalidModel
from fxopt.frontends.infer_types import undeclared_types
from fxopt.frontends.input_shapes import Shapes, override
from fxopt.ir.graph import Graph, Opaque
from fxopt.ir.onnx.dtypes import TO_TORCH, from_numpy
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.onnx.records import ConstantRecord, InputRecord, ModelRecord, NodeRecord
from fxopt.ir.onnx.signature import value_spec

STRIP_BYTES = 1024  # tensors of more bytes are held once, as torch tensors, and taken out of the kept message
_DATA_FIELDS = {
    "raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data"
}  # fmt: skip


def load(
    source: str | os.PathLike[str] | ModelProto,
    *,
    check: bool = True,
    weights: Mapping[str, torch.Tensor] | None = None,
    input_shapes: Shapes | None = None,
) -> Graph:
    """Import a model from a file or a message; the source is never changed.

    Args:
        check: let the ONNX checker see the model first.
        weights: the values of initializers whose bytes the message does not hold; they are shared, not copied.
        input_shapes: per input its sizes, names of dimensions, or None where the model's stays (see `input_shapes`).

    Raises:
        InvalidModel: the file is missing or unreadable, is not an ONNX model, or the checker rejects it.
        InvalidInput: the given shapes do not fit the model.
    """
    folder: Path | None = None
    if isinstance(source, ModelProto):
        proto = source
        if check:
            _check(proto, None, proto)
    else:
        folder = Path(source).resolve().parent
        content = _read(Path(source))
        proto = _parse(content, Path(source))
        if check:
            _check(proto, Path(source), content)
        del content
    graph = _Importer(proto, folder, weights or {}).model()
    if input_shapes:
        override(graph, input_shapes)
    return graph


def _read(path: Path) -> bytes:
    if not path.exists():
        raise InvalidModel(f"{path}: no such file; expected an ONNX model")
    if path.is_dir():
        raise InvalidModel(f"{path} is a folder; expected an ONNX model file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(content: bytes, path: Path) -> ModelProto:
    proto = ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise InvalidModel(
            f"{path} is not an ONNX model, or is truncated ({len(content)} bytes): {error}; expected a ModelProto"
        ) from error
    if not proto.ir_version or not proto.HasField("graph"):
        raise InvalidModel(f"{path} is not an ONNX model: it holds no graph ({len(content)} bytes)")
    return proto


def _check(proto: ModelProto, path: Path | None, content: ModelProto | bytes) -> None:
    external = path is not None and any(_is_external(tensor) for tensor in proto.graph.initializer)
    try:
        onnx.checker.check_model(str(path) if external else content)
    except (onnx.checker.ValidationError, EncodeError, ValueError, RuntimeError) as error:
        where = "the model" if path is None else str(path)
        reason = " ".join(str(error).split())
        raise InvalidModel(f"{where} is not a valid ONNX model; the ONNX checker says: {reason}") from error


def _dangling(body: GraphProto) -> frozenset[str]:
    """Names that have a type but no value, as tools leave them when they remove nodes."""
    live = {name for node in body.node for name in node.output}
    live.update(value.name for value in body.input)
    live.update(tensor.name for tensor in body.initializer)
    return frozenset(value.name for value in body.value_info if value.name not in live)


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


class _Importer:
    def __init__(self, proto: ModelProto, folder: Path | None, weights: Mapping[str, torch.Tensor]) -> None:
        self.proto = proto
        self.weights = weights
        self.folder = folder
        self.record = ModelRecord(_without_graph_body(proto), folder, dangling=_dangling(proto.graph))
        self.opsets = self.record.opsets
        self.fx = fx.Graph()
        self.root = torch.nn.Module()
        self.values: dict[str, fx.Node] = {}
        self.versions: dict[tuple[str, str], int] = {}
        self.targets: set[str] = set()

    def model(self) -> Graph:
        body = self.proto.graph
        initialized = {tensor.name for tensor in body.initializer}
        inputs = [value for value in body.input if value.name not in initialized]
        for value in inputs:
            node = self.fx.placeholder(_identifier(value.name))
            node.meta["onnx"] = InputRecord(value.name)
            self.values[value.name] = node
        for tensor in body.initializer:
            self.values[tensor.name] = self.initializer(tensor)
        for sparse in body.sparse_initializer:
            kept = onnx.SparseTensorProto.FromString(sparse.SerializeToString())
            name = sparse.values.name
            self.values[name] = self.constant(name, Opaque(kept), ConstantRecord(name, "sparse", kept))
        for node_proto in body.node:
            self.node(node_proto)
        missing = [value.name for value in body.output if value.name not in self.values]
        if missing:
            raise InvalidModel(f"the model's outputs {missing} are not computed by any node")
        self.fx.output(tuple(self.values[value.name] for value in body.output))
        self.record.extra["inferred"] = undeclared_types(self.proto)
        return Graph(
            self.fx,
            self.root,
            "onnx",
            tuple(map(value_spec, inputs)),
            tuple(map(value_spec, body.output)),
            body.name or "main",
            self.record,
        )

    def constant(self, name: str, value: Any, record: ConstantRecord) -> fx.Node:
        target = f"c_{_identifier(name)}"
        while target in self.targets:
            target += "_"
        self.targets.add(target)
        if isinstance(value, torch.Tensor):
            self.root.register_buffer(target, value)
        else:
            setattr(self.root, target, value)
        node = self.fx.create_node("get_attr", target, name=target)
        record.tensor = value
        node.meta["onnx"] = record
        return node

    def initializer(self, tensor: TensorProto) -> fx.Node:
        if tensor.name in self.weights:
            record = ConstantRecord(tensor.name, "initializer", _without_data(tensor), None, True)
            return self.constant(tensor.name, self.weights[tensor.name], record)
        value, kept, stripped = self.tensor(tensor)
        if _is_external(tensor):
            self.record.external = True
        return self.constant(tensor.name, value, ConstantRecord(tensor.name, "initializer", kept, None, stripped))

    def tensor(self, proto: TensorProto) -> tuple[torch.Tensor | Opaque, TensorProto, bool]:
        """The tensor, the message to keep, and whether the message was stripped of the bytes."""
        if proto.data_type not in TO_TORCH:
            kept = TensorProto.FromString(proto.SerializeToString())
            return Opaque(kept), kept, False
        if _is_external(proto):
            kept = TensorProto.FromString(proto.SerializeToString())
            return self.external(proto), kept, True
        raw = proto.raw_data if proto.HasField("raw_data") else b""
        if len(raw) <= STRIP_BYTES:
            kept = TensorProto.FromString(proto.SerializeToString())
            return from_numpy(numpy_helper.to_array(kept)), kept, False
        return _tensor_over(raw, proto), _without_data(proto), True

    def external(self, proto: TensorProto) -> torch.Tensor:
        """External data as a private, copy-on-write memory map."""
        entries = {entry.key: entry.value for entry in proto.external_data}
        if self.folder is None:
            raise InvalidModel(f"initializer {proto.name!r} has external data; give the model's path, not its message")
        file = (self.folder / entries["location"]).resolve()
        if not file.is_file():
            raise InvalidModel(f"initializer {proto.name!r}: its external data file {file} does not exist")
        dtype = TO_TORCH[proto.data_type]
        offset = int(entries.get("offset", "0"))
        count = int(np.prod(proto.dims, dtype=np.int64))
        if file.stat().st_size < offset + count * dtype.itemsize:
            raise InvalidModel(
                f"initializer {proto.name!r}: {file} is too short for {list(proto.dims)} at byte {offset}"
            )
        if offset % dtype.itemsize or count == 0:
            content = file.read_bytes()[offset : offset + count * dtype.itemsize]
            return _tensor_over(content, proto)
        storage = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
        return torch.empty(0, dtype=dtype).set_(storage, offset // dtype.itemsize, tuple(proto.dims))  # type: ignore[call-overload, no-any-return]

    def node(self, proto: NodeProto) -> None:
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        kept = NodeProto.FromString(proto.SerializeToString())
        if domain == "" and proto.op_type == "Constant" and self.constant_node(kept):
            return
        arguments = tuple(self.value(name, proto) if name else None for name in proto.input)
        attributes: dict[str, Any] = {}
        captured: dict[str, None] = {}
        for attribute in kept.attribute:
            attributes[attribute.name] = self.attribute(kept, attribute)
            if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                for sub in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                    captured.update(dict.fromkeys(captured_names(sub)))
        if captured:
            attributes["_captured"] = tuple(self.value(name, proto) for name in captured)
            attributes["_captured_names"] = tuple(captured)
        if len(proto.output) != 1:
            attributes["_outputs"] = len(proto.output)
        target = OnnxOp(domain, proto.op_type, self.version(domain, proto.op_type))
        node = self.fx.create_node(
            "call_function", target, arguments, attributes, name=_identifier(proto.name or proto.output[0])
        )
        record = NodeRecord(proto.name, tuple(proto.output), kept, target, node.kwargs)
        node.meta["onnx"] = record
        node.meta["provenance"] = (proto.name or proto.output[0],)
        if len(proto.output) == 1:
            self.values[proto.output[0]] = node
            return
        for index, name in enumerate(proto.output):
            if name:
                self.values[name] = self.fx.create_node(
                    "call_function", operator.getitem, (node, index), name=_identifier(name)
                )

    def constant_node(self, proto: NodeProto) -> bool:
        """Import a `Constant` node as a constant; False when it is kept as an operator."""
        if len(proto.attribute) != 1:
            return False
        attribute = proto.attribute[0]
        value: torch.Tensor | Opaque
        if attribute.name == "value":
            value = self.tensor(attribute.t)[0]
        elif attribute.name in ("value_float", "value_floats"):
            value = torch.tensor(onnx.helper.get_attribute_value(attribute), dtype=torch.float32)
        elif attribute.name in ("value_int", "value_ints"):
            value = torch.tensor(onnx.helper.get_attribute_value(attribute), dtype=torch.int64)
        else:
            value = Opaque(proto)
        name = proto.output[0]
        self.values[name] = self.constant(name, value, ConstantRecord(name, "node", proto))
        return True

    def attribute(self, node: NodeProto, attribute: AttributeProto) -> Any:
        kind = attribute.type
        if kind in (AttributeProto.INT, AttributeProto.FLOAT):
            return onnx.helper.get_attribute_value(attribute)
        if kind == AttributeProto.STRING:
            return attribute.s.decode("utf-8", "surrogateescape")
        if kind == AttributeProto.INTS:
            return list(attribute.ints)
        if kind == AttributeProto.FLOATS:
            return list(attribute.floats)
        if kind == AttributeProto.STRINGS:
            return [item.decode("utf-8", "surrogateescape") for item in attribute.strings]
        name = f"{node.name or node.output[0]}_{attribute.name}"
        value: torch.Tensor | Opaque = Opaque(attribute)
        if kind == AttributeProto.TENSOR and attribute.t.data_type in TO_TORCH:
            value = self.tensor(attribute.t)[0]
        return self.constant(name, value, ConstantRecord(name, "attribute", attribute))

    def version(self, domain: str, op_type: str) -> int:
        """Since-version of the schema in force; the opset version for operators without a schema."""
        key = (domain, op_type)
        if key not in self.versions:
            opset = self.opsets.get(domain, 1)
            known = onnx.defs.has(op_type, opset, domain)
            self.versions[key] = onnx.defs.get_schema(op_type, opset, domain).since_version if known else opset
        return self.versions[key]

    def value(self, name: str, user: NodeProto) -> fx.Node:
        if name not in self.values:
            raise InvalidModel(
                f"node {user.name or user.op_type!r} uses the value {name!r}, which nothing before it computes"
            )
        return self.values[name]


def _without_graph_body(proto: ModelProto) -> ModelProto:
    """A copy of the message without nodes and initializers; weights are never copied."""
    copied = ModelProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name == "graph":
            continue
        _copy_field(copied, descriptor, value)
    for descriptor, value in proto.graph.ListFields():
        if descriptor.name not in ("node", "initializer", "sparse_initializer"):
            _copy_field(copied.graph, descriptor, value)
    copied.graph.SetInParent()
    return copied


def _copy_field(message: Any, descriptor: Any, value: Any) -> None:
    if descriptor.is_repeated:
        getattr(message, descriptor.name).extend(value)
    elif descriptor.message_type is not None:
        getattr(message, descriptor.name).CopyFrom(value)
    else:
        setattr(message, descriptor.name, value)


def _without_data(proto: TensorProto) -> TensorProto:
    copied = TensorProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name not in _DATA_FIELDS:
            _copy_field(copied, descriptor, value)
    return copied


def _tensor_over(content: bytes, proto: TensorProto) -> torch.Tensor:
    """A tensor over the bytes, without a copy; constants of a graph are never written to."""
    dtype = TO_TORCH[proto.data_type]
    if not content:
        return torch.empty(tuple(proto.dims), dtype=dtype)
    expected = int(np.prod(proto.dims, dtype=np.int64)) * dtype.itemsize
    if len(content) != expected:
        raise InvalidModel(
            f"initializer {proto.name!r} holds {len(content)} bytes; {list(proto.dims)} needs {expected}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the buffer is not writable, and nobody writes
        return torch.frombuffer(content, dtype=dtype).reshape(tuple(proto.dims))


def captured_names(body: GraphProto) -> list[str]:
    """Names that a sub-graph takes from the graphs around it, in order of first use."""
    local = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
    captured: dict[str, None] = {}
    for node in body.node:
        names = list(node.input)
        for attribute in node.attribute:
            subs = list(attribute.graphs) + ([attribute.g] if attribute.type == AttributeProto.GRAPH else [])
            for sub in subs:
                names += captured_names(sub)
        captured.update(dict.fromkeys(name for name in names if name and name not in local))
        local.update(node.output)
    captured.update(dict.fromkeys(value.name for value in body.output if value.name and value.name not in local))
    return list(captured)


def _identifier(name: str) -> str:
    """A Python identifier near `name` (fx makes it unique)."""
    text = "".join(char if char.isascii() and (char.isalnum() or char == "_") else "_" for char in name) or "value"
    return f"_{text}" if text[0].isdigit() else text
