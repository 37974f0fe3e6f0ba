"""ONNX files and `ModelProto`s: one node of the dialect per ONNX node, nothing lost."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError, EncodeError
from onnx import GraphProto, ModelProto, TensorProto

from fxopt.errors import InvalidModel
from fxopt.frontends.infer_types import undeclared_types
from fxopt.frontends.input_shapes import Shapes, override
from fxopt.frontends.onnx_import.file_kinds import other_kind
from fxopt.frontends.onnx_import.functions import key_of
from fxopt.frontends.onnx_import.importer import Importer, Model
from fxopt.frontends.onnx_import.messages import without_graph_body
from fxopt.ir.graph import Graph
from fxopt.ir.masks import settle
from fxopt.ir.onnx.model_checks import DEPTH_LIMIT, check_message
from fxopt.ir.onnx.records import ModelRecord
from fxopt.ir.onnx.walk import inner_tensors

_MOST_BYTES = (1 << 31) - 1  # of a protobuf message
_SMALL = 1024  # bytes of a tensor
_CHECKED_BYTES = 1 << 26  # the checker makes a copy: of larger messages, it sees one without data


def load(
    source: str | os.PathLike[str] | ModelProto,
    *,
    check: bool = True,
    weights: Mapping[str, torch.Tensor] | None = None,
    folder: Path | None = None,
    input_shapes: Shapes | None = None,
) -> Graph:
    """Import a model from a file or a message; the source is never changed.

    Args:
        check: let the ONNX checker see the model first.
        weights: the values of initializers of the main graph whose bytes the message does not hold; they are shared,
            not copied.
        folder: where the external data of a message lie; those of a file lie beside it.
        input_shapes: per input its sizes, names of dimensions, or None where the model's stays (see `input_shapes`).

    Raises:
        InvalidInput: the given shapes do not fit the model.
        InvalidModel: the file is missing or unreadable, is not an ONNX model, or is rejected by our checks or ONNX's.
    """
    try:
        graph = _load(source, check, weights or {}, folder)
    except UnicodeError as error:
        raise InvalidModel(f"the model holds a name or text that is not UTF-8: {error}") from error
    if input_shapes:
        override(graph, input_shapes)
    return graph


def _load(
    source: str | os.PathLike[str] | ModelProto,
    check: bool,
    weights: Mapping[str, torch.Tensor],
    folder: Path | None,
) -> Graph:
    if isinstance(source, ModelProto):
        proto = source
        files = check_message(proto, folder, weights)
        if check:
            _check(None, _without_data(proto, weights) if weights or files else proto)
    else:
        content = _read(Path(source))
        folder = Path(source).resolve().parent
        proto = _parse(content, Path(source))
        files = _checked(proto, Path(source), folder, weights)
        size = len(content)
        if check and size <= _CHECKED_BYTES:
            _check(Path(source), Path(source) if files else content)
        del content
        if check and size > _CHECKED_BYTES:
            _check(Path(source), _without_data(proto, weights))
    record = ModelRecord(without_graph_body(proto), folder, dangling=_dangling(proto.graph))
    functions = {key_of(item.domain, item.name, item.overload): item for item in proto.functions}
    model = Model(folder, weights, proto.ir_version, functions)
    record.extra["inferred"] = undeclared_types(proto)
    record.files = frozenset(files)
    graph = Importer(model, record.opsets).main(proto.graph, record)
    settle(graph)
    return graph


def _checked(proto: ModelProto, path: Path, folder: Path, elsewhere: Collection[str] = ()) -> set[Path]:
    """The files of external data; errors name the model's file."""
    try:
        return check_message(proto, folder, elsewhere)
    except InvalidModel as error:
        raise InvalidModel(f"{path}: {error}") from error


def _dangling(body: GraphProto) -> frozenset[str]:
    """Names that have a type but no value, as tools leave them when they remove nodes."""
    live = {name for node in body.node for name in node.output}
    live.update(value.name for value in body.input)
    live.update(tensor.name for tensor in body.initializer)
    return frozenset(value.name for value in body.value_info if value.name not in live)


def _read(path: Path) -> bytes:
    if "\0" in str(path):
        raise InvalidModel(f"{str(path)!r} holds a zero byte, which no file name can have")
    if not path.exists():
        raise InvalidModel(f"{path}: no such file; expected an ONNX model")
    if path.is_dir():
        raise InvalidModel(f"{path} is a folder; expected an ONNX model file")
    if path.is_char_device() or path.is_block_device():
        raise InvalidModel(f"{path} is a device; expected an ONNX model file")
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise InvalidModel(
                f"{path} holds {size} bytes, and a protobuf message at most {_MOST_BYTES}; larger models keep their "
                "weights in external data"
            )
        return path.read_bytes()
    except OSError as error:
        raise InvalidModel(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(content: bytes, path: Path) -> ModelProto:
    proto = ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        if "MaxDepth" in str(error) or "recursion" in str(error):
            raise InvalidModel(
                f"{path}: its sub-graphs are nested too deeply; at most {DEPTH_LIMIT} are supported"
            ) from error
        if found := other_kind(content):
            raise InvalidModel(f"{path} is not an ONNX model but {found}") from error
        raise InvalidModel(
            f"{path} is not an ONNX model, or is truncated ({len(content)} bytes): {error}; expected a ModelProto"
        ) from error
    if not content:
        raise InvalidModel(f"{path} is not an ONNX model: the file is empty")
    if not proto.ir_version or not proto.HasField("graph"):
        raise InvalidModel(f"{path} is not an ONNX model: it holds no graph ({len(content)} bytes)")
    return proto


def _check(path: Path | None, content: ModelProto | bytes | Path) -> None:
    """Let the ONNX checker see the model; it finds external data from a path alone."""
    try:
        onnx.checker.check_model(content)
    except (onnx.checker.ValidationError, EncodeError, ValueError, RuntimeError) as error:
        where = "the model" if path is None else str(path)
        reason = " ".join(str(error).split())
        text = f"{where} is not a valid ONNX model; the ONNX checker says: {reason}{_advice(reason)}"
        raise InvalidModel(text) from error


def _advice(reason: str) -> str:
    """What to do about what the checker says; "" where that is clear, or not known."""
    if "ir_version" in reason and "higher" in reason:
        return f" Install a newer onnx than {onnx.__version__}, or export the model for an older one."
    found = re.search(r"No Op registered for (\S+)", reason)
    if found is None:
        return ""
    since = [schema.since_version for schema in onnx.defs.get_all_schemas_with_history() if schema.name == found[1]]
    if since:
        return f" {found[1]} is an operator since version {min(since)} of its operator set."
    near = difflib.get_close_matches(found[1], {schema.name for schema in onnx.defs.get_all_schemas()}, cutoff=0.7)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _without_data(proto: ModelProto, elsewhere: Collection[str]) -> ModelProto:
    """The model with empty tensors in the place of large ones and those whose bytes lie elsewhere, for the checker.

    What the bytes are is no matter of the checker: `check_message` has compared them with the shapes.
    """
    copied = without_graph_body(proto)
    copied.graph.node.extend(proto.graph.node)
    copied.graph.sparse_initializer.extend(proto.graph.sparse_initializer)
    for tensor in proto.graph.initializer:
        if tensor.name in elsewhere or tensor.data_location == TensorProto.EXTERNAL or len(tensor.raw_data) > _SMALL:
            copied.graph.initializer.append(_stand_in(tensor))
        else:
            copied.graph.initializer.append(tensor)
    for tensor in inner_tensors(copied):
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(_stand_in(tensor))
    return copied


def _stand_in(tensor: TensorProto) -> TensorProto:
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0], raw_data=b"")


def foreign_operators(graph: Graph) -> str:
    """What a user should know about operators of no known domain; "" when there are none."""
    from fxopt.ir.onnx.op import OnnxOp

    found: dict[str, None] = {}
    for node in graph.calls():
        target = node.target
        if not isinstance(target, OnnxOp) or target.has_reference or "_function" in node.kwargs:
            continue
        if target.domain not in _KNOWN_DOMAINS:
            found[f"{target.domain}.{target.op_type}"] = None
    if not found:
        return ""
    return f"operators of domains that fxopt does not know are kept as they are: {', '.join(found)}"


_KNOWN_DOMAINS = {
    "",
    "ai.onnx.ml",
    "ai.onnx.preview",
    "ai.onnx.preview.training",
    "com.microsoft",
    "com.ms.internal.nhwc",
}
