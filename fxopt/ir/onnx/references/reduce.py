"""Reductions over axes: ReduceSum and its family, ArgMax, ArgMin."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.ir.onnx.lane import HostArray, has_symbol, to_ints, to_tensor
from fxopt.ir.onnx.references.common import WIDE_UNSIGNED, axes_of, in_int64, ordered, unordered
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _sum(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    """The sum, in the type of x."""
    return x.sum(axes, keepdim=keepdims).to(x.dtype) if axes else x


def _absolute(x: Tensor) -> Tensor:
    return x if x.dtype in WIDE_UNSIGNED else x.abs()


def _mean(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    """The mean; of integers the truncated one."""
    if not axes:
        return x
    if x.is_floating_point():
        return x.mean(axes, keepdim=keepdims)
    return x.to(torch.float64).mean(axes, keepdim=keepdims).to(torch.int64).to(x.dtype)


def _extremum(name: str) -> Reduction:
    def reduce(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
        """The extremum; of an empty range the type's opposite limit."""
        if not axes:
            return x
        empty = any(isinstance(x.shape[axis], int) and x.shape[axis] == 0 for axis in axes)
        if empty:
            return torch.full(_reduced_shape(x, axes, keepdims), _limit(x.dtype, name), dtype=x.dtype, device=x.device)
        result: Tensor = getattr(ordered(x), name)(axes, keepdim=keepdims)
        return unordered(result, x.dtype)

    return reduce


def _reduced_shape(x: Tensor, axes: list[int], keepdims: bool) -> list[Any]:
    if keepdims:
        return [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    return [size for axis, size in enumerate(x.shape) if axis not in axes]


def _limit(dtype: torch.dtype, name: str) -> float | bool:
    """The neutral element of amax or amin."""
    sign = -1 if name == "amax" else 1
    if dtype.is_floating_point:
        return sign * float("inf")
    if dtype == torch.bool:
        return name == "amin"
    info = torch.iinfo(dtype)
    return info.min if name == "amax" else info.max


def _product(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    """The product, in the type of x."""
    for axis in sorted(axes, reverse=True):
        x = in_int64(torch.prod)(x, dim=axis, keepdim=keepdims).to(x.dtype)
    return x


def _sum_square(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    """The sum of squares."""
    return _sum(x * x, axes, keepdims)


def _real(x: Tensor) -> Tensor:
    """Integers as float64, for a result that is rounded back."""
    return x if x.is_floating_point() else x.to(torch.float64)


def _norm(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    """The square root of the sum of squares."""
    return torch.sqrt(_sum_square(_real(x), axes, keepdims)).to(x.dtype)


def _log_sum(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    """The logarithm of the sum."""
    return torch.log(_sum(_real(x), axes, keepdims)).to(x.dtype)


def _log_sum_exp(x: Tensor, axes: list[int], keepdims: bool) -> Tensor:
    """log(sum(exp(x))) without overflow."""
    return torch.logsumexp(_real(x), axes, keepdim=keepdims).to(x.dtype) if axes else x


def _declare(op_type: str, reduction: Reduction) -> None:
    @operators.reference(op_type, raw=True)
    def reduce(
        call: Call,
        x: Any,
        axes_input: Any = None,
        axes: list[int] | None = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        tensor: Tensor = to_tensor(x)
        listed = axes_of(axes_input if axes is None else axes, tensor.dim())
        if not listed:
            listed = [] if noop_with_empty_axes else list(range(tensor.dim()))
        return reduction(tensor, listed, bool(keepdims))

    reduce.__doc__ = f"{op_type} over the axes, all by default: {reduction.__doc__}"


for _op_type, _reduction in {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceMax": _extremum("amax"),
    "ReduceMin": _extremum("amin"),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keepdims: _sum(_absolute(x), axes, keepdims),
    "ReduceL2": _norm,
    "ReduceSumSquare": _sum_square,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
}.items():
    _declare(_op_type, _reduction)


def _declare_host(op_type: str, function: Callable[[Any, Any], Any], start: Any) -> None:
    @operators.host(op_type)
    def reduce(
        call: Call,
        x: HostArray,
        axes_input: Any = None,
        axes: list[int] | None = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Any:
        listed = to_ints(axes_input if axes is None else axes)
        if x.ndim != 1 or (not listed and noop_with_empty_axes) or (x.size == 0 and start is None):
            return NotImplemented
        items = list(x) if start is None else [start, *x]
        dtype = object if has_symbol(x) else (np.int64 if x.dtype == object else x.dtype)
        result = np.asarray(functools.reduce(function, items), dtype=dtype)
        return result.reshape(1) if keepdims else result.reshape(())

    reduce.__doc__ = f"{op_type} of a host vector."


for _op_type, _number_function, _start in (
    ("ReduceSum", operator.add, 0),
    ("ReduceProd", operator.mul, 1),
    ("ReduceMax", torch.sym_max, None),
    ("ReduceMin", torch.sym_min, None),
):
    _declare_host(_op_type, _number_function, _start)


def _declare_arg(op_type: str, function: Callable[..., Tensor]) -> None:
    @operators.reference(op_type)
    def arg(call: Call, x: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
        wide = ordered(x)
        if not select_last_index:
            return function(wide, dim=axis, keepdim=bool(keepdims))
        from_end = function(wide.flip(axis), dim=axis, keepdim=bool(keepdims))
        return x.shape[axis] - 1 - from_end

    arg.__doc__ = f"{op_type}: the index of the first (or last) extremum along the axis."


_declare_arg("ArgMax", torch.argmax)
_declare_arg("ArgMin", torch.argmin)
