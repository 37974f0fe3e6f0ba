"""The host lane: shape arithmetic of ONNX graphs as numpy arrays of int or SymInt.

ONNX computes shapes with int64 tensors (Shape -> Gather -> Concat -> Reshape). In this dialect `Shape` returns a numpy
array, of dtype object where a dimension is symbolic; the operators that shapes pass through have a second, *host*
implementation on such arrays, so that dynamic dimensions stay symbolic under fake tensors and `torch.export`.
A value of a run is a `torch.Tensor` (the tensor lane), a numpy array (the host lane; of element types that torch lacks:
the foreign lane, see `foreign`), a list (sequence), a dict (a map of ai.onnx.ml) or None.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt
import torch

from fxopt.ir.onnx.dtypes import from_numpy

HostArray = npt.NDArray[Any]
HOST_LIMIT = 256  # int64 constants of at most this many elements are host data


def is_host(value: object) -> TypeGuard[HostArray]:
    """True for a numpy array of integers, booleans or symbolic integers; an empty array of objects holds strings."""
    if not isinstance(value, np.ndarray):
        return False
    if value.dtype == object:
        return value.size > 0 and all(
            isinstance(item, (int, np.integer, np.bool_, torch.SymInt)) for item in value.reshape(-1)
        )
    return value.dtype.kind in "iub"


def has_symbol(value: HostArray) -> bool:
    """True when an element is a SymInt."""
    return value.dtype == object and any(isinstance(item, torch.SymInt) for item in value.reshape(-1))


def int64_if_empty(value: Any) -> Any:
    """An array of objects without elements, left over from symbolic sizes, as int64; other values as they are."""
    if isinstance(value, tuple):
        return tuple(map(int64_if_empty, value))
    return (
        value.astype(np.int64) if isinstance(value, np.ndarray) and value.dtype == object and not value.size else value
    )


def to_tensor(value: Any) -> Any:
    """A host array as an int64 (or its own integer type) tensor; every other value as it is."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype != object:
        return from_numpy(value) if value.dtype.kind in "iubfc" or value.dtype.name == "bfloat16" else value
    if not is_host(value):
        return value
    if not has_symbol(value):
        return torch.from_numpy(value.astype(np.int64))
    items = [torch.scalar_tensor(item, dtype=torch.int64) for item in value.reshape(-1)]
    return torch.stack(items).reshape(value.shape)


def to_ints(value: Any) -> list[Any] | None:
    """A shape-like operand as a list of int or SymInt; None stays None.

    Under fake tensors a tensor operand has no data: torch raises a data-dependent error, which the caller reports.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, np.ndarray):
        return [int(item) if isinstance(item, (np.integer, np.bool_)) else item for item in value.reshape(-1)]
    return [int(item) for item in value.reshape(-1).tolist()]


def to_scalar(value: Any) -> Any:
    """The single element of a host array or tensor as a Python number (or SymInt)."""
    if isinstance(value, np.ndarray):
        item = value.reshape(-1)[0]
        return item.item() if isinstance(item, np.generic) else item
    if isinstance(value, torch.Tensor):
        return value.reshape(-1)[0].item()
    return value
