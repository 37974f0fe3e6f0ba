"""Calibration data in files: `.npz` and `.npy` of arrays, `.jsonl` and `.json` of rows, and folders of them."""

from __future__ import annotations

import difflib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fxopt.calibration.checks import Array, Sample, Warn, as_tensor, check, check_names
from fxopt.calibration.rows import batches, lacks_batch_axis, taken
from fxopt.errors import InvalidInput
from fxopt.ir.graph import ValueSpec
from fxopt.ir.onnx.dtypes import to_numpy

_ARRAYS, _ROWS = (".npz", ".npy"), (".jsonl", ".json")
_KINDS = "an .npz, .npy, .jsonl or .json file"


def from_path(path: Path, inputs: Sequence[ValueSpec], batch_size: int, say: Warn) -> list[Sample]:
    """The batches of a file, or of all files of a folder.

    Raises:
        InvalidInput: it cannot be read, or does not fit the model.
    """
    if path.is_dir():
        return _from_folder(path, inputs, batch_size, say)
    if not path.exists():
        hint = "; did you mean 'random'?" if difflib.get_close_matches(str(path), ["random"]) else ""
        raise InvalidInput(f"calibration {path}: no such file; expected {_KINDS}, a folder or 'random'{hint}")
    return _from_file(path, inputs, batch_size, say)


def from_mapping(
    given: Mapping[str, Any], inputs: Sequence[ValueSpec], batch_size: int, where: str, say: Warn
) -> list[Sample]:
    """The rows of arrays by name, as in an .npz; or the only row."""
    named = taken(given, inputs, where, say)
    check_names(named, inputs, where)
    tensors = {name: as_tensor(value, f"{where}: input {name!r}") for name, value in named.items()}
    if lacks_batch_axis(tensors, inputs):
        return list(batches([(where, tensors)], inputs, say))
    return _batches({name: to_numpy(value) for name, value in tensors.items()}, inputs, batch_size, where, say)


def _from_folder(folder: Path, inputs: Sequence[ValueSpec], batch_size: int, say: Warn) -> list[Sample]:
    files = sorted(file for file in folder.iterdir() if file.suffix in (*_ARRAYS, *_ROWS))
    if not files:
        raise InvalidInput(f"calibration {folder}: the folder holds no .npz, .npy, .jsonl or .json files")
    names = {spec.name for spec in inputs}
    if {file.stem for file in files if file.suffix == ".npy"} == names and len(files) == len(names):
        arrays = {file.stem: _read(file) for file in files}
        return _batches(arrays, inputs, batch_size, f"calibration {folder}", say)
    return [batch for file in files for batch in _from_file(file, inputs, batch_size, say)]


def _from_file(path: Path, inputs: Sequence[ValueSpec], batch_size: int, say: Warn) -> list[Sample]:
    where = f"calibration {path}"
    if path.suffix in _ARRAYS:
        return _batches(_arrays(path, inputs), inputs, batch_size, where, say)
    if path.suffix not in _ROWS:
        raise InvalidInput(f"{where}: expected {_KINDS}")
    content = list(_lines(path)) if path.suffix == ".jsonl" else _json(path)
    if isinstance(content, dict):
        return from_mapping(content, inputs, batch_size, where, say)
    if not isinstance(content, list) or not content:
        raise InvalidInput(f"{where} holds no rows; expected objects {{input name: numbers}}")
    return list(batches((_row(where, item) for item in content), inputs, say))


# ---- JSON


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(line, what is in it) for every line that is not blank."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"line {number}", _parsed(line, f"calibration {path}: line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"calibration {path} cannot be read: {error}") from error


def _json(path: Path) -> Any:
    """What the file holds; rows of a list come with their number."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"calibration {path} cannot be read: {error}") from error
    content = _parsed(text, f"calibration {path}")
    return [(f"row {index}", row) for index, row in enumerate(content)] if isinstance(content, list) else content


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{where} is not JSON: {error}") from error


def _row(where: str, item: tuple[str, Any]) -> tuple[str, Any]:
    place, row = item
    if not isinstance(row, dict):
        raise InvalidInput(f"{where}: {place} holds a {type(row).__name__}; expected an object {{input name: numbers}}")
    return f"{where}: {place}", row


# ---- arrays


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
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            return {name: content[name] for name in content.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInput(f"calibration {path} cannot be read as {path.suffix}: {reason}") from error


def _batches(
    given: Mapping[str, Array], inputs: Sequence[ValueSpec], batch_size: int, where: str, say: Warn
) -> list[Sample]:
    arrays = taken(given, inputs, where, say)
    check_names(arrays, inputs, where)
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
        check({name: _rows(arrays[name], start, step, name in whole) for name in arrays}, inputs, where, say)
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
