"""Where, Clip and the reductions over a list of tensors (Max, Min, Sum, Mean)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.ir.onnx.lane import HostArray, has_symbol
from fxopt.ir.onnx.references.common import ordered, unordered
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_LARGEST = torch.finfo(torch.float32).max


@operators.reference("Where")
def where(call: Call, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """x where the condition holds, else y."""
    return torch.where(condition, x, y)


@operators.host("Where")
def host_where(call: Call, condition: HostArray, x: HostArray, y: HostArray) -> HostArray:
    """x where the condition holds, else y, of host integers."""
    if object in (x.dtype, y.dtype):
        x, y = x.astype(object), y.astype(object)
    return np.where(condition.astype(bool), x, y)


def minimum(a: Tensor, b: Tensor) -> Tensor:
    """min(a, b), NaN when one is NaN."""
    return unordered(torch.minimum(ordered(a), ordered(b)), a.dtype)


def maximum(a: Tensor, b: Tensor) -> Tensor:
    """max(a, b), NaN when one is NaN."""
    return unordered(torch.maximum(ordered(a), ordered(b)), a.dtype)


@operators.reference("Min")
def minimum_of(call: Call, *values: Tensor, consumed_inputs: list[int] | None = None) -> Tensor:
    """The element-wise minimum of all inputs."""
    return functools.reduce(minimum, values)


@operators.reference("Max")
def maximum_of(call: Call, *values: Tensor, consumed_inputs: list[int] | None = None) -> Tensor:
    """The element-wise maximum of all inputs."""
    return functools.reduce(maximum, values)


def _host_extremum(values: tuple[HostArray, ...], sym: Any, plain: Any) -> HostArray:
    if any(has_symbol(value) for value in values):
        return np.asarray(functools.reduce(np.frompyfunc(sym, 2, 1), values), dtype=object)
    return np.asarray(functools.reduce(plain, values))


@operators.host("Min")
def host_minimum(call: Call, *values: HostArray, **_: Any) -> HostArray:
    """The element-wise minimum of host integers."""
    return _host_extremum(values, torch.sym_min, np.minimum)


@operators.host("Max")
def host_maximum(call: Call, *values: HostArray, **_: Any) -> HostArray:
    """The element-wise maximum of host integers."""
    return _host_extremum(values, torch.sym_max, np.maximum)


@operators.reference("Sum")
def sum_of(call: Call, *values: Tensor, consumed_inputs: list[int] | None = None) -> Tensor:
    """The element-wise sum of all inputs."""
    return functools.reduce(torch.add, values)


@operators.reference("Mean")
def mean_of(call: Call, *values: Tensor, consumed_inputs: list[int] | None = None) -> Tensor:
    """The element-wise mean of all inputs."""
    return functools.reduce(torch.add, values) / len(values)


@operators.reference("Clip")
def clip(
    call: Call,
    x: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    min: float | None = None,
    max: float | None = None,
    consumed_inputs: list[int] | None = None,
) -> Tensor:
    """min(max(x, low), high); the bounds are attributes below opset 11, inputs since."""
    if call.version == 6:  # its defaults also turn infinity into the largest float32
        min, max = -_LARGEST if min is None else min, _LARGEST if max is None else max
    if min is not None or max is not None:
        x = torch.clamp(x, min, max)
    if low is not None:
        x = maximum(x, low.to(x.dtype))
    if high is not None:
        x = minimum(x, high.to(x.dtype))
    return x
