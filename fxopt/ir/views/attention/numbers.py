"""Numbers that are written as tensors, and shapes of what may be computed on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.ir.graph import DynamicSize, Graph, shape_of, type_of
from fxopt.ir.neutral import read
from fxopt.ir.views.common import aten, is_aten, is_onnx, scalar_constant

_FILLED = {
    aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0, aten.new_full.default: 2,
}  # fmt: skip
_ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
_ONES = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)


def number(graph: Graph, value: object, depth: int = 8) -> float | None:
    """The number that a value is, or holds in each of its elements; None when it is something else."""
    plain = scalar_constant(graph, value)
    if plain is not None or not isinstance(value, fx.Node) or not depth:
        return plain
    constant = graph.constant(value)
    if constant is not None:
        return _repeated(constant)
    for name in ("expand", "reshape", "unsqueeze", "squeeze", "cast", "identity"):
        found = read(graph, value, name)
        if found is not None:
            return number(graph, found[0], depth - 1)
    if is_onnx(value, "ConstantOfShape"):
        filled: Any = value.kwargs.get("value")
        return 0.0 if filled is None else number(graph, filled)
    return _filled(value)


def _filled(node: fx.Node) -> float | None:
    """The number that torch's constructors repeat."""
    position = _FILLED.get(node.target)  # type: ignore[call-overload]
    if position is not None:
        given = node.args[position]
        return float(given) if isinstance(given, (int, float)) else None
    if is_aten(node, *_ZEROS):
        return 0.0
    return 1.0 if is_aten(node, *_ONES) else None


def _repeated(constant: torch.Tensor) -> float | None:
    """The number that all elements of a constant are."""
    if not constant.numel() or constant.is_complex():
        return None
    flat = constant.reshape(-1)
    return float(flat[0]) if bool((flat == flat[0]).all()) else None


def is_one(size: object) -> bool:
    """Whether a size is 1 at all sizes of the inputs."""
    return isinstance(size, int) and size == 1


def same_sizes(one: Sequence[Any] | None, two: Sequence[Any] | None) -> bool:
    """Whether two known shapes are the same at all sizes of the inputs."""
    return one is not None and two is not None and list(map(str, one)) == list(map(str, two))


def shown(shape: Sequence[Any] | None) -> str:
    """A shape for people: "?" where a size is dynamic."""
    if shape is None:
        return "of unknown shape"
    return f"[{', '.join(str(size) if isinstance(size, int) else '?' for size in shape)}]"


def sizes(node: object) -> tuple[Any, ...] | None:
    """The shape of a tensor or of a host array, as `shape_of` gives it."""
    known = shape_of(node)
    types = type_of(node) if known is None and isinstance(node, fx.Node) else None
    if types is None:
        return known
    value, probe = types
    if not isinstance(value, np.ndarray) or not isinstance(probe, np.ndarray) or value.ndim != probe.ndim:
        return None
    pairs = zip(value.shape, probe.shape, strict=True)
    return tuple(size if size == other else DynamicSize(size, other) for size, other in pairs)
