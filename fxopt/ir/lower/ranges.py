"""Ranges that torch demanded of dynamic dimensions: outside of them the model must fail, or compute the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.export import Dim

from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, ValueSpec
from fxopt.ir.verify import synthetic_sample

_TOLERANCE = 1e-4  # relative, of the largest element: what another order of summation may change


def check_ranges(
    graph: Graph, lowered: Graph, inputs: tuple[ValueSpec, ...], before: Any, after: Any, sizes: Mapping[str, int]
) -> None:
    """Compare the graphs at sizes that the lowered one was not traced for.

    Args:
        inputs: the signature with a name for every dynamic dimension.
        before, after: the dynamic axes of the inputs as asked for, and as torch took them.
        sizes: those of the trace.

    Raises:
        Unsupported: the model takes such a size, and the lowered graph computes something else there.
    """
    for name, size in _outside(inputs, before, after, sizes):
        sample = synthetic_sample(inputs, {**sizes, name: size})
        expected = _results(graph, sample)
        if expected is None:
            continue  # the model does not take this size either
        found = _results(lowered, sample)
        if found is None or not all(map(_equal, expected, found)):
            raise Unsupported(
                f"{graph.name} cannot be lowered with dimension {name!r} dynamic: torch fixed a decision for sizes "
                f"like {sizes[name]}, and at {size} the model computes something else; give fixed=[{name!r}]"
            )


def _outside(
    inputs: tuple[ValueSpec, ...], before: Any, after: Any, sizes: Mapping[str, int]
) -> Iterator[tuple[str, int]]:
    """(dimension, size outside what torch took it for)."""
    seen: dict[Any, str] = {}
    for spec, asked, taken in zip(inputs, before, after, strict=True):
        for axis, old in asked.items():
            new, name = taken.get(axis), str((spec.shape or ())[axis])
            if isinstance(new, Dim) and type(new) is type(old):
                if getattr(new, "min", 0) > max(1, getattr(old, "min", 0)):
                    yield name, new.min - 1
                if getattr(new, "max", None) != getattr(old, "max", None):
                    yield name, new.max + 1
            else:
                yield name, sizes[name] + 1  # derived from another one, or fixed
            key = getattr(new, "__name__", id(new))
            if seen.setdefault(key, name) != name:
                yield name, sizes[name] + 1  # equal to another one


def _results(graph: Graph, sample: list[torch.Tensor] | None) -> list[Any] | None:
    if sample is None:
        return None
    try:
        return graph.run(sample)
    except Exception:  # a model may fail in any way for a size that it was not made for
        return None


def _equal(expected: Any, found: Any) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.dtype.is_floating_point:
        return torch.equal(expected, found)
    scale = expected.abs().max().item() if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)
