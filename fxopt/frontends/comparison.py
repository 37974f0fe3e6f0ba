"""Two ONNX graphs on the same made-up inputs: how far apart their outputs are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fxopt.errors import InvalidModel, MissingReference
from fxopt.frontends.to_onnx import run_onnxruntime
from fxopt.ir.graph import Graph

_DYNAMIC = 3  # size of dynamic dimensions in the inputs that both models are run on


def first_line(error: Exception) -> str:
    """The type of an error and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def run(graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs in torch, or by ONNX Runtime where an operator has no torch reference."""
    try:
        with torch.no_grad():
            return list(graph.run(list(inputs)))
    except MissingReference:
        return run_onnxruntime(graph, inputs)


def made_up(graph: Graph) -> list[torch.Tensor]:
    """One input each by type and shape: normal numbers, and 0 or 1 for integers, which are valid indices."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for spec in graph.inputs:
        if spec.dtype is None or spec.shape is None:
            raise InvalidModel(f"input {spec} has no type that torch can make up")
        shape = [dim if isinstance(dim, int) else _DYNAMIC for dim in spec.shape]
        if spec.dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator).to(spec.dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=generator).to(spec.dtype))
    return made


def noise_to_signal(expected: object, found: object) -> float:
    """Noise to signal of a result; infinite where type, shape or a non-number differ."""
    right, value = _array(expected), _array(found)
    if right.shape != value.shape or right.dtype != value.dtype:
        return math.inf
    if right.dtype.kind not in "fc":
        return 0.0 if np.array_equal(right, value) else math.inf
    finite = np.isfinite(right)
    others_agree = np.array_equal(right[~finite], value[~finite], equal_nan=True)
    if not np.array_equal(finite, np.isfinite(value)) or not others_agree:
        return math.inf
    difference, signal = right[finite] - value[finite], right[finite]
    noise, power = (float(np.square(np.abs(item).astype(np.float64)).sum()) for item in (difference, signal))
    return 0.0 if noise == 0 else noise / max(power, 1e-30)


def _array(item: object) -> np.ndarray[Any, Any]:
    if isinstance(item, torch.Tensor) and item.dtype == torch.bfloat16:
        item = item.float()
    return np.asarray(item)
