"""Does a batch fit the model's inputs: names, element types, shapes; safe conversions are made, and said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxopt.errors import InvalidInput, unknown
from fxopt.ir.graph import ValueSpec
from fxopt.ir.onnx.dtypes import from_numpy

Array = npt.NDArray[Any]
Sample = dict[str, torch.Tensor]  # one batch as the model takes it, by input name
Warn = Callable[[str], object]


def check(sample: Mapping[str, Any], inputs: Sequence[ValueSpec], where: str, say: Warn) -> Sample:
    """The batch in the order of the inputs, with safe conversions made.

    Args:
        say: called with the conversions of integers.

    Raises:
        InvalidInput: a name, element type or shape does not fit.
    """
    check_names(sample, inputs, where)
    sizes: dict[str, tuple[int, str]] = {}
    return {spec.name: _checked(sample[spec.name], spec, sizes, where, say) for spec in inputs}


def check_names(names: Iterable[str], inputs: Sequence[ValueSpec], where: str) -> None:
    """Raise unless every name is that of an input, and every input has a value."""
    known = [spec.name for spec in inputs]
    given = list(names)
    for name in given:
        if name not in known:
            raise InvalidInput(
                f"{where}: {unknown('model input', name, known)}; leave out what the model does not take"
            )
    missing = [str(spec) for spec in inputs if spec.name not in given]
    if missing:
        raise InvalidInput(
            f"{where}: the model input {' and '.join(missing)} is missing; given: {', '.join(given) or 'none'}"
        )


def _checked(value: Any, spec: ValueSpec, sizes: dict[str, tuple[int, str]], where: str, say: Warn) -> torch.Tensor:
    where = f"{where}: input {spec.name!r}"
    if spec.dtype is None:
        raise InvalidInput(f"{where} is not a tensor of numbers; it cannot be calibrated")
    given = as_tensor(value, where)
    tensor = _converted(given, spec.dtype, where)
    if tensor.dtype != given.dtype and not given.is_floating_point():
        kinds = (str(dtype).removeprefix("torch.") for dtype in (given.dtype, tensor.dtype))
        say("calibration: input {!r} is converted from {} to {}; every value fits".format(spec.name, *kinds))
    check_shape(tuple(tensor.shape), spec, sizes, where)
    if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
        raise InvalidInput(f"{where} holds NaN; leave such samples out")
    return tensor


def as_tensor(value: Any, where: str) -> torch.Tensor:
    """The value as a tensor on the CPU: tensors, arrays, numbers and nested lists of them.

    Raises:
        InvalidInput: it is text, or lists of different lengths, or otherwise no array of numbers.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidInput(f"{where} is not an array: {_ragged(value) or error}") from error
    except RuntimeError as error:  # a list of tensors on a GPU
        raise InvalidInput(f"{where} is not an array: {error}") from error
    if array.dtype.kind in "US":
        raise InvalidInput(
            f"{where} has element type {array.dtype}: text; tokenise it first, as in "
            "tokenizer(text, return_tensors='np')"
        )
    try:
        return from_numpy(array)
    except TypeError as error:
        raise InvalidInput(f"{where} has element type {array.dtype}, which is no tensor of numbers") from error


def doubts(samples: Sequence[Sample], inputs: Sequence[ValueSpec]) -> list[str]:
    """What makes the ranges and errors found on these batches worth little."""
    found = []
    for spec in inputs:
        if spec.dtype is None or not spec.dtype.is_floating_point:
            continue  # masks may be all ones
        numbers = {_only_value(sample[spec.name]) for sample in samples}
        if len(numbers) == 1 and None not in numbers:
            (number,) = numbers
            found.append(
                f"calibration: every value of input {spec.name!r} is {number:g}: ranges and errors found with it may "
                "hold for nothing else"
            )
    first = samples[0] if samples else {}
    if len(samples) > 1 and all(torch.equal(first[name], other[name]) for other in samples[1:] for name in first):
        found.append(
            f"calibration: all {len(samples)} samples are equal: the error is measured on what was calibrated with, "
            "which flatters it"
        )
    return found


def _only_value(value: torch.Tensor) -> float | None:
    """The number that every element is; None when they differ, or there are none."""
    if not value.numel() or value.numel() == 1:
        return None
    first = value.flatten()[0]
    return float(first) if bool((value == first).all()) else None


def _ragged(value: Any) -> str:
    """What is wrong with a list of lists of different lengths."""
    lengths = sorted({len(row) for row in value if hasattr(row, "__len__")}) if isinstance(value, (list, tuple)) else []
    if len(lengths) < 2:
        return ""
    return (
        f"its rows have from {lengths[0]} to {lengths[-1]} elements; pad them to one length, as in "
        "tokenizer(texts, padding=True), or give every row as a batch of its own"
    )


def _converted(tensor: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """The tensor as `dtype`, when its kind is the same and every value fits; 0 and 1 are also booleans."""
    if tensor.dtype == dtype:
        return tensor
    floats = tensor.is_floating_point() and dtype.is_floating_point
    integers = _is_whole(tensor.dtype) and _is_whole(dtype)
    if floats:
        return tensor.to(dtype)
    if integers and tensor.numel() and _fits(tensor, dtype):
        return tensor.to(dtype)
    given, expected = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
    why = "some values do not fit" if integers else f"convert it first, as in array.astype('{expected}')"
    raise InvalidInput(f"{where} has element type {given}, expected {expected}; {why}")


def _is_whole(dtype: torch.dtype) -> bool:
    return is_integer(dtype) or dtype == torch.bool


def is_integer(dtype: torch.dtype) -> bool:
    """True for integers; booleans are none."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return low <= int(tensor.min()) and int(tensor.max()) <= high


def check_shape(shape: tuple[int, ...], spec: ValueSpec, sizes: dict[str, tuple[int, str]], where: str) -> None:
    """Raise unless the shape is one that the input may have; `sizes` are those of named dimensions so far."""
    if spec.shape is None:
        return
    wrong = len(shape) != len(spec.shape) or any(
        isinstance(wanted, int) and wanted != size for wanted, size in zip(spec.shape, shape, strict=True)
    )
    if wrong:
        raise InvalidInput(f"{where} has shape {list(shape)}, expected {_shape_text(spec)}")
    for wanted, size in zip(spec.shape, shape, strict=True):
        if not isinstance(wanted, str):
            continue
        known, first = sizes.setdefault(wanted, (size, spec.name))
        if known != size:
            raise InvalidInput(f"{where} has {wanted}={size}, but input {first!r} has {wanted}={known}")


def _shape_text(spec: ValueSpec) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in spec.shape or ()) + "]"
