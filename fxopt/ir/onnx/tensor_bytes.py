"""How many bytes a `TensorProto` declares, and whether and where they are; nothing is allocated by declared dimensions.

Source: `TensorProto` of the ONNX specification (IR version 14), which also says that external data stay below the
model's folder.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto

from fxopt.errors import InvalidModel

_MOST_BYTES = (1 << 63) - 1
_BITS: dict[int, int] = {
    TensorProto.COMPLEX128: 128,
    **dict.fromkeys((TensorProto.INT64, TensorProto.UINT64, TensorProto.DOUBLE, TensorProto.COMPLEX64), 64),
    **dict.fromkeys((TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT32), 32),
    **dict.fromkeys((TensorProto.INT16, TensorProto.UINT16, TensorProto.FLOAT16, TensorProto.BFLOAT16), 16),
    **dict.fromkeys((TensorProto.INT8, TensorProto.UINT8, TensorProto.BOOL), 8),
    **dict.fromkeys(range(TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2FNUZ + 1), 8),
    TensorProto.FLOAT8E8M0: 8,
    **dict.fromkeys((TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1), 4),
    **dict.fromkeys((TensorProto.UINT2, TensorProto.INT2), 2),
}
_SIX_BITS = (27, 28)  # FLOAT6E2M3 and FLOAT6E3M2: four elements in three bytes
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
_PAIRS = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)


@dataclass(frozen=True)
class Place:
    """Where the bytes of an external tensor lie."""

    file: Path
    offset: int
    length: int


def element_count(tensor: TensorProto) -> int:
    """The product of the dimensions, as an exact number.

    Raises:
        InvalidModel: a dimension is negative, or the bytes would not fit into 63 bits.
    """
    if any(dim < 0 for dim in tensor.dims):
        raise InvalidModel(f"tensor {tensor.name!r} has the shape {list(tensor.dims)}; dimensions are 0 or more")
    count = math.prod(tensor.dims)
    if count * _bits(tensor) // 8 > _MOST_BYTES:
        raise InvalidModel(f"tensor {tensor.name!r} has the shape {list(tensor.dims)}: more than 2^63 bytes")
    return count


def byte_count(tensor: TensorProto) -> int:
    """The bytes that type and shape declare, packed types rounded up.

    Raises:
        InvalidModel: see `element_count`; the type is unknown, or strings, which have no fixed size.
    """
    return -(-element_count(tensor) * _bits(tensor) // 8)


def check_tensor(tensor: TensorProto, folder: Path | None) -> Place | None:
    """Compare what the tensor declares with the bytes that are there; returns where they are when beside the message.

    Raises:
        InvalidModel: the type is unknown, or there are fewer or more bytes or elements than the shape needs.
    """
    if tensor.HasField("segment"):
        raise InvalidModel(f"tensor {tensor.name!r} is one segment of several; give the tensor whole")
    count = element_count(tensor)
    if tensor.data_location == TensorProto.EXTERNAL:
        return locate(tensor, folder)
    typed = {name: len(getattr(tensor, name)) for name in _TYPED_FIELDS if len(getattr(tensor, name))}
    if len(typed) + tensor.HasField("raw_data") > 1:
        raise InvalidModel(f"tensor {tensor.name!r} holds data twice: {[*typed, 'raw_data'][:2]}; expected one field")
    if tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
        expected = byte_count(tensor)
        if len(tensor.raw_data) != expected:
            raise InvalidModel(
                f"tensor {tensor.name!r} holds {len(tensor.raw_data)} bytes; {_declared(tensor)} needs {expected}"
            )
        return None
    wanted = _entries(tensor, count)
    found = sum(typed.values())
    if found != wanted:
        raise InvalidModel(f"tensor {tensor.name!r} holds {found} values; {_declared(tensor)} needs {wanted}")
    return None


def locate(tensor: TensorProto, folder: Path | None) -> Place:
    """Where the external bytes of a tensor are: below `folder`, the folder of the model's file.

    Raises:
        InvalidModel: the location leaves the folder (by an absolute path, `..` or a link) or is no file, an offset
            or length is no number or is negative, the length is not what the shape needs, or the file is too short.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    named = f"tensor {tensor.name!r}: its external data"
    if folder is None:
        raise InvalidModel(f"{named} cannot be found from a message alone; give the model's path")
    file = _file(entries.get("location", ""), folder, named)
    offset = _number(entries.get("offset") or "0", "offset", named)
    expected = byte_count(tensor)
    length = _number(entries.get("length") or str(expected), "length", named)
    if length != expected:
        raise InvalidModel(f"{named} have the length {length}; {_declared(tensor)} needs {expected} bytes")
    size = file.stat().st_size
    if offset + length > size:
        raise InvalidModel(
            f"{named} are {length} bytes at {offset}, but {entries['location']} is too short: it holds {size} bytes"
        )
    return Place(file, offset, length)


_MAPS: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()


def external_bytes(tensor: TensorProto, folder: Path | None) -> torch.Tensor:
    """The external bytes of a tensor, uint8, as a private, copy-on-write memory map.

    Raises:
        InvalidModel: see `locate`.
    """
    place = locate(tensor, folder)
    if not place.length:
        return torch.empty(0, dtype=torch.uint8)
    status = place.file.stat()
    key = str(place.file), status.st_ino, status.st_mtime_ns, status.st_size
    storage = _MAPS.get(key)
    if storage is None:  # the whole file, one map for all tensors that lie in it
        storage = _MAPS[key] = torch.UntypedStorage.from_file(key[0], False, status.st_size)
    return torch.empty(0, dtype=torch.uint8).set_(storage, place.offset, (place.length,))  # type: ignore[call-overload, no-any-return]


def _file(location: str, folder: Path, named: str) -> Path:
    if not location:
        raise InvalidModel(f"{named} have no location; expected the name of a file beside the model")
    if "\0" in location:
        raise InvalidModel(f"{named} have the location {location!r}, which no file can have")
    root = folder.resolve()
    try:
        file = (root / location).resolve()
        if Path(location).is_absolute() or not file.is_relative_to(root):
            raise InvalidModel(
                f"{named} are at {location!r}, which is not below the model's folder; put the file beside the model"
            )
        if not file.is_file():
            why = "is no file" if file.exists() else "does not exist"
            raise InvalidModel(f"{named} are at {location!r}, which {why}; put it beside the model")
    except (OSError, RuntimeError) as error:  # a loop of links; a name that is too long
        raise InvalidModel(f"{named} are at {location[:200]!r}, which cannot be read: {error}") from error
    return file


def _number(text: str, what: str, named: str) -> int:
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 19 or int(digits) > _MOST_BYTES:
        raise InvalidModel(f"{named} have the {what} {text[:40]!r}; expected a number from 0 to 2^63 - 1")
    return int(digits)


def _bits(tensor: TensorProto) -> int:
    """Bits of an element; 6 counts as such, strings as none."""
    if tensor.data_type in _BITS:
        return _BITS[tensor.data_type]
    if tensor.data_type in _SIX_BITS:
        return 6
    if tensor.data_type == TensorProto.STRING:
        return 0
    raise InvalidModel(f"tensor {tensor.name!r} has the element type {tensor.data_type}, which ONNX does not define")


def _entries(tensor: TensorProto, count: int) -> int:
    """How many entries the typed field of a whole tensor has; types of 2 and 4 bits hold a byte in each."""
    if tensor.data_type in _PAIRS:
        return 2 * count
    bits = _bits(tensor)
    return -(-count * bits // 8) if bits in (2, 4) else count


def _declared(tensor: TensorProto) -> str:
    return f"{TensorProto.DataType.Name(tensor.data_type)}{list(tensor.dims)}"
