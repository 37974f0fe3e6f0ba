"""Shapes of inputs given from outside: fix, name or rename the dimensions of an ONNX graph's inputs.

A name stands for one size in the whole model, so a size given for one of its places holds for all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import onnx

from fxopt.errors import InvalidInput, InvalidOption, unknown
from fxopt.ir.graph import Dim, Graph, ValueSpec

Shapes = Mapping[str, Sequence[Dim]]  # per input: a size, a name, or None to leave the dimension as it is

MOST = 1 << 45  # elements of an input; more than any memory holds
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")


def parse(texts: Iterable[str], option: str = "--input-shape") -> dict[str, tuple[Dim, ...]]:
    """`x:1,3,224,224` or `ids:batch,?` per input: sizes, names, and `?` for a dimension that stays as it is.

    Raises:
        InvalidOption: a text has another form, a size is not positive or absurd, or an input comes twice.
    """
    shapes: dict[str, tuple[Dim, ...]] = {}
    for text in texts:
        name, colon, dims = text.rpartition(":")
        if not colon or not name:
            raise InvalidOption(f"{option} {text}: expected NAME:DIMENSIONS, as in x:1,3,224,224 or ids:batch,128")
        if name in shapes:
            raise InvalidOption(f"{option} {text}: the shape of input {name!r} is given twice")
        inner = dims.strip().removeprefix("[").removesuffix("]").strip()
        shapes[name] = tuple(_dim(part.strip(), f"{option} {text}") for part in inner.split(",")) if inner else ()
        if (count := elements(shapes[name])) > MOST:
            raise InvalidOption(f"{option} {text}: {count} elements; expected at most {MOST}, more than memory holds")
    return shapes


def elements(shape: Iterable[object]) -> int:
    """The product of the sizes that are given."""
    return math.prod(dim for dim in shape if isinstance(dim, int))


def _dim(part: str, where: str) -> Dim:
    if part == "?":
        return None
    if _NAME.fullmatch(part):
        return part
    if not re.fullmatch(r"\d+", part, re.ASCII):
        raise InvalidOption(f"{where}: {part!r} is neither a whole number nor a name; expected a size, a name or `?`")
    if int(part) < 1:
        raise InvalidOption(f"{where}: a size of {part}; expected 1 or more")
    return int(part)


def override(graph: Graph, shapes: Shapes) -> None:
    """Give the inputs of an ONNX graph these shapes, in its signature and in the file that it is written to.

    Types that were inferred before are dropped; `ir.shapes.infer` finds the new ones.

    Raises:
        InvalidInput: an input is unknown, a rank differs, a size contradicts one that the model or another shape
            fixes, or a dimension is neither a positive integer nor a name. The graph is then unchanged.
    """
    if graph.model is None:
        raise InvalidInput("input shapes can be given for ONNX models; a PyTorch module is captured with them")
    specs = {spec.name: spec for spec in graph.inputs}
    changes: dict[str, Dim] = {}  # old name -> size or new name
    given: dict[str, tuple[Dim, ...]] = {}
    for name, shape in shapes.items():
        if name not in specs:
            raise InvalidInput(f"input shapes: {unknown('input', name, specs)}")
        given[name] = _joined(specs[name], tuple(shape), changes)
    final = {name: _followed(name, changes) for name in changes}
    _check_sizes(final, changes)

    def renamed(dims: tuple[Dim, ...] | None) -> tuple[Dim, ...] | None:
        return None if dims is None else tuple(final.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)

    graph.inputs = tuple(replace(spec, shape=renamed(given.get(spec.name, spec.shape))) for spec in graph.inputs)
    graph.outputs = tuple(replace(spec, shape=renamed(spec.shape)) for spec in graph.outputs)
    body = graph.model.proto.graph
    _rewrite(body.input, {spec.name: spec.shape for spec in graph.inputs if spec.name in given}, final)
    _rewrite(body.output, {}, final)
    _rewrite(body.value_info, {}, final)
    extra = graph.model.extra
    inferred: dict[str, ValueSpec] = extra.get("inferred", {})
    extra["inferred"] = {name: replace(spec, shape=renamed(spec.shape)) for name, spec in inferred.items()}
    for key in ("declared", "messages"):
        extra.pop(key, None)
    graph.sizes = {name: size for name, size in graph.sizes.items() if name not in final}
    for node in graph.fx.nodes:
        node.meta.pop("val", None)
        node.meta.pop("probe", None)


def _joined(spec: ValueSpec, shape: tuple[Dim, ...], changes: dict[str, Dim]) -> tuple[Dim, ...]:
    """The shape of one input; what it says about the names of the model goes into `changes`."""
    text = "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"
    for axis, dim in enumerate(shape):
        whole = isinstance(dim, int) and not isinstance(dim, bool) and dim > 0
        if not (dim is None or whole or (isinstance(dim, str) and _NAME.fullmatch(dim))):
            raise InvalidInput(
                f"input {spec.name!r}: dimension {axis} of the given shape is {dim!r}; "
                "expected a positive integer, a name or None"
            )
    if elements(shape) > MOST:
        raise InvalidInput(f"input {spec.name!r}: the given shape {text} has more than {MOST} elements")
    if spec.shape is None:
        return shape
    if len(shape) != len(spec.shape):
        raise InvalidInput(
            f"input {spec.name!r}: the given shape {text} has {len(shape)} dimensions, the model's has "
            f"{len(spec.shape)} ({spec})"
        )
    joined: list[Dim] = []
    for axis, (dim, old) in enumerate(zip(shape, spec.shape)):
        if dim is None or dim == old:
            joined.append(old)
        elif isinstance(old, int):
            raise InvalidInput(
                f"input {spec.name!r}: the given shape {text} contradicts the model, whose dimension {axis} is fixed "
                f"at {old} ({spec}); export the model with that dimension dynamic"
            )
        else:
            joined.append(dim)
            if old is not None:
                _agree(spec.name, axis, old, dim, changes)
    return tuple(joined)


def _agree(input_name: str, axis: int, old: str, dim: Dim, changes: dict[str, Dim]) -> None:
    before = changes.setdefault(old, dim)
    if before != dim:
        raise InvalidInput(
            f"input {input_name!r}: dimension {axis} is {old!r}, which another given shape makes {before}, not {dim}; "
            "one name has one size"
        )


def _followed(name: str, changes: Mapping[str, Dim]) -> Dim:
    """What a name becomes, through further names."""
    seen = {name}
    result = changes[name]
    while isinstance(result, str) and result in changes and result not in seen:
        seen.add(result)
        result = changes[result]
    return result


def _check_sizes(final: Mapping[str, Dim], changes: Mapping[str, Dim]) -> None:
    """Refuse names that are exchanged in a circle: which is which could not be said."""
    for name, dim in changes.items():
        if isinstance(dim, str) and isinstance(final[name], str) and final[name] in changes:
            raise InvalidInput(f"input shapes: the names {name!r} and {dim!r} are exchanged; give new names")


def _rewrite(
    values: Iterable[onnx.ValueInfoProto], shapes: Mapping[str, tuple[Dim, ...] | None], final: Mapping[str, Dim]
) -> None:
    """Write the dimensions that changed into the messages; the others keep all that they hold."""
    for value in values:
        if not value.type.HasField("tensor_type"):
            continue
        tensor = value.type.tensor_type
        shape = shapes.get(value.name)
        if shape is not None and not tensor.HasField("shape"):
            tensor.shape.SetInParent()
            for _ in shape:
                tensor.shape.dim.add()
        for dim, wanted in _pairs(tensor.shape.dim, shape, final):
            if isinstance(wanted, int):
                dim.dim_value = wanted
            elif isinstance(wanted, str):
                dim.dim_param = wanted


def _pairs(
    dims: Sequence[onnx.TensorShapeProto.Dimension], shape: tuple[Dim, ...] | None, final: Mapping[str, Dim]
) -> Iterator[tuple[onnx.TensorShapeProto.Dimension, Dim]]:
    for axis, dim in enumerate(dims):
        old: Dim = dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
        wanted = shape[axis] if shape is not None else final.get(old, old) if isinstance(old, str) else old
        if wanted != old:
            yield dim, wanted
