"""The foreign lane: arrays of the element types that torch lacks (strings; 2-, 4- and 6-bit numbers; float8e8m0).

Such a value travels as a numpy array: numbers in the types of `ml_dtypes`, one element a byte, strings as an array of
`str` objects. An operator that only moves elements (Reshape, Gather, Where, ...) runs its torch reference on *codes*:
the bits of a number, the rank of a string among all strings of the call, where "" has rank 0. Its definition therefore
is one and the same for every element type. Operators that compute with such elements take the arrays themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto
from torch._subclasses.fake_tensor import FakeTensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.dtypes import to_numpy
from fxopt.ir.onnx.lane import has_symbol, is_host, to_tensor

Array = npt.NDArray[Any]

NUMBERS: dict[int, np.dtype[Any]] = {
    TensorProto.UINT4: np.dtype(ml_dtypes.uint4),
    TensorProto.INT4: np.dtype(ml_dtypes.int4),
    TensorProto.UINT2: np.dtype(ml_dtypes.uint2),
    TensorProto.INT2: np.dtype(ml_dtypes.int2),
    TensorProto.FLOAT4E2M1: np.dtype(ml_dtypes.float4_e2m1fn),
    TensorProto.FLOAT8E8M0: np.dtype(ml_dtypes.float8_e8m0fnu),
    TensorProto.FLOAT6E2M3: np.dtype(ml_dtypes.float6_e2m3fn),
    TensorProto.FLOAT6E3M2: np.dtype(ml_dtypes.float6_e3m2fn),
}
CODES: dict[str, int] = {dtype.name: code for code, dtype in NUMBERS.items()}

ALL: None = None  # every output holds elements
MOVING: dict[str, tuple[int, ...] | None] = {  # operators that only move or compare elements: outputs that hold them
    **dict.fromkeys(("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Tile"), ALL),
    **dict.fromkeys(("Concat", "Split", "Slice", "Gather", "GatherElements", "GatherND", "Compress"), ALL),
    **dict.fromkeys(("Scatter", "ScatterElements", "ScatterND", "TensorScatter", "Where", "OneHot"), ALL),
    **dict.fromkeys(("Pad", "CenterCropPad", "Trilu", "ReverseSequence", "DepthToSpace", "SpaceToDepth"), ALL),
    **dict.fromkeys(("ConcatFromSequence", "SplitToSequence", "Resize", "Upsample", "GridSample"), ALL),
    **dict.fromkeys(("Equal", "NonZero"), ()),
    "Unique": (0,),
}
_SAMPLERS = ("Resize", "Upsample", "GridSample")  # torch samples floats only; the nearest element stays what it is


def is_string(value: object) -> TypeGuard[Array]:
    """True for an array of strings, an empty one included."""
    if not isinstance(value, np.ndarray):
        return False
    return value.dtype.kind in "US" or (value.dtype == object and not is_host(value))


def is_foreign(value: object) -> TypeGuard[Array]:
    """True for an array whose element type torch lacks."""
    return isinstance(value, np.ndarray) and (value.dtype.name in CODES or is_string(value))


def holds_foreign(value: object) -> bool:
    """True for a foreign array, or a sequence with one."""
    if isinstance(value, (list, tuple)):
        return any(map(holds_foreign, value))
    return is_foreign(value)


def strings(values: Any) -> Array:
    """The values as an array of `str` objects."""
    return np.asarray(values, dtype=object)


def host_data(value: Any) -> Any:
    """A value of a run as numpy data, for operators that no tensor operation can express.

    Raises:
        MissingReference: a fake tensor, or a symbolic size, has no data.
    """
    if isinstance(value, (list, tuple)):
        return [host_data(item) for item in value]
    if isinstance(value, FakeTensor) or (isinstance(value, np.ndarray) and is_host(value) and has_symbol(value)):
        raise MissingReference("the operator needs data, and this value has only a type")
    value = to_tensor(value)
    return to_numpy(value) if isinstance(value, torch.Tensor) else value


def _strings_in(value: Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _strings_in(item)]
    return list(value.reshape(-1)) if is_string(value) else []


class _Coder:
    """Foreign arrays to tensors of codes and back."""

    def __init__(self, values: Any, as_float: bool) -> None:
        self.dtype = np.dtype(object)
        self.as_float = as_float
        self.table = sorted({"", *_strings_in(values)})  # UTF-8 and code points have the same order
        self.ranks = {text: rank for rank, text in enumerate(self.table)}

    def encode(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self.encode(item) for item in value]
        if not is_foreign(value):
            return value
        if is_string(value):
            ranks = np.array([self.ranks[text] for text in value.reshape(-1)], dtype=np.int64)
            codes = torch.from_numpy(ranks.reshape(value.shape))
        else:
            self.dtype = value.dtype
            codes = torch.from_numpy(np.array(value).view(np.uint8))
        return codes.double() if self.as_float else codes

    def decode(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self.decode(item) for item in value]
        codes = host_data(value)
        if self.dtype != object:
            return codes.astype(np.uint8).view(self.dtype)
        return strings(self.table)[codes.astype(np.int64)]


def run_on_codes(op_type: str, function: Callable[..., Any], inputs: Any, attributes: dict[str, Any]) -> Any:
    """The result of an operator of `MOVING` on foreign arrays; `function` takes the encoded inputs.

    Raises:
        MissingReference: elements would be interpolated.
    """
    sampled = op_type in _SAMPLERS
    if sampled and str(attributes.get("mode", "linear" if op_type == "GridSample" else "nearest")) != "nearest":
        raise MissingReference(f"{op_type} of strings only has mode 'nearest', {attributes.get('mode')!r} given")
    coder = _Coder(inputs, sampled)
    results = function(*map(coder.encode, inputs), **attributes)
    held = MOVING[op_type]
    several = results if isinstance(results, tuple) else (results,)
    elements = range(len(several)) if held is None else held
    decoded = [coder.decode(result) if index in elements else result for index, result in enumerate(several)]
    return tuple(decoded) if isinstance(results, tuple) else decoded[0]
