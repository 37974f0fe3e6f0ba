"""Categories of ai.onnx.ml: LabelEncoder (1, 2, 4), CategoryMapper, OneHotEncoder."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.foreign import Array, host_data, is_string, strings
from fxopt.ir.onnx.registry import Call, Operators
from fxopt.ir.onnx.values import from_array

operators = Operators("ai.onnx.ml")

_NAN = object()  # all NaNs are one key


def _key(item: Any) -> Any:
    return _NAN if isinstance(item, float) and math.isnan(item) else item


def look_up(x: Any, keys: list[Any], values: Array, default: Any) -> Any:
    """values[i] where x equals keys[i] (the last one of equal keys), else the default, in the shape of x."""
    table = {_key(key): value for key, value in zip(keys, values.tolist(), strict=True)}
    array = host_data(x)
    found = [table.get(_key(item), default) for item in array.reshape(-1).tolist()]
    return from_array(np.array(found, dtype=values.dtype).reshape(array.shape))


def _given(kind: str, candidates: dict[str, Any]) -> tuple[str, Array]:
    """The one attribute of a group that is set, as an array of its type."""
    given = {name: value for name, value in candidates.items() if value is not None and len(value)}
    if len(given) != 1:
        raise InvalidInput(f"LabelEncoder needs exactly one of {kind}_*; given: {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    types: dict[str, Any] = {"strings": object, "int64s": np.int64, "floats": np.float32}
    if name == "tensor":
        array: Array = host_data(value)
        return name, array.reshape(-1)
    return name, np.array(value, dtype=types[name])


@operators.reference("LabelEncoder", raw=True)
def label_encoder(
    call: Call,
    x: Any,
    classes_strings: list[str] | None = None,
    default_float: float = -0.0,
    default_int64: int = -1,
    default_string: str = "_Unused",
    default_tensor: Any = None,
    keys_floats: list[float] | None = None,
    keys_int64s: list[int] | None = None,
    keys_strings: list[str] | None = None,
    keys_tensor: Any = None,
    values_floats: list[float] | None = None,
    values_int64s: list[int] | None = None,
    values_strings: list[str] | None = None,
    values_tensor: Any = None,
) -> Any:
    """Every element of x that is a key as the value beside it, else the default of the values' type.

    Version 1 maps strings to their positions in `classes_strings`, and positions to strings.

    Raises:
        InvalidInput: not exactly one attribute holds the keys, or the values.
    """
    if call.version == 1:
        classes = strings(classes_strings or [])
        positions = np.arange(len(classes))
        if is_string(x):
            return look_up(x, classes.tolist(), positions, default_int64)
        return look_up(x, positions.tolist(), classes, default_string)
    keys = {"strings": keys_strings, "int64s": keys_int64s, "floats": keys_floats, "tensor": keys_tensor}
    results = {"strings": values_strings, "int64s": values_int64s, "floats": values_floats, "tensor": values_tensor}
    _, known = _given("keys", keys)
    _, values = _given("values", results)
    if default_tensor is not None:
        return look_up(x, known.tolist(), values, host_data(default_tensor).reshape(-1).tolist()[0])
    default = {"O": default_string, "i": default_int64, "f": default_float}[values.dtype.kind]
    return look_up(x, known.tolist(), values, default)


@operators.reference("CategoryMapper", raw=True)
def category_mapper(
    call: Call,
    x: Any,
    cats_int64s: list[int] | None = None,
    cats_strings: list[str] | None = None,
    default_int64: int = -1,
    default_string: str = "_Unused",
) -> Any:
    """Strings as the integers beside them in the two lists, and integers as the strings."""
    integers, texts = np.array(cats_int64s or [], np.int64), strings(cats_strings or [])
    if is_string(x):
        return look_up(x, texts.tolist(), integers, default_int64)
    return look_up(x, integers.tolist(), texts, default_string)


@operators.reference("OneHotEncoder", raw=True)
def one_hot_encoder(
    call: Call, x: Any, cats_int64s: list[int] | None = None, cats_strings: list[str] | None = None, zeros: int = 1
) -> Tensor:
    """A new last axis [number of categories] as float32: 1 at the category of the element, else 0.

    Raises:
        InvalidInput: an element has no category and `zeros` is 0.
    """
    array = host_data(x)
    categories: list[Any] = cats_strings if cats_strings else cats_int64s or []
    place = {category: index for index, category in enumerate(categories)}
    items = array.reshape(-1).tolist() if is_string(array) else array.astype(np.int64).reshape(-1).tolist()
    result = np.zeros((len(items), len(categories)), np.float32)
    for row, item in zip(result, items, strict=True):
        if item in place:
            row[place[item]] = 1.0
        elif not zeros:
            raise InvalidInput(f"OneHotEncoder: {item!r} is none of the {len(categories)} categories, and zeros=0")
    return torch.from_numpy(result.reshape([*array.shape, len(categories)]))
