"""`lower`: an ONNX graph as a graph of aten operators."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx.traceback as traceback
from torch.export import Dim, ExportedProgram

from fxopt.errors import Unsupported, unknown
from fxopt.ir.graph import Graph, ValueSpec
from fxopt.ir.lower.build import built
from fxopt.ir.lower.quiet import quiet
from fxopt.ir.lower.ranges import check_ranges
from fxopt.ir.lower.suggestions import narrowed
from fxopt.ir.lower.trace import Traced
from fxopt.ir.masks import carry

_ATTEMPTS = 4  # each may narrow the range of a dimension to what the model takes
_SIZE = 4  # of a named dimension when no size is known: more than 1, which torch would take for a constant


def lower(graph: Graph, *, sizes: Mapping[str, int] | None = None, fixed: Collection[str] = ()) -> Graph:
    """The graph with aten and fxopt operators only (origin "torch"); weights are shared, named dimensions stay dynamic.

    Every node's provenance begins with the ONNX node that it comes from.

    Args:
        sizes: the sizes of named dimensions to trace with (at least 2); default: those of the graph.
        fixed: named dimensions that become fixed, at these sizes (an open size is called `<input>_<axis>`).

    Raises:
        Unsupported: an operator cannot be written in aten (the message names the node), or a dimension cannot stay
            dynamic.
        UnknownName: `fixed` names no dimension.
    """
    if graph.origin == "torch":
        return graph.copy()
    inputs = tuple(map(_named, graph.inputs))
    names = dict.fromkeys(dim for spec in inputs for dim in spec.shape or () if isinstance(dim, str))
    for name in fixed:
        if name not in names:
            raise unknown("dimension", name, names)
    given = {**graph.sizes, **(sizes or {})}
    chosen = {name: given.get(name, _SIZE) if name in fixed else max(2, given.get(name, _SIZE)) for name in names}
    traced = Traced(graph)
    examples = tuple(_example(spec, chosen) for spec in inputs)
    dims = _dims([name for name in names if name not in fixed])
    asked = tuple(_axes(spec, dims) for spec in inputs)
    with quiet(), torch.no_grad(), traceback.preserve_node_meta():
        exported, taken = _exported(graph, traced, examples, asked)
        exported = _functional(graph, exported)
    lowered = built(graph, inputs, traced, exported, asked, {dim.__name__: name for name, dim in dims.items()})
    carry(graph, lowered)
    if taken is not asked:
        check_ranges(graph, lowered, inputs, asked, taken, chosen)
    return lowered


def _exported(graph: Graph, traced: Traced, examples: tuple[torch.Tensor, ...], asked: Any) -> tuple[Any, Any]:
    """The program, and the dynamic axes with the ranges that torch demands."""
    axes = asked
    for _ in range(_ATTEMPTS):
        try:
            return torch.export.export(traced, examples, dynamic_shapes=(axes,), strict=False), axes
        except Exception as error:
            refined = narrowed(error, (axes,))
            if refined is None:
                raise Unsupported(_reason(graph, traced, error)) from error
            axes = refined[0]
    raise Unsupported(f"{graph.name}: the ranges of its dynamic dimensions contradict each other")


def _functional(graph: Graph, exported: ExportedProgram) -> ExportedProgram:
    try:
        made: ExportedProgram = exported.run_decompositions({})
        return made
    except Exception as error:
        raise Unsupported(f"{graph.name}: torch cannot make its aten graph functional: {_line(error)}") from error


def _named(spec: ValueSpec) -> ValueSpec:
    """The input with a name for every size that the file leaves open."""
    if spec.dtype is None or spec.shape is None:
        raise Unsupported(f"input {spec.name!r} is no tensor of known type; a torch graph takes tensors only")
    dims = (f"{spec.name}_{axis}" if dim is None else dim for axis, dim in enumerate(spec.shape))
    return ValueSpec(spec.name, spec.dtype, tuple(dims))


def _example(spec: ValueSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    shape = [sizes[dim] if isinstance(dim, str) else int(dim or 0) for dim in spec.shape or ()]
    return torch.zeros(shape, dtype=spec.dtype)


def _dims(names: Sequence[str]) -> dict[str, Any]:
    """A `Dim` for each named dimension that stays dynamic."""
    made: dict[str, Any] = {}
    for name in names:
        plain = re.sub(r"\W", "_", name) if name.isascii() else ""
        free = plain if plain.isidentifier() and not plain.startswith("_") else f"dim_{len(made)}"
        while any(dim.__name__ == free for dim in made.values()):
            free += "_"
        made[name] = Dim(free)
    return made


def _axes(spec: ValueSpec, dims: Mapping[str, Any]) -> dict[int, Any]:
    return {axis: dims[dim] for axis, dim in enumerate(spec.shape or ()) if isinstance(dim, str) and dim in dims}


def _reason(graph: Graph, traced: Traced, error: Exception) -> str:
    if isinstance(error, Unsupported):
        return str(error)
    if traced.where:
        return f"node {' > '.join(map(repr, traced.where))} cannot be lowered to aten: {_line(error)}"
    return f"{graph.name} cannot be lowered to aten: {_line(error)}"


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"
