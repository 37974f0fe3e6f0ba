"""Tensors of an ONNX model: shared with the message or memory-mapped, and the message kept without their bytes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto, numpy_helper

from fxopt.errors import InvalidModel
from fxopt.ir.graph import Opaque
from fxopt.ir.onnx.dtypes import TO_TORCH, from_numpy
from fxopt.ir.onnx.tensor_bytes import byte_count, external_bytes

STRIP_BYTES = 1024  # tensors of more bytes are held once, as torch tensors, and taken out of the kept message
_DATA_FIELDS = frozenset(
    {"raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data"}
)


def is_external(tensor: TensorProto) -> bool:
    """True when the bytes are in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def imported(proto: TensorProto, folder: Path | None) -> tuple[torch.Tensor | Opaque, TensorProto, bool]:
    """The tensor, the message to keep, and whether the message was stripped of the bytes.

    Raises:
        InvalidModel: the bytes are missing or too few.
    """
    if proto.data_type not in TO_TORCH:
        kept = TensorProto.FromString(proto.SerializeToString())
        return Opaque(kept), kept, is_external(kept)
    if is_external(proto):
        kept = TensorProto.FromString(proto.SerializeToString())
        return _external(proto, folder), kept, True
    raw = proto.raw_data if proto.HasField("raw_data") else b""
    if len(raw) <= STRIP_BYTES:
        kept = TensorProto.FromString(proto.SerializeToString())
        return from_numpy(numpy_helper.to_array(kept)), kept, False
    return _tensor_over(raw, proto), without_data(proto), True


def without_data(proto: TensorProto) -> TensorProto:
    """A copy of the message without the elements."""
    copied = TensorProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name not in _DATA_FIELDS:
            copy_field(copied, descriptor, value)
    return copied


def copy_field(message: Any, descriptor: Any, value: Any) -> None:
    """Set one field of a message as another one has it."""
    if descriptor.is_repeated:
        getattr(message, descriptor.name).extend(value)
    elif descriptor.message_type is not None:
        getattr(message, descriptor.name).CopyFrom(value)
    else:
        setattr(message, descriptor.name, value)


def _external(proto: TensorProto, folder: Path | None) -> torch.Tensor:
    """External data as a private, copy-on-write memory map."""
    dtype = TO_TORCH[proto.data_type]
    content = external_bytes(proto, folder)
    aligned = content if content.storage_offset() % dtype.itemsize == 0 else content.clone()
    return aligned.view(dtype).reshape(tuple(proto.dims))


def _tensor_over(content: bytes, proto: TensorProto) -> torch.Tensor:
    """A tensor over the bytes, without a copy; constants of a graph are never written to."""
    dtype = TO_TORCH[proto.data_type]
    expected = byte_count(proto)
    if not content and not expected:
        return torch.empty(tuple(proto.dims), dtype=dtype)
    if len(content) != expected:
        raise InvalidModel(
            f"initializer {proto.name!r} holds {len(content)} bytes; {list(proto.dims)} needs {expected}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the buffer is not writable, and nobody writes
        return torch.frombuffer(content, dtype=dtype).reshape(tuple(proto.dims))
