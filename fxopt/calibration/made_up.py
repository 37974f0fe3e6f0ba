"""Random calibration data: for trying things out, and where there is nothing better."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch

from fxopt.calibration.checks import Sample, Warn, check_shape, is_integer
from fxopt.calibration.lookups import rows_looked_up
from fxopt.errors import InvalidInput, InvalidOption, unknown
from fxopt.ir.graph import Graph, ValueSpec

RANDOM_SAMPLES = 16
RANDOM_DIM = 16  # size of a dynamic dimension other than the first one
_INT_RANGE = (0, 2)  # where the model does not show how large an index may be


def random_samples(
    graph: Graph,
    samples: int = RANDOM_SAMPLES,
    batch_size: int = 1,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    warn: Warn = warnings.warn,
) -> list[Sample]:
    """Seeded random batches: normal floats, even booleans, and integers below what the model can look up."""
    check_shapes_option(input_shapes or {}, graph.inputs)
    sizes = _sizes(graph.inputs, batch_size, input_shapes or {}, warn)
    generator = torch.Generator().manual_seed(seed)
    ranges = {spec.name: _range(graph, index, spec, warn) for index, spec in enumerate(graph.inputs)}
    warn("calibration data are random: ranges and errors found with them may differ from those of real data")
    return [
        {spec.name: _random(spec, sizes[spec.name], ranges[spec.name], generator) for spec in graph.inputs}
        for _ in range(samples)
    ]


def check_shapes_option(shapes: Mapping[str, Sequence[int]], inputs: Sequence[ValueSpec]) -> None:
    """Raise unless each shape names an input and agrees with its fixed dimensions."""
    known = {spec.name: spec for spec in inputs}
    for name, shape in shapes.items():
        if name not in known:
            raise InvalidOption(f"input shape: {unknown('model input', name, known)}")
        try:
            check_shape(tuple(shape), known[name], {}, f"input shape of {name!r}")
        except InvalidInput as error:
            raise InvalidOption(str(error)) from error


def _sizes(
    inputs: Sequence[ValueSpec], batch_size: int, given: Mapping[str, Sequence[int]], warn: Warn
) -> dict[str, tuple[int, ...]]:
    named: dict[str, int] = {}
    for spec in inputs:
        for dim, size in zip(spec.shape or (), given.get(spec.name, ()), strict=False):
            if isinstance(dim, str):
                named[dim] = size
    shapes = {}
    for spec in inputs:
        if spec.name in given:
            shapes[spec.name] = tuple(given[spec.name])
            continue
        if spec.shape is None:
            raise InvalidInput(
                f"input {spec.name!r} has no shape; give --input-shape {spec.name}:1,... for random data"
            )
        shape = []
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                shape.append(dim)
                continue
            size = named.get(dim or "", batch_size if axis == 0 else RANDOM_DIM)
            if axis and (dim or "") not in named:
                warn(f"input {spec.name!r}: dynamic dimension {dim or axis} is taken as {size}; --input-shape sets it")
            if dim is not None:
                named[dim] = size
            shape.append(size)
        shapes[spec.name] = tuple(shape)
    return shapes


def _range(graph: Graph, index: int, spec: ValueSpec, warn: Warn) -> tuple[int, int]:
    if spec.dtype is None:
        raise InvalidInput(f"input {spec.name!r} is not a tensor of numbers; random data cannot be made for it")
    if not is_integer(spec.dtype):
        return _INT_RANGE
    bound = rows_looked_up(graph, index)
    low, high = (0, bound) if bound is not None else _INT_RANGE
    found = "rows of the table that it indexes" if bound is not None else "the model shows no bound; give real data"
    warn(f"input {spec.name!r}: random integers from {low} to {high - 1} ({found})")
    return low, high


def _random(
    spec: ValueSpec, shape: tuple[int, ...], bounds: tuple[int, int], generator: torch.Generator
) -> torch.Tensor:
    assert spec.dtype is not None
    if spec.dtype.is_complex or spec.dtype.is_floating_point:
        drawn = torch.randn(shape, generator=generator, dtype=torch.cfloat if spec.dtype.is_complex else torch.float32)
        return drawn.to(spec.dtype)
    if spec.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    limits = torch.iinfo(spec.dtype)
    low, high = max(bounds[0], limits.min), min(bounds[1], math.floor(limits.max))
    return torch.randint(low, max(high, low + 1), shape, generator=generator).to(spec.dtype)
