"""Maps of ai.onnx.ml, which are Python dicts in a run: CastMap, DictVectorizer, ZipMap."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.foreign import host_data, strings
from fxopt.ir.onnx.references.ml_scores import as_rows
from fxopt.ir.onnx.registry import Call, Operators
from fxopt.ir.onnx.values import from_array

operators = Operators("ai.onnx.ml")

Map = dict[Any, Any]
_CASTS: dict[str, Any] = {"TO_FLOAT": np.float32, "TO_INT64": np.int64, "TO_STRING": object}


def _array(values: list[Any], default: np.dtype[Any] | None = None) -> Any:
    """Values of a map as an array: strings, int64 or float32; numpy numbers keep their type."""
    if values and isinstance(values[0], str):
        return strings(values)
    if values and isinstance(values[0], np.generic):
        return np.array(values)
    integers = bool(values) and all(isinstance(value, int) for value in values)
    return np.array(values, np.int64 if integers else np.float32)


@operators.reference("CastMap", raw=True)
def cast_map(call: Call, x: Map, cast_to: str = "TO_FLOAT", map_form: str = "DENSE", max_map: int = 1) -> Any:
    """The values of a map with integer keys as one row [1, C]: in the order of the keys, or (SPARSE) at their places.

    Raises:
        InvalidInput: an unknown `cast_to`, or a key that is beyond `max_map`.
    """
    if str(cast_to) not in _CASTS:
        raise InvalidInput(f"cast_to {cast_to!r} given; expected one of {', '.join(_CASTS)}")
    dtype = _CASTS[str(cast_to)]
    convert = str if dtype is object else dtype
    if str(map_form) == "DENSE":
        return from_array(np.array([[convert(x[key]) for key in sorted(x)]], dtype=dtype))
    row = np.full((1, max_map), "" if dtype is object else 0, dtype=dtype)
    for key, value in x.items():
        if not 0 <= key < max_map:
            raise InvalidInput(f"CastMap: the key {key} is not below max_map={max_map}")
        row[0, key] = convert(value)
    return from_array(row)


@operators.reference("DictVectorizer", raw=True)
def dict_vectorizer(
    call: Call, x: Any, int64_vocabulary: list[int] | None = None, string_vocabulary: list[str] | None = None
) -> Any:
    """The values of a map in the order of the vocabulary, [1, C]; 0 or "" where a key is missing."""
    keys: list[Any] = list(string_vocabulary or int64_vocabulary or [])
    rows = x if isinstance(x, list) else [x]
    kind = _array([value for row in rows for value in row.values()])
    missing = "" if kind.dtype == object else 0
    values = [[row.get(key, missing) for key in keys] for row in rows]
    return from_array(np.array(values, dtype=kind.dtype))


@operators.reference("ZipMap", raw=True)
def zip_map(
    call: Call, x: Tensor, classlabels_int64s: list[int] | None = None, classlabels_strings: list[str] | None = None
) -> list[Map]:
    """For every row of x ([N, C] or [C]) a map from the labels to its values.

    Raises:
        InvalidInput: there are not as many labels as columns.
    """
    labels: list[Any] = list(classlabels_strings or classlabels_int64s or [])
    rows = host_data(as_rows(x) if isinstance(x, torch.Tensor) else x)
    if rows.shape[1] != len(labels):
        raise InvalidInput(f"ZipMap has {len(labels)} labels for {rows.shape[1]} columns")
    return [dict(zip(labels, row, strict=True)) for row in rows.tolist()]
