"""Write tensors one after another into a data file: nothing but one tensor at a time is in memory.

Layout: the offsets are multiples of 4096, so that every tensor can be memory-mapped; tensors over the same memory (tied
weights) are written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from fxopt.ir.onnx.dtypes import to_numpy

ALIGNMENT = 4096
_PIECE = 1 << 24  # bytes that are handed to the file at once


def write_external(pending: Sequence[tuple[TensorProto, torch.Tensor]], folder: Path, name: str) -> None:
    """Stream the tensors to the file `name` in `folder`, and let the messages refer to it.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    places: dict[Any, tuple[int, int]] = {}
    with (folder / name).open("wb") as file:
        for _, value in pending:
            key = _identity(value)
            if key not in places:
                file.seek(-(-file.tell() // ALIGNMENT) * ALIGNMENT)
                places[key] = file.tell(), value.nbytes
                _write(value, file)
        file.truncate(file.tell())
        for message, value in pending:
            refer(message, name, *places[_identity(value)])


def refer(message: TensorProto, location: str, offset: int, length: int) -> None:
    """Make the message a reference to external bytes."""
    message.ClearField("external_data")
    message.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        message.external_data.add(key=key, value=str(value))


def _identity(value: torch.Tensor) -> Any:
    """Equal for tensors over the same memory."""
    return value.data_ptr() or id(value), value.dtype, tuple(value.shape), value.stride()


def _write(value: torch.Tensor, file: Any) -> None:
    content = to_numpy(value).reshape(-1).view(np.uint8)
    for start in range(0, content.size, _PIECE):
        file.write(content[start : start + _PIECE].data)
