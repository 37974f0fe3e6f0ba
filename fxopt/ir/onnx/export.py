"""From the ONNX dialect to a `ModelProto`: untouched nodes verbatim, fxopt operators through a table of forms."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from onnx import ModelProto, TensorProto, helper

from fxopt.errors import OutputError, Unsupported
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.dtypes import to_numpy
from fxopt.ir.onnx.emitter import Emitter, Form, Forms, drop_stale_types
from fxopt.ir.onnx.external_writer import write_external
from fxopt.ir.onnx.marks import IR_VERSION, has_marks
from fxopt.ir.onnx.message_writer import write_message
from fxopt.ir.onnx.tensor_bytes import external_bytes
from fxopt.ir.onnx.walk import inner_tensors

INLINE_LIMIT = 1_900_000_000  # bytes of weights up to which one file is written (protobuf's limit is 2^31 - 1)
_SMALL = 1024  # bytes; smaller tensors always lie in the file: shape inference must read shapes
__all__ = ["INLINE_LIMIT", "Emitter", "Form", "Forms", "outline", "save", "to_model"]


def _emit(
    graph: Graph, forms: Forms, inline: bool = False
) -> tuple[ModelProto, list[tuple[TensorProto, torch.Tensor]]]:
    """The model message, and the initializers of it that still lack their bytes."""
    if graph.model is None:
        raise Unsupported("only a graph of ONNX origin can be written as it is; export a PyTorch graph first")
    emitter = Emitter(graph, forms, inline=inline)
    emitter.run()
    proto = ModelProto.FromString(graph.model.proto.SerializeToString())
    proto.graph.node.extend(emitter.nodes)
    proto.graph.sparse_initializer.extend(emitter.sparse)
    pending = []
    for tensor, value in emitter.initializers:
        proto.graph.initializer.append(tensor)
        if value is not None:
            pending.append((proto.graph.initializer[-1], value))
    known = {"" if entry.domain == "ai.onnx" else entry.domain for entry in proto.opset_import}
    for domain, version in emitter.opsets.items():
        if domain not in known:
            proto.opset_import.append(helper.make_opsetid(domain, version))
    if has_marks(graph):
        proto.ir_version = max(proto.ir_version, IR_VERSION)
    drop_stale_types(proto.graph, graph.model.dangling)
    return proto, pending


def to_model(graph: Graph, forms: Forms | None = None) -> ModelProto:
    """The graph as a `ModelProto`; external tensors of the source stay references to its files.

    Raises:
        Unsupported: an operator has no ONNX form, or the weights do not fit into one message (use `save`).
    """
    proto, pending = _emit(graph, forms or {})
    pending = [(tensor, value) for tensor, value in pending if tensor.data_location != TensorProto.EXTERNAL]
    total = sum(value.nbytes for _, value in pending)
    if total > INLINE_LIMIT:
        raise Unsupported(f"{total} bytes of weights do not fit into one protobuf message; save the graph to a file")
    for tensor, value in pending:
        tensor.raw_data = to_numpy(value).tobytes()
    return proto


def outline(graph: Graph) -> tuple[ModelProto, dict[str, torch.Tensor]]:
    """The graph as a `ModelProto` without the bytes of its large initializers, and these, by name.

    External tensors of the source stay references to its files.

    Raises:
        Unsupported: an operator has no ONNX form.
    """
    proto, pending = _emit(graph, {})
    weights = {}
    for tensor, value in pending:
        if tensor.data_location == TensorProto.EXTERNAL:
            continue
        if value.nbytes < _SMALL:
            tensor.raw_data = to_numpy(value).tobytes()
        else:
            weights[tensor.name] = value
    return proto, weights


def save(
    graph: Graph, path: str | os.PathLike[str], forms: Forms | None = None, *, external: bool | None = None
) -> None:
    """Write the graph as `path`, with its weights in `path`.data when they exceed one message or the source did so.

    Written to temporary names and renamed: nothing half-written is left, an existing file stays until the end.

    Raises:
        OutputError: the path is a folder, its folder does not exist, writing fails, or a file that holds the weights of
            the model that came in would be overwritten.
        Unsupported: an operator has no ONNX form, or the model is too large for one file and `external` is False.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file, such as {path / 'model.onnx'}")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    proto, pending = _emit(graph, forms or {}, inline=True)
    _bring_in(proto, graph)
    total = sum(value.nbytes for _, value in pending)
    if external is None:
        external = total > INLINE_LIMIT or (graph.model is not None and graph.model.external)
    _refuse_sources(graph, path, (path, path.with_name(f"{path.name}.data")) if external else (path,))
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            written = Path(scratch) / path.name
            data = Path(scratch) / f"{path.name}.data"
            large = [item for item in pending if external and item[1].nbytes >= _SMALL]
            if large:
                write_external(large, Path(scratch), data.name)
            inside = {tensor.name: value for tensor, value in pending if not external or value.nbytes < _SMALL}
            for tensor, _ in pending:
                if tensor.name in inside:
                    tensor.ClearField("external_data")
                    tensor.ClearField("data_location")
            write_message(proto, inside, written)
            if data.exists():
                os.replace(data, path.parent / data.name)
            os.replace(written, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def _bring_in(proto: ModelProto, graph: Graph) -> None:
    """Take the bytes of external tensors that are no initializers of the main graph into the message."""
    if graph.model is None or not graph.model.files:
        return
    for tensor in inner_tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            _fill(tensor, external_bytes(tensor, graph.model.folder).numpy().tobytes())


def _fill(tensor: TensorProto, content: bytes) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = content


def _refuse_sources(graph: Graph, path: Path, files: Iterable[Path]) -> None:
    """The files that hold the model's weights are not written to: its file, or a graph that maps them, would break."""
    held = graph.model.files if graph.model is not None else frozenset()
    for file in files:
        if file.resolve() in held:
            raise OutputError(
                f"{path}: {file.name} holds the weights of the model that came in and would be overwritten; "
                "give another name or folder"
            )
