"""Element types: ONNX <-> torch <-> numpy, bit for bit.

Source: `TensorProto.DataType` of the ONNX specification (IR version 14).
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from onnx import TensorProto

TO_TORCH: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT16: torch.uint16,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.UINT32: torch.uint32,
    TensorProto.UINT64: torch.uint64,
    TensorProto.COMPLEX64: torch.complex64,
    TensorProto.COMPLEX128: torch.complex128,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2: torch.float8_e5m2,
    TensorProto.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
FROM_TORCH: dict[torch.dtype, int] = {dtype: code for code, dtype in TO_TORCH.items()}

# dtypes that numpy knows only through ml_dtypes: (numpy type, integer of the same width in numpy and torch)
_EXTENSION: dict[torch.dtype, tuple[type, type, torch.dtype]] = {
    torch.bfloat16: (ml_dtypes.bfloat16, np.int16, torch.int16),
    torch.float8_e4m3fn: (ml_dtypes.float8_e4m3fn, np.uint8, torch.uint8),
    torch.float8_e4m3fnuz: (ml_dtypes.float8_e4m3fnuz, np.uint8, torch.uint8),
    torch.float8_e5m2: (ml_dtypes.float8_e5m2, np.uint8, torch.uint8),
    torch.float8_e5m2fnuz: (ml_dtypes.float8_e5m2fnuz, np.uint8, torch.uint8),
}
_BY_NAME = {np.dtype(numpy_type).name: dtype for dtype, (numpy_type, _, _) in _EXTENSION.items()}


def to_numpy(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """The tensor as a numpy array of the same bits; shares memory where it is contiguous and on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    extension = _EXTENSION.get(tensor.dtype)
    if extension is None:
        return tensor.numpy()
    numpy_type, _, integer = extension
    return tensor.view(integer).numpy().view(numpy_type)


def from_numpy(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """The array as a tensor of the same bits; read-only or strided arrays are copied."""
    array = np.asarray(array)
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array)
    dtype = _BY_NAME.get(array.dtype.name)
    if dtype is None:
        return torch.from_numpy(array)
    _, integer, _ = _EXTENSION[dtype]
    return torch.from_numpy(array.view(integer)).view(dtype)
