"""The helpers that a text calls when it runs as Python (`fxopt.ir.text`)."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_package
import torch

from fxopt.errors import GraphSyntaxError, InvalidInput, NotReady
from fxopt.ir.graph import Opaque, ValueSpec
from fxopt.ir.onnx.bodies import AttributeReference, bound
from fxopt.ir.onnx.dtypes import from_numpy, to_numpy
from fxopt.ir.onnx.lane import HOST_LIMIT, to_tensor
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.text_files import read_file, read_tensors
from fxopt.ir.text_header import read_spec
from fxopt.ir.text_parser import from_text
from fxopt.ir.text_writer import type_text

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
        constants = read_tensors(Path(self.function.__code__.co_filename))
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
        results = from_text(read_file(path), read_tensors(path)).run(inputs)
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
    kind = type_text(value)
    if not value.numel():
        return kind
    numbers = (value.abs() if value.is_complex() else value).double()
    lowest, highest = numbers.aminmax()
    bad = int((~numbers.isfinite()).sum())
    note = f"  {bad} not finite" if bad else ""
    spread = numbers.std(correction=0)
    return f"{kind}  mean {numbers.mean():.6g}  std {spread:.6g}  min {lowest:.6g}  max {highest:.6g}{note}"
