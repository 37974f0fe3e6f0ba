"""Values of a run <-> numpy values, as ONNX's tools and ONNX Runtime hold them.

A value of a run is a `torch.Tensor`, a numpy array (shapes, strings, types that torch lacks), a list (a sequence) or
None (an empty optional).
"""

from __future__ import annotations

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
    value = to_tensor(value)
    if isinstance(value, torch.Tensor):
        return to_numpy(value)
    if isinstance(value, (list, tuple)):
        return [to_array(item) for item in value]
    if isinstance(value, Opaque) and isinstance(value.proto, onnx.TensorProto):
        return numpy_helper.to_array(value.proto)
    return value
