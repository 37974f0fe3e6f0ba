"""Texts of graphs in files, their constants in safetensors files beside them (`fxopt.ir.text`)."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxopt.errors import InvalidModel, InvalidOption, OutputError, Unsupported
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.dtypes import from_numpy
from fxopt.ir.structural_hash import constant_digest, is_plain, tensor_bytes
from fxopt.ir.text_parser import from_text
from fxopt.ir.text_writer import bodies_of, to_text

SHARED = "constants.safetensors"


def constants_of(graph: Graph) -> dict[str, torch.Tensor]:
    """The tensors that a text of the graph names, by name; small host arrays too, and those of bodies."""
    found: dict[str, torch.Tensor] = {}
    for node in graph.fx.find_nodes(op="get_attr"):
        value = graph.attribute(str(node.target))
        if isinstance(value, (torch.Tensor, np.ndarray)):
            found[str(node.target)] = value if isinstance(value, torch.Tensor) else from_numpy(value)
    for target, body in bodies_of(graph).items():
        found.update({f"{target}.{name}": value for name, value in constants_of(body).items()})
    return found


def save_text(
    graph: Graph, folder: str | os.PathLike[str], stem: str = "graph", *, title: str = "", share: bool = False
) -> Path:
    """Write `<folder>/<stem>.py` and the constants beside it; returns the path of the text.

    Both are written to temporary names and renamed. With `share`, the folder holds several graphs: constants that
    `constants.safetensors` has already are not written again, the others go to `<stem>.safetensors`.

    Raises:
        Unsupported: something has no text form, or a constant no plain bytes.
        OutputError: the files cannot be written.
    """
    path, own, shared = (Path(folder) / name for name in (f"{stem}.py", f"{stem}.safetensors", SHARED))
    if own == shared:
        raise InvalidOption(f"a graph's file cannot be called {stem!r}: {SHARED} holds the constants of all graphs")
    constants = constants_of(graph)
    beside = share and shared.exists()
    if beside:
        held = _information(shared)["digests"]
        constants = {name: tensor for name, tensor in constants.items() if held.get(name) != constant_digest(tensor)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(own if beside else shared) as scratch, replacing(path) as text:
            text.write_text(to_text(graph, title=title), encoding="utf-8", newline="\n")
            if constants or not beside:
                write_tensors(scratch, constants, digests=share)
            path.unlink(missing_ok=True)  # never an old text beside new constants
            own.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def load_text(folder: str | os.PathLike[str], stem: str = "graph") -> Graph:
    """The graph that `save_text` wrote; its constants are memory-mapped.

    Raises:
        InvalidModel: a file is missing or unreadable.
        GraphSyntaxError: the text is not of the form.
    """
    path = Path(folder) / f"{stem}.py"
    return from_text(read_file(path), read_tensors(path))


def read_file(path: Path) -> str:
    """The content of a text.

    Raises:
        InvalidModel: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidModel(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name; what was written there takes the place of `path` at the end, or vanishes after an error."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        if scratch.exists():
            os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


_CODES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, *, digests: bool = False
) -> None:
    """A safetensors file, streamed: nothing is copied that is contiguous. Other dtypes are stored as bytes.

    Args:
        metadata: texts for its header.
        digests: write the digest of each tensor into the header.
    """
    information: dict[str, dict[str, Any]] = {"digests": {}, "same": {}, "bytes": {}}
    first: dict[Any, str] = {}
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # keeps every tensor aligned
        if not is_plain(tensor):
            raise Unsupported(f"constant {name!r}: a {type(tensor).__name__} ({tensor.layout}) has no plain bytes")
        if digests:
            information["digests"][name] = constant_digest(tensor)
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        key = place if tensor.numel() else name
        if first.setdefault(key, name) != name:
            information["same"][name] = first[key]
            continue
        plain = tensor.dtype in _CODES
        if not plain:
            information["bytes"][name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        end = offset + tensor.numel() * tensor.itemsize
        shape = list(tensor.shape) if plain else [end - offset]
        header[name] = {"dtype": _CODES.get(tensor.dtype, "U8"), "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": {**(metadata or {}), "fxopt": json.dumps(information)}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in header:
            file.write(tensor_bytes(tensors[name]))


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise InvalidModel(f"{path} cannot be read: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file.

    Raises:
        InvalidModel: it cannot be read.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


def _information(path: Path) -> dict[str, dict[str, Any]]:
    return {"digests": {}, "same": {}, "bytes": {}, **json.loads(read_metadata(path).get("fxopt", "{}"))}


def read_tensors(text: Path) -> dict[str, torch.Tensor]:
    """The constants of a text: its own come before the folder's."""
    found: dict[str, torch.Tensor] = {}
    for path in (text.with_name(SHARED), text.with_suffix(".safetensors")):
        if not path.exists():
            continue
        found.update(tensors_in(path))
    return found


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """What `write_tensors` wrote, memory-mapped.

    Raises:
        InvalidModel: it cannot be read.
    """
    information = _information(path)
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, (dtype, shape) in information["bytes"].items():
        tensors[name] = tensors[name].clone().view(getattr(torch, dtype)).reshape(shape)
    return tensors | {name: tensors[source] for name, source in information["same"].items()}
