"""Calibration data: sample inputs from files, iterables or a random generator, checked against a model's inputs.

Files: an `.npz` holds one array per model input under the input's name, samples along axis 0; an `.npy` is the array of
the only input; a folder holds such files (or one `.npy` per input, named after it). Rows are stacked to batches: of the
input's first dimension where that is fixed, else of `batch_size`. An input of one axis less than its array has no batch
axis: each row is one whole input.
"""

from __future__ import annotations

import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxopt.errors import InvalidInput, InvalidOption, unknown
from fxopt.ir.graph import Graph, ValueSpec
from fxopt.ir.onnx.dtypes import from_numpy

Array = npt.NDArray[Any]
Sample = dict[str, torch.Tensor]  # one batch as the model takes it, by input name
Warn = Callable[[str], object]

RANDOM_SAMPLES = 16
RANDOM_DIM = 16  # size of a dynamic dimension other than the first one
_INT_RANGE = (0, 2)  # where the model does not show how large an index may be


def load(
    source: str | os.PathLike[str] | Iterable[Any],
    graph: Graph,
    *,
    batch_size: int = 1,
    samples: int | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    warn: Warn = warnings.warn,
) -> list[Sample]:
    """The batches that `source` gives.

    Args:
        source: "random"; "weights" (no batches: weights alone are judged); a file or folder; or an iterable of batches,
            each a dict by input name, a tuple in the order of the inputs, or the only input.
        batch_size: rows per batch, where the model leaves it open.
        samples: at most so many batches (random: so many, default 16).
        input_shapes: sizes of dynamic dimensions for random data.
        warn: called with what the user should know about the data.

    Raises:
        InvalidInput: the data cannot be read or does not fit the model.
    """
    if batch_size < 1 or (samples is not None and samples < 1):
        raise InvalidOption(f"batch size {batch_size} and samples {samples} must be 1 or more")
    if isinstance(source, str) and source == "weights":
        return []
    if isinstance(source, str) and source == "random":
        return random_samples(graph, samples or RANDOM_SAMPLES, batch_size, seed, input_shapes, warn)
    if isinstance(source, (str, os.PathLike)):
        found = _from_path(Path(source), graph.inputs, batch_size)
        return found[:samples]
    if isinstance(source, (torch.Tensor, np.ndarray, Mapping)) or not isinstance(source, Iterable):
        raise InvalidInput(
            f"calibration: expected a path, 'random', 'weights' or an iterable of batches, got a "
            f"{type(source).__name__}; put a single batch into a list"
        )
    found = [
        check(_by_name(item, graph.inputs, f"calibration batch {index}"), graph.inputs, f"calibration batch {index}")
        for index, item in enumerate(islice(source, samples))
    ]
    if not found:
        raise InvalidInput("calibration: the iterable gave no batches (a generator that was used up before?)")
    return found


# ---- checks


def check(sample: Mapping[str, Any], inputs: Sequence[ValueSpec], where: str) -> Sample:
    """The batch in the order of the inputs, with safe conversions made.

    Raises:
        InvalidInput: a name, element type or shape does not fit.
    """
    _check_names(sample, inputs, where)
    sizes: dict[str, tuple[int, str]] = {}
    return {spec.name: _checked(sample[spec.name], spec, sizes, where) for spec in inputs}


def _check_names(names: Iterable[str], inputs: Sequence[ValueSpec], where: str) -> None:
    known = [spec.name for spec in inputs]
    given = list(names)
    for name in given:
        if name not in known:
            raise InvalidInput(f"{where}: {unknown('model input', name, known)}")
    missing = [str(spec) for spec in inputs if spec.name not in given]
    if missing:
        raise InvalidInput(
            f"{where}: the model input {' and '.join(missing)} is missing; given: {', '.join(given) or 'none'}"
        )


def _checked(value: Any, spec: ValueSpec, sizes: dict[str, tuple[int, str]], where: str) -> torch.Tensor:
    where = f"{where}: input {spec.name!r}"
    if spec.dtype is None:
        raise InvalidInput(f"{where} is not a tensor of numbers; it cannot be calibrated")
    tensor = _converted(_tensor(value, where), spec.dtype, where)
    _check_shape(tuple(tensor.shape), spec, sizes, where)
    if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
        raise InvalidInput(f"{where} holds NaN; leave such samples out")
    return tensor


def _tensor(value: Any, where: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InvalidInput(f"{where} is not an array: {error}") from error
    try:
        return from_numpy(array)
    except TypeError as error:
        raise InvalidInput(f"{where} has element type {array.dtype}, which is no tensor of numbers") from error


def _converted(tensor: torch.Tensor, dtype: torch.dtype, where: str) -> torch.Tensor:
    """The tensor as `dtype`, when its kind is the same and every value fits."""
    if tensor.dtype == dtype:
        return tensor
    floats = tensor.is_floating_point() and dtype.is_floating_point
    integers = _is_integer(tensor.dtype) and _is_integer(dtype)
    if floats:
        return tensor.to(dtype)
    if integers and tensor.numel() and _fits(tensor, dtype):
        return tensor.to(dtype)
    given, expected = (str(kind).removeprefix("torch.") for kind in (tensor.dtype, dtype))
    why = "some values do not fit" if integers else f"convert it first, as in array.astype('{expected}')"
    raise InvalidInput(f"{where} has element type {given}, expected {expected}; {why}")


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _fits(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    limits = torch.iinfo(dtype)
    return limits.min <= int(tensor.min()) and int(tensor.max()) <= limits.max


def _check_shape(shape: tuple[int, ...], spec: ValueSpec, sizes: dict[str, tuple[int, str]], where: str) -> None:
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


def _by_name(item: Any, inputs: Sequence[ValueSpec], where: str) -> dict[str, Any]:
    """One batch of an iterable as a dictionary."""
    if isinstance(item, Mapping):
        return dict(item)
    values = list(item) if isinstance(item, (tuple, list)) else [item]
    if len(values) != len(inputs):
        expected = ", ".join(map(str, inputs))
        raise InvalidInput(
            f"{where} has {len(values)} values, the model takes {len(inputs)}: {expected}; leave labels out"
        )
    return dict(zip((spec.name for spec in inputs), values, strict=True))


# ---- files


def _from_path(path: Path, inputs: Sequence[ValueSpec], batch_size: int) -> list[Sample]:
    if path.is_dir():
        return _from_folder(path, inputs, batch_size)
    if not path.exists():
        raise InvalidInput(
            f"calibration {path}: no such file; expected an .npz, an .npy, a folder, 'random' or 'weights'"
        )
    return _batches(_arrays(path, inputs), inputs, batch_size, f"calibration {path}")


def _from_folder(folder: Path, inputs: Sequence[ValueSpec], batch_size: int) -> list[Sample]:
    files = sorted(file for file in folder.iterdir() if file.suffix in (".npz", ".npy"))
    if not files:
        raise InvalidInput(f"calibration {folder}: the folder holds no .npz or .npy files")
    names = {spec.name for spec in inputs}
    if {file.stem for file in files if file.suffix == ".npy"} == names and len(files) == len(names):
        arrays = {file.stem: _read(file) for file in files}
        return _batches(arrays, inputs, batch_size, f"calibration {folder}")
    found = []
    for file in files:
        found += _batches(_arrays(file, inputs), inputs, batch_size, f"calibration {file}")
    return found


def _arrays(path: Path, inputs: Sequence[ValueSpec]) -> dict[str, Array]:
    content = _read(path)
    if isinstance(content, dict):
        return content
    if len(inputs) != 1:
        expected = ", ".join(map(str, inputs))
        raise InvalidInput(
            f"calibration {path}: an .npy holds one input, the model takes {len(inputs)}: {expected}; use an .npz"
        )
    return {inputs[0].name: content}


def _read(path: Path) -> Any:
    """The array of an .npy, or the arrays of an .npz by name; nothing is unpickled."""
    if path.suffix not in (".npz", ".npy"):
        raise InvalidInput(f"calibration {path}: expected an .npz or .npy file")
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return {name: content[name] for name in content.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInput(f"calibration {path} cannot be read as {path.suffix}: {reason}") from error


def _batches(arrays: Mapping[str, Array], inputs: Sequence[ValueSpec], batch_size: int, where: str) -> list[Sample]:
    _check_names(arrays, inputs, where)
    for name, array in arrays.items():
        if array.ndim == 0 or array.shape[0] == 0:
            raise InvalidInput(f"{where}: {name!r} has shape {list(array.shape)}; expected samples along axis 0")
    rows = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(rows.values())) > 1:
        raise InvalidInput(f"{where}: the inputs have different numbers of samples: {rows}")
    batch = _rows_per_batch(inputs, batch_size, where)
    total = next(iter(rows.values()), 0)
    if batch > 1 and total < batch:
        raise InvalidInput(f"{where}: {total} samples do not fill one batch of {batch}")
    whole = {spec.name for spec in inputs if spec.shape is not None and len(spec.shape) == arrays[spec.name].ndim - 1}
    if whole and batch > 1 and len(whole) < len(inputs):
        raise InvalidInput(f"{where}: {sorted(whole)} have no batch axis, so a batch size of {batch} is not possible")
    step = 1 if whole else batch
    return [
        check({name: _rows(arrays[name], start, step, name in whole) for name in arrays}, inputs, where)
        for start in range(0, total - step + 1, step)
    ]


def _rows(array: Array, start: int, count: int, whole: bool) -> Array:
    return np.asarray(array[start]) if whole else array[start : start + count]


def _rows_per_batch(inputs: Sequence[ValueSpec], batch_size: int, where: str) -> int:
    fixed = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)}
    open_ones = any(not spec.shape or not isinstance(spec.shape[0], int) for spec in inputs)
    if not fixed or open_ones:
        return batch_size
    if len(fixed) > 1:
        raise InvalidInput(
            f"{where}: the inputs have different first dimensions {sorted(fixed)}; give an iterable of batches"
        )
    return int(fixed.pop())


# ---- random data


def random_samples(
    graph: Graph,
    samples: int = RANDOM_SAMPLES,
    batch_size: int = 1,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    warn: Warn = warnings.warn,
) -> list[Sample]:
    """Seeded random batches: normal floats, even booleans, and integers below what the model can look up."""
    check_shapes_option(input_shapes or {}, graph.inputs)
    sizes = _sizes(graph.inputs, batch_size, input_shapes or {}, warn)
    generator = torch.Generator().manual_seed(seed)
    ranges = {spec.name: _range(graph, index, spec, warn) for index, spec in enumerate(graph.inputs)}
    warn("calibration data are random: ranges and errors found with them may differ from those of real data")
    return [
        {spec.name: _random(spec, sizes[spec.name], ranges[spec.name], generator) for spec in graph.inputs}
        for _ in range(samples)
    ]


def check_shapes_option(shapes: Mapping[str, Sequence[int]], inputs: Sequence[ValueSpec]) -> None:
    """Raise unless each shape names an input and agrees with its fixed dimensions."""
    known = {spec.name: spec for spec in inputs}
    for name, shape in shapes.items():
        if name not in known:
            raise InvalidOption(f"input shape: {unknown('model input', name, known)}")
        try:
            _check_shape(tuple(shape), known[name], {}, f"input shape of {name!r}")
        except InvalidInput as error:
            raise InvalidOption(str(error)) from error


def _sizes(
    inputs: Sequence[ValueSpec], batch_size: int, given: Mapping[str, Sequence[int]], warn: Warn
) -> dict[str, tuple[int, ...]]:
    named: dict[str, int] = {}
    for spec in inputs:
        for dim, size in zip(spec.shape or (), given.get(spec.name, ()), strict=False):
            if isinstance(dim, str):
                named[dim] = size
    shapes = {}
    for spec in inputs:
        if spec.name in given:
            shapes[spec.name] = tuple(given[spec.name])
            continue
        if spec.shape is None:
            raise InvalidInput(
                f"input {spec.name!r} has no shape; give --input-shape {spec.name}:1,... for random data"
            )
        shape = []
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                shape.append(dim)
                continue
            size = named.get(dim or "", batch_size if axis == 0 else RANDOM_DIM)
            if axis and (dim or "") not in named:
                warn(f"input {spec.name!r}: dynamic dimension {dim or axis} is taken as {size}; --input-shape sets it")
            if dim is not None:
                named[dim] = size
            shape.append(size)
        shapes[spec.name] = tuple(shape)
    return shapes


def _range(graph: Graph, index: int, spec: ValueSpec, warn: Warn) -> tuple[int, int]:
    if spec.dtype is None:
        raise InvalidInput(f"input {spec.name!r} is not a tensor of numbers; random data cannot be made for it")
    if not _is_integer(spec.dtype):
        return _INT_RANGE
    bound = _lookup_bound(graph, index)
    low, high = (0, bound) if bound is not None else _INT_RANGE
    found = "rows of the table that it indexes" if bound is not None else "the model shows no bound; give real data"
    warn(f"input {spec.name!r}: random integers from {low} to {high - 1} ({found})")
    return low, high


def _lookup_bound(graph: Graph, index: int) -> int | None:
    """Rows of the smallest constant table that the input indexes directly."""
    bounds = []
    for user in graph.placeholders[index].users:
        name = re.sub(r".*aten\.|\..*", "", str(user.target))
        gathers = getattr(user.target, "op_type", "") == "Gather" or name == "embedding"
        table = graph.constant(user.args[0]) if gathers and user.args else None
        if table is not None and table.dim():
            axis: Any = user.kwargs.get("axis", 0)
            bounds.append(table.shape[axis])
    return min(bounds, default=None)


def _random(
    spec: ValueSpec, shape: tuple[int, ...], bounds: tuple[int, int], generator: torch.Generator
) -> torch.Tensor:
    assert spec.dtype is not None
    if spec.dtype.is_complex or spec.dtype.is_floating_point:
        drawn = torch.randn(shape, generator=generator, dtype=torch.cfloat if spec.dtype.is_complex else torch.float32)
        return drawn.to(spec.dtype)
    if spec.dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    limits = torch.iinfo(spec.dtype)
    low, high = max(bounds[0], limits.min), min(bounds[1], math.floor(limits.max))
    return torch.randint(low, max(high, low + 1), shape, generator=generator).to(spec.dtype)
