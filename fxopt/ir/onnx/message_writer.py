"""Write a model message tensor by tensor: the bytes of its weights are never copied into a message.

Source: the wire format of protobuf; fields of a message may come in any order, here those with the weights last.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import GraphProto, ModelProto, TensorProto

from fxopt.errors import Unsupported
from fxopt.ir.onnx.dtypes import to_numpy

_MOST_BYTES = (1 << 31) - 1  # of a message
_BYTES = 2  # the wire type of messages and bytes
_GRAPH = ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = TensorProto.RAW_DATA_FIELD_NUMBER


def write_message(proto: ModelProto, values: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the model, with these values as the raw data of its initializers, by name; the message loses them.

    Raises:
        OSError: the file cannot be written.
        Unsupported: the whole is too large for a message.
    """
    heads: list[tuple[bytes, torch.Tensor | None]] = []
    for tensor in proto.graph.initializer:
        value = values.get(tensor.name)
        head = tensor.SerializeToString(deterministic=True)
        if value is not None:
            head += _field(_RAW_DATA, value.nbytes)
        heads.append((head, value))
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    lengths = [len(head) + (0 if value is None else value.nbytes) for head, value in heads]
    starts = [_field(_INITIALIZER, length) for length in lengths]
    total = len(graph) + sum(lengths) + sum(map(len, starts))
    rest = proto.SerializeToString(deterministic=True)
    if total + len(rest) > _MOST_BYTES:
        raise Unsupported(f"{total} bytes do not fit into one protobuf message; save the model with external data")
    with path.open("wb") as file:
        file.write(rest)
        file.write(_field(_GRAPH, total))
        file.write(graph)
        for start, (head, value) in zip(starts, heads, strict=True):
            file.write(start)
            file.write(head)
            if value is not None and value.nbytes:
                content: Any = to_numpy(value).reshape(-1).view(np.uint8)
                file.write(content.data)


def _field(number: int, length: int) -> bytes:
    """The start of a field: its number, its wire type and the length of what follows."""
    return _varint(number << 3 | _BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
