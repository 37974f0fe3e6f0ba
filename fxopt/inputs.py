"""Inputs of a model as users give them, and as a graph takes them: flat, in order, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.errors import InvalidInput, Unsupported, unknown
from fxopt.frontends.input_shapes import MOST, elements
from fxopt.ir.graph import Graph
from fxopt.ir.shapes import infer
from fxopt.options import Options

Sample = list[Any]  # one value per input of the graph


@dataclass
class Bound:
    """Positional and keyword inputs of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def bound(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments: a tuple, a dict by name, or the only input."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, Bound):
        return example_inputs.args, example_inputs.kwargs
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (list, tuple)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def flat_inputs(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Inputs in the order of the graph's: nested structures are flattened, keywords go by name."""
    names = [spec.name for spec in graph.inputs]
    if graph.call_spec is not None:
        flat: list[Any] = graph.call_spec.flatten(args, kwargs)
        return flat
    for name in kwargs:
        if name not in names:
            raise InvalidInput(f"{unknown('input', name, names)}")
        if name in names[: len(args)]:
            raise InvalidInput(f"input {name!r} was given twice, by position and by name")
    return [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]


def misfit(graph: Graph, flat: Sequence[Any]) -> str:
    """Which input does not fit the model; "" when all do."""
    sizes: dict[str, int] = {}
    for spec, value in zip(graph.inputs, flat, strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        if spec.dtype is not None and value.dtype != spec.dtype:
            given, expected = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, spec.dtype))
            return f"input {spec.name!r} has element type {given}, expected {expected}"
        if spec.shape is None:
            continue
        wanted = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape]
        pairs = list(zip(wanted, value.shape, strict=False))
        if len(wanted) != value.dim() or any(isinstance(dim, int) and dim != size for dim, size in pairs):
            shown = ", ".join("?" if dim is None else str(dim) for dim in wanted)
            return f"input {spec.name!r} has shape {list(value.shape)}, expected [{shown}]"
        sizes.update((dim, size) for dim, size in pairs if isinstance(dim, str))
    return ""


def structured(graph: Graph, results: list[Any]) -> Any:
    """The outputs in the structure of the original."""
    if graph.call_spec is not None:
        return graph.call_spec.unflatten(results)
    return results[0] if len(results) == 1 else tuple(results)


def samples_of(graph: Graph, example_inputs: Any, options: Options, notes: list[str]) -> list[Sample]:
    """Flat inputs per sample: the calibration data, else the example inputs."""
    if options.calibration is None:
        if example_inputs is None:
            return []
        args, kwargs = bound(example_inputs)
        notes.append(
            "calibrated and verified on the example inputs alone; give calibration data for a better judgement"
        )
        return [flat_inputs(graph, args, kwargs)]
    from fxopt.calibration import load

    batches = load(options.calibration, graph, seed=options.seed, input_shapes=options.input_shapes, warn=notes.append)
    if len(batches) == 1:
        notes.append("one calibration sample: it calibrates and verifies, which flatters the error")
    return [[batch[spec.name] for spec in graph.inputs] for batch in batches]


def sizes_of(graph: Graph, shapes: Mapping[str, Sequence[Any]] | None) -> dict[str, int]:
    """Sizes of named dimensions from `--input-shape`.

    Raises:
        InvalidInput: an input is unknown, a rank or a fixed size differs, or one dimension gets two sizes.
    """
    sizes: dict[str, int] = {}
    for name, shape in _named_shapes(shapes).items():
        spec = next((spec for spec in graph.inputs if spec.name == name), None)
        if spec is None:
            raise unknown("input", name, [spec.name for spec in graph.inputs])
        if spec.shape is None:
            continue
        if len(spec.shape) != len(shape):
            raise InvalidInput(f"--input-shape {name}: {len(shape)} dimensions given, the model has {spec}")
        for dim, size in zip(spec.shape, shape, strict=True):
            if not isinstance(size, int):
                continue
            if isinstance(dim, str):
                if sizes.setdefault(dim, size) != size:
                    raise InvalidInput(
                        f"--input-shape {name}: dimension {dim!r} of the model is {sizes[dim]} by another shape, "
                        f"not {size}; one name has one size"
                    )
            elif isinstance(dim, int) and dim != size:
                raise InvalidInput(f"--input-shape {name}:{list(shape)}: the model fixes {spec}")
    return sizes


def shaped(graph: Graph, shapes: Mapping[str, Sequence[Any]] | None) -> dict[str, tuple[int, ...]]:
    """The shapes that are sizes throughout; an ONNX graph takes those of unknown rank, and names of dimensions, over.

    Raises:
        InvalidInput: an input is unknown, or its rank or a fixed size differs.
    """
    wanted: dict[str, tuple[Any, ...]] = {}
    known = {spec.name: spec for spec in graph.inputs}
    for name, shape in _named_shapes(shapes).items():
        if name not in known:
            raise unknown("input", name, known)
        given = known[name].shape
        if given is None:
            wanted[name] = tuple(shape)
        elif any(isinstance(dim, str) and dim not in given for dim in shape):
            wanted[name] = tuple(dim if isinstance(dim, str) else None for dim in shape)
    if wanted:
        from fxopt.frontends.input_shapes import override

        override(graph, wanted)
    return {name: tuple(shape) for name, shape in (shapes or {}).items() if all(isinstance(dim, int) for dim in shape)}


def _named_shapes(shapes: Any) -> dict[str, tuple[Any, ...]]:
    """The shapes by input, checked as such."""
    if not isinstance(shapes or {}, Mapping):
        raise InvalidInput(
            f"input_shapes is a {type(shapes).__name__}; expected shapes by input, as in {{'x': (1, 3, 224, 224)}}"
        )
    for name, shape in (shapes or {}).items():
        if isinstance(shape, str) or not isinstance(shape, Sequence):
            raise InvalidInput(f"input_shapes: {name!r} has {shape!r}; expected a tuple, as in (1, 'n', None)")
        wrong = [size for size in shape if isinstance(size, int) and size < 1]
        if wrong:
            raise InvalidInput(f"input_shapes: {name!r} has a size of {wrong[0]}; expected 1 or more")
        if elements(shape) > MOST:
            raise InvalidInput(f"input_shapes: {name!r} has {elements(shape)} elements; expected at most {MOST}")
    return {name: tuple(shape) for name, shape in (shapes or {}).items()}


def bind_sizes(graph: Graph, sample: Sample | None, overrides: dict[str, int] | None = None) -> None:
    """Derive all types, with costs computed for the sizes of the sample."""
    sizes: dict[str, int] = {}
    if sample is not None:
        for spec, value in zip(graph.inputs, sample, strict=True):
            if not isinstance(value, torch.Tensor) or spec.shape is None:
                continue
            if value.dim() != len(spec.shape):
                raise Unsupported(f"input {spec} was given a value with {value.dim()} dimensions: {list(value.shape)}")
            for name, size in zip(spec.shape, value.shape, strict=True):
                if isinstance(name, str):
                    sizes.setdefault(name, size)
    infer(graph, {**sizes, **(overrides or {})})
