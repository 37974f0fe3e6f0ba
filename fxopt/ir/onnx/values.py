"""Values of a run <-> numpy values, as ONNX's tools and ONNX Runtime hold them.

A value of a run is a `torch.Tensor`, a numpy array (shapes, strings, types that torch lacks), a list (a sequence), a
dict (a map) or None (an empty optional).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from fxopt.ir.graph import Opaque
from fxopt.ir.onnx.dtypes import from_numpy, to_numpy
from fxopt.ir.onnx.lane import to_tensor


def from_array(value: Any) -> Any:
    """A numpy value as a value of a run: a tensor where torch has its type, else the array."""
    if isinstance(value, (list, tuple)):
        return [from_array(item) for item in value]
    if value is None or isinstance(value, (torch.Tensor, dict)):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        return array.astype(object)
    try:
        return from_numpy(array)
    except TypeError:  # an element type that torch lacks
        return array


def to_array(value: Any) -> Any:
    """A value of a run as a numpy value; shape values become int64 arrays."""
    value = to_tensor(opaque_value(value) if isinstance(value, Opaque) else value)
    if isinstance(value, torch.Tensor):
        return to_numpy(value)
    if isinstance(value, (list, tuple)):
        return [to_array(item) for item in value]
    return value


def opaque_value(opaque: Opaque, folder: Path | None = None) -> Any:
    """What an opaque constant is in a run: an array for a tensor, of whatever element type; sub-graphs stay opaque.

    Args:
        folder: where the model's external data lies.
    """
    if opaque.value is None:
        opaque.value = _value_of(opaque.proto, str(folder or ""))
    return opaque if opaque.value is None else opaque.value


def _value_of(proto: Any, folder: str) -> Any:
    if isinstance(proto, onnx.TensorProto):
        if proto.data_type == proto.STRING:
            return _strings(proto.string_data).reshape(tuple(proto.dims))
        return from_array(numpy_helper.to_array(proto, folder))
    if isinstance(proto, onnx.SparseTensorProto):
        return _dense(proto, folder)
    if isinstance(proto, onnx.AttributeProto):
        return _value_of(proto.t, folder) if proto.type == proto.TENSOR else None
    if isinstance(proto, onnx.NodeProto):  # a Constant
        return _attribute_value(proto.attribute[0], folder)
    return None


def _attribute_value(attribute: onnx.AttributeProto, folder: str) -> Any:
    if attribute.type == attribute.STRING:
        return _strings([attribute.s]).reshape(())
    if attribute.type == attribute.STRINGS:
        return _strings(attribute.strings)
    return _dense(attribute.sparse_tensor, folder) if attribute.type == attribute.SPARSE_TENSOR else None


def _strings(items: Iterable[bytes]) -> np.ndarray[Any, Any]:
    """Texts; bytes that are no UTF-8 travel as surrogates."""
    return np.array([item.decode("utf-8", "surrogateescape") for item in items], dtype=object)


def _dense(sparse: onnx.SparseTensorProto, folder: str) -> Any:
    """A sparse tensor with its zeros; indices are [count] into the flat tensor, or [count, rank]."""
    values, indices = (numpy_helper.to_array(item, folder) for item in (sparse.values, sparse.indices))
    dense = np.zeros(tuple(sparse.dims), dtype=values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return from_array(dense)
