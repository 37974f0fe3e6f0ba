"""Calibration that goes on after a kill: the statistics so far, in one `.npz` file. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxopt.errors import InvalidInput, OutputError
from fxopt.ir.graph import Graph
from fxopt.ir.structural_hash import structural_hash, tensor_bytes
from fxopt.passes.histogram import Histogram
from fxopt.passes.stats import Extremes, ValueStats

_SCALARS = ("minimum", "maximum", "mean_minimum", "mean_maximum", "calls", "_rows", "_share")
_TENSORS = ("sample", "sample_half", "channel_minimum", "channel_maximum", "channel_mean", "items")


def fingerprint(graph: Graph, samples: Sequence[Sequence[Any]], names: Sequence[str], counted: Sequence[str]) -> str:
    """Of everything that the statistics depend on: the graph, the data, and what is observed."""
    digest = hashlib.sha256(structural_hash(graph).encode())
    digest.update(json.dumps([names, counted]).encode())
    for sample in samples:
        for value in sample:
            tensor = torch.as_tensor(value).contiguous()
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def save(path: Path, key: str, done: int, values: dict[str, ValueStats]) -> None:
    """Write the statistics after `done` samples.

    Raises:
        OutputError: the file cannot be written.
    """
    arrays: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for index, (name, value) in enumerate(sorted(values.items())):
        plain[name] = {field: getattr(value, field) for field in _SCALARS}
        plain[name]["halves"] = [[half.minimum, half.maximum] for half in value.halves]
        tensors = {field: getattr(value, field) for field in _TENSORS}
        for number, half in enumerate(value.halves):
            tensors[f"half{number}_minimum"], tensors[f"half{number}_maximum"] = (
                half.channel_minimum,
                half.channel_maximum,
            )
        if value.histogram is not None:
            plain[name]["histogram"] = [value.histogram.low, value.histogram.high]
            tensors["counts"] = value.histogram.counts
        arrays |= {f"{index}.{field}": tensor.numpy() for field, tensor in tensors.items() if tensor is not None}
    header = json.dumps({"fingerprint": key, "done": done, "values": plain}).encode()
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            np.savez(file, allow_pickle=False, header=np.frombuffer(header, np.uint8), **arrays)
        os.replace(scratch, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def load(path: Path, key: str) -> tuple[int, dict[str, ValueStats]] | None:
    """Samples done and their statistics; None when there is no such file yet.

    Raises:
        InvalidInput: it is another kind of file, or belongs to another model, other data or other passes.
    """
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            header = json.loads(data["header"].tobytes())
            arrays = {name: torch.from_numpy(data[name]) for name in data.files if name != "header"}
        if header["fingerprint"] != key:
            raise InvalidInput(
                f"{path} belongs to another model, other data or other passes; give another file, or delete it"
            )
        found = {
            name: _value(plain, {field: arrays[entry] for entry, field in _fields(arrays, index)})
            for index, (name, plain) in enumerate(sorted(header["values"].items()))
        }
        return int(header["done"]), found
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            f"{path} is not the state of a calibration ({error}); give another file, or delete it"
        ) from error


def _fields(arrays: dict[str, torch.Tensor], index: int) -> list[tuple[str, str]]:
    return [(entry, entry.partition(".")[2]) for entry in arrays if entry.partition(".")[0] == str(index)]


def _value(plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ValueStats:
    halves = [
        Extremes(low, high, tensors.get(f"half{number}_minimum"), tensors.get(f"half{number}_maximum"))
        for number, (low, high) in enumerate(plain["halves"])
    ]
    value = ValueStats(halves=(halves[0], halves[1]))
    for field in _SCALARS:
        setattr(value, field, plain[field])
    for field in _TENSORS:
        setattr(value, field, tensors.get(field))
    if "histogram" in plain:
        low, high = plain["histogram"]
        value.histogram = Histogram(low, high, tensors["counts"])
    return value
