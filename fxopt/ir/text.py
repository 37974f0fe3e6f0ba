"""The text form of a graph: a Python file that can be read, run, edited, and parsed back.

    @graph(
        origin="onnx",
        inputs=[("x", "float32", ["batch", 64])],
        outputs=[("y", "float32", ["batch", 10])],
    )
    def main(x):
        w = const("k_w")                  # float32[64, 10]
        y = onnx("", "MatMul", 13)(x, w)  # float32[batch, 10]   /fc/MatMul
        return (y,)

`python graph.py [inputs.npz] [batch=4]` runs it. A variable's annotation is the node's name where Python or one of the
helpers of this module has that name. Constants lie in `constants.safetensors` beside the text. How a torch-born model's
forward is called (`Graph.call_spec`) is not part of the text: a saved folder keeps it in its manifest.

(Longer than most files here: it holds the writer, the two files, and the helpers that a text imports by name.)
"""

from __future__ import annotations

import base64
import json
import keyword
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_package
import torch
from torch import fx

from fxopt.errors import GraphSyntaxError, InvalidInput, InvalidModel, InvalidOption, NotReady, OutputError, Unsupported
from fxopt.ir.graph import Dim, Graph, Opaque, ValueSpec, label
from fxopt.ir.onnx.bodies import AttributeReference, bound
from fxopt.ir.onnx.dtypes import from_numpy, to_numpy
from fxopt.ir.onnx.lane import HOST_LIMIT, to_tensor
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.structural_hash import constant_digest, expression, is_plain, quoted, target_text, tensor_bytes
from fxopt.ir.text_parser import BODY_NAME, HELPERS, from_text, header_text, read_spec

__all__ = [
    "attribute", "const", "constants_of", "from_text", "graph", "load_text", "onnx", "opaque", "ops", "overload",
    "run_file", "save_text", "subgraph", "to_text",
]  # fmt: skip

SHARED = "constants.safetensors"


# ---- writing


def to_text(graph: Graph, *, title: str = "") -> str:
    """The graph as a Python file; linear in its size. Constants are named, not written: see `constants_of`.

    Raises:
        Unsupported: an operator, argument or constant has no text form; the message names the node.
    """
    about = ", ".join(filter(None, [f"fxopt graph {graph.name!r}", f"origin {graph.origin}", title]))
    functions = _Functions()
    functions.add(graph, "main", "")
    more = "attribute, " if any("attribute(" in line for line in functions.lines[1:]) else ""
    after = ", subgraph" if functions.count else ""
    return "\n".join([
        f'"""{_printable(about).translate(_PLAIN)}."""',
        "import math",
        "import operator",
        "",
        "import torch",
        "",
        f"from fxopt.ir.text import {more}const, graph, onnx, opaque, ops, overload, run_file{after}",
        "",
        "",
        *functions.lines,
        'if __name__ == "__main__":',
        "    run_file(main, __file__)",
        "",
    ])  # fmt: skip


class _Functions:
    """The functions of a text: bodies (`body_1`, `body_2`, ...) come before what holds them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def add(self, graph: Graph, name: str, at: str) -> None:
        """Append a graph as the function `name`; `at` is what the names of its constants begin with."""
        bodies: dict[str, str] = {}
        for target, body in bodies_of(graph).items():
            self.count += 1
            bodies[target] = f"body_{self.count}"
            self.add(body, bodies[target], f"{at}{target}.")
        names = _variables(graph)
        annotated = {
            node: f"{variable}: {quoted(node.name)}" if variable != node.name else variable
            for node, variable in names.items()
        }
        dims = DimNames(graph)
        self.lines += ["@graph(", *[f"    {option}," for option in header_text(graph, at)], ")"]
        self.lines.append(f"def {name}({', '.join([annotated[node] for node in graph.placeholders])}):")
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            try:
                line = f"    {annotated[node]} = {_right_side(graph, node, names, bodies, at)}"
            except Unsupported as error:
                raise Unsupported(f"node {node.name!r}: {error}") from error
            comment = _comment(graph, node, dims)
            self.lines.append(f"{line:<70}  # {comment}" if comment else line)
        self.lines += [f"    return {expression(graph.result_nodes, names)}", "", ""]


def bodies_of(graph: Graph) -> dict[str, Graph]:
    """The graphs that the constants of a graph are, by the constants' names."""
    targets = dict.fromkeys(str(node.target) for node in graph.fx.find_nodes(op="get_attr"))
    held = {target: graph.attribute(target) for target in targets}
    return {target: value for target, value in held.items() if isinstance(value, Graph)}


_PLAIN = str.maketrans('"\\', "'/")


def _printable(text: str) -> str:
    return "".join([char if char.isprintable() else "?" for char in text])


def _variables(graph: Graph) -> dict[fx.Node, str]:
    """A legal and unique variable for each node: its name where that is one."""
    taken = {node.name for node in graph.nodes} | HELPERS
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        name = node.name
        taken_name = name in HELPERS or BODY_NAME.fullmatch(name) is not None
        if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name) or taken_name:
            name = "".join([char if char.isascii() and char.isalnum() else "_" for char in f"{name}_"])
            name = f"_{name}" if name[0].isdigit() else name
            while name in taken:
                name += "_"
            taken.add(name)
        names[node] = name
    return names


def _right_side(graph: Graph, node: fx.Node, names: Mapping[fx.Node, str], bodies: Mapping[str, str], at: str) -> str:
    if node.op == "get_attr":
        target = str(node.target)
        if target in bodies:
            return f"subgraph({quoted(target)}, {bodies[target]})"
        return _constant(graph, target, at)
    if node.op != "call_function":
        raise Unsupported(f"{node.op} has no text form")
    target = target_text(node.target)
    args = [expression(value, names) for value in node.args]
    if target == "operator.getitem" and isinstance(node.args[0], fx.Node) and type(node.args[1]) is int:
        return f"{args[0]}[{args[1]}]"
    if all(key.isidentifier() and key.isascii() and not keyword.iskeyword(key) for key in node.kwargs):
        args += [f"{key}={expression(value, names)}" for key, value in node.kwargs.items()]
    else:
        args.append(f"**{expression(dict(node.kwargs), names)}")
    return f"{target}({', '.join(args)})"


def _constant(graph: Graph, target: str, at: str) -> str:
    value = graph.attribute(target)
    target = f"{at}{target}"
    if isinstance(value, torch.Tensor):
        return f"const({quoted(target)})"
    if isinstance(value, np.ndarray):
        return f"const({quoted(target)}, host=True)"
    kind = type(getattr(value, "proto", None))
    if not isinstance(value, Opaque) or getattr(onnx_package, kind.__name__, None) is not kind:
        raise Unsupported(f"constant {target!r} is a {type(value).__name__}, which has no text form")
    content = base64.b64encode(value.proto.SerializeToString(deterministic=True)).decode()
    return f'opaque({quoted(target)}, "{kind.__name__}", "{content}")'


def _comment(graph: Graph, node: fx.Node, dims: DimNames) -> str:
    """Type and origin of a value: `float32[batch, 10]   /fc/MatMul > fuse-rms-norm`."""
    value = graph.attribute(str(node.target)) if node.op == "get_attr" else node.meta.get("val")
    kind = _type_text(value, dims.of(node) if isinstance(node.meta.get("val"), torch.Tensor) else None)
    origins: tuple[str, ...] = node.meta.get("provenance") or (label(node),)
    origin = " > ".join(origins) if origins != (node.name,) else ""
    return _printable("   ".join(filter(None, [kind, origin])))


def _type_text(value: Any, shape: Sequence[Any] | None = None) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        sizes = ", ".join(["?" if size is None else str(size) for size in (value.shape if shape is None else shape)])
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_type_text, value))})"
    return str(value) if isinstance(value, (int, torch.SymInt)) else ""


class DimNames:
    """Which names of the signature the sizes of values have, from the inputs' `meta["val"]` and `meta["probe"]`."""

    def __init__(self, graph: Graph) -> None:
        found: dict[tuple[str, str], set[str]] = {}
        for node, spec in zip(graph.placeholders, graph.inputs, strict=False):
            for key, name in zip(self._keys(node), spec.shape or (), strict=False):
                if isinstance(name, str):
                    found.setdefault(key, set()).add(name)
        self.names = {key: min(names) for key, names in found.items() if len(names) == 1}

    @staticmethod
    def _keys(node: fx.Node) -> list[tuple[str, str]]:
        shape = getattr(node.meta.get("val"), "shape", ())
        probe = getattr(node.meta.get("probe"), "shape", shape)
        return [(str(size), str(other)) for size, other in zip(shape, probe, strict=False)]

    def of(self, node: fx.Node) -> tuple[Dim, ...]:
        """The shape of a tensor: fixed sizes as numbers, dynamic ones by name or symbol, None where it has none."""
        return tuple(map(self._dim, self._keys(node)))

    def _dim(self, key: tuple[str, str]) -> Dim:
        if not key[0].isdigit():
            return self.names.get(key, key[0])
        return int(key[0]) if key[0] == key[1] else self.names.get(key)


# ---- files


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
        with _replacing(own if beside else shared) as scratch, _replacing(path) as text:
            text.write_text(to_text(graph, title=title), encoding="utf-8", newline="\n")
            if constants or not beside:
                _write_tensors(scratch, constants, digests=share)
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
    return from_text(_read(path), _read_tensors(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidModel(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
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


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], digests: bool) -> None:
    """A safetensors file, streamed: nothing is copied that is contiguous. Other dtypes are stored as bytes."""
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
    text = json.dumps({"__metadata__": {"fxopt": json.dumps(information)}, **header}).encode()
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


def _information(path: Path) -> dict[str, dict[str, Any]]:
    with _opened(path) as file:
        return {"digests": {}, "same": {}, "bytes": {}, **json.loads((file.metadata() or {}).get("fxopt", "{}"))}


def _read_tensors(text: Path) -> dict[str, torch.Tensor]:
    """The constants of a text: its own come before the folder's."""
    found: dict[str, torch.Tensor] = {}
    for path in (text.with_name(SHARED), text.with_suffix(".safetensors")):
        if not path.exists():
            continue
        information = _information(path)
        with _opened(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, (dtype, shape) in information["bytes"].items():
            tensors[name] = tensors[name].clone().view(getattr(torch, dtype)).reshape(shape)
        found.update(tensors)
        found.update({name: tensors[source] for name, source in information["same"].items()})
    return found


# ---- the helpers that a text calls when it runs as Python

_RUNNING: ContextVar[tuple[str, Mapping[str, torch.Tensor]] | None] = ContextVar("running", default=None)
_ATTRIBUTES: ContextVar[Mapping[str, Any] | None] = ContextVar("attributes", default=None)
attribute = AttributeReference


class GraphFunction:
    """What `@graph` makes of a function; calling it runs the function on the constants beside its file."""

    def __init__(self, function: Callable[..., tuple[Any, ...]], header: Mapping[str, Any]) -> None:
        self.function = function
        self.origin: str = header["origin"]
        self.sizes: dict[str, int] = header.get("sizes", {})
        self.captures: tuple[str, ...] = tuple(header.get("captures", ()))
        self.inputs, self.outputs = ([read_spec(entry) for entry in header[key]] for key in ("inputs", "outputs"))

    def __call__(self, *inputs: Any) -> list[Any]:
        constants = _read_tensors(Path(self.function.__code__.co_filename))
        token = _RUNNING.set((self.origin, constants))
        try:
            with torch.no_grad():
                return [to_tensor(value) for value in self.function(*inputs)]
        finally:
            _RUNNING.reset(token)

    @property
    def formals(self) -> int:
        """The number of inputs beside the captured values, when this is a body."""
        return len(self.inputs) - len(self.captures)

    def run(self, inputs: list[Any], attributes: Mapping[str, Any]) -> list[Any]:
        """The outputs of a body while the function around it runs."""
        token = _ATTRIBUTES.set(attributes)
        try:
            return list(self.function(*inputs))
        finally:
            _ATTRIBUTES.reset(token)


def onnx(domain: str, op_type: str, since_version: int) -> Callable[..., Any]:
    """An ONNX operator that takes functions of this file as its sub-graphs."""
    target = OnnxOp(domain, op_type, since_version)

    def body(value: Any) -> GraphFunction | None:
        return value if isinstance(value, GraphFunction) else None

    return lambda *inputs, **kwargs: target(*inputs, **bound(kwargs, body, _ATTRIBUTES.get() or {}))


def subgraph(name: str, body: GraphFunction) -> GraphFunction:
    """The function of this file that is the constant `name`."""
    return body


def graph(**header: Any) -> Callable[[Callable[..., tuple[Any, ...]]], GraphFunction]:
    """Declare the signature of the function `main` of a text."""
    return lambda function: GraphFunction(function, header)


def const(name: str, *, host: bool = False) -> Any:
    """The constant of this name, while the graph runs; small int64 constants of ONNX graphs are host arrays."""
    running = _RUNNING.get()
    if running is None:
        raise NotReady(f"const({name!r}) has a value only while the graph runs; call main(*inputs)")
    origin, constants = running
    value = constants[name]
    small = origin == "onnx" and value.dtype == torch.int64 and value.numel() <= HOST_LIMIT
    return to_numpy(value) if host or small else value


def opaque(name: str, kind: str, content: str) -> Opaque:
    """A constant that torch cannot hold: a protobuf message of onnx, in base64."""
    return Opaque(getattr(onnx_package, kind).FromString(base64.b64decode(content)))


def overload(namespace: str, name: str, overload: str) -> Any:
    """An operator overload whose name is no Python identifier."""
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


class _Ops:
    """`ops.name`: the fxopt operators; host arrays become tensors."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        from fxopt.ir.op import all_ops

        target = all_ops()[name].target
        return lambda *args, **kwargs: target(*map(to_tensor, args), **{key: to_tensor(kwargs[key]) for key in kwargs})


ops = _Ops()


def run_file(function: GraphFunction, file: str | Path, arguments: Sequence[str] | None = None) -> list[Any]:
    """Run a text on the inputs of an `.npz` file (by name), or on random ones; print types and statistics.

    Args:
        arguments: the command line: `inputs.npz` and sizes of named dimensions, `batch=4` (2 when not given).

    Raises:
        InvalidInput: the inputs do not fit the signature.
        MissingReference: an operator has no torch reference.
    """
    path = Path(file)
    inputs = _inputs(function, sys.argv[1:] if arguments is None else arguments)
    try:
        results = from_text(_read(path), _read_tensors(path)).run(inputs)
    except GraphSyntaxError as error:
        print(f"{path.name} was edited, so it runs as plain Python ({error})")
        results = function(*inputs)
    for kind, specs, values in (("input", function.inputs, inputs), ("output", function.outputs, results)):
        for spec, value in zip(specs, values, strict=True):
            print(f"{kind} {spec.name}: {_summary(value)}")
    return results


def _inputs(function: GraphFunction, arguments: Sequence[str]) -> list[Any]:
    pairs = [text.rpartition("=") for text in arguments]
    given = {name: int(size) for name, _, size in pairs if name and size.isdigit()}
    files = [text for text in arguments if text.endswith(".npz")]
    if len(given) + len(files) != len(arguments) or len(files) > 1:
        raise InvalidInput(f"arguments {' '.join(arguments)!r}: expected [inputs.npz] [dimension=size]...")
    if not files:
        sizes = {**function.sizes, **given}
        return [_random(spec, sizes, seed) for seed, spec in enumerate(function.inputs)]
    with np.load(files[0]) as data:
        missing = [spec.name for spec in function.inputs if spec.name not in data]
        if missing:
            raise InvalidInput(f"{Path(files[0]).name} holds {', '.join(data.files)}, but not the inputs {missing}")
        return [from_numpy(data[spec.name]) for spec in function.inputs]


def _random(spec: ValueSpec, sizes: Mapping[str, int], seed: int) -> torch.Tensor:
    """Seeded values of the input's type: normal floats, integers 0 and 1."""
    if spec.dtype is None or spec.shape is None:
        raise InvalidInput(f"input {spec.name}: random values need an element type and a shape; give an .npz file")
    shape = [dim if isinstance(dim, int) else sizes.get(dim or "", 2) for dim in spec.shape]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    whole = not (spec.dtype.is_floating_point or spec.dtype.is_complex)
    return (values > 0).to(spec.dtype) if whole else values.to(spec.dtype)


def _summary(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{value!r:.100}"
    kind = _type_text(value)
    if not value.numel():
        return kind
    numbers = (value.abs() if value.is_complex() else value).double()
    lowest, highest = numbers.aminmax()
    bad = int((~numbers.isfinite()).sum())
    note = f"  {bad} not finite" if bad else ""
    spread = numbers.std(correction=0)
    return f"{kind}  mean {numbers.mean():.6g}  std {spread:.6g}  min {lowest:.6g}  max {highest:.6g}{note}"
