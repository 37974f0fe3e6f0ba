"""Run the model in this folder, which fxopt compiled; needs numpy and nothing else.

model = load()
results = model.run(image=array)  # numpy arrays by name
"""

from __future__ import annotations

import ctypes
import json
import platform
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_TYPES: dict[str, Any] = {
    "float32": np.float32, "int64": np.int64, "int32": np.int32, "bool": np.bool_, "uint8": np.uint8, "int8": np.int8,
}  # fmt: skip
_ALIGNMENT = 64
_ARCHITECTURES = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "aarch64", "arm64": "aarch64"}


def load(folder: str | Path | None = None) -> Any:
    """The functions of a folder that fxopt saved (default: the one of this file); the only one, or a dict of them.

    Raises:
        OSError: a file is missing, or the library is for another processor; the message says which.
    """
    folder = Path(__file__).parent if folder is None else Path(folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    library = open_library(folder, manifest)
    found = {name: Model(name, described, library) for name, described in manifest["functions"].items()}
    return next(iter(found.values())) if len(found) == 1 else found


class Model:
    """A function of the model. One call runs at a time; others wait."""

    def __init__(self, name: str, described: dict[str, Any], library: Library) -> None:
        self.name = name
        self.inputs: list[dict[str, Any]] = described[
            "inputs"
        ]  # names, element types, shapes (names for sizes that entries differ in)
        self.outputs: list[dict[str, Any]] = described["outputs"]
        self.entries: list[dict[str, Any]] = described["entries"]  # compiled sizes
        self._library = library

    def run(self, **inputs: Any) -> dict[str, Array]:
        """The outputs by name, of the inputs by name.

        Raises:
            TypeError: an input is missing, unknown, or of another element type.
            ValueError: the shapes are not among those that were compiled.
        """
        names = [port["name"] for port in self.inputs]
        for name in inputs:
            if name not in names:
                raise TypeError(f"unknown input {name!r}; {self.name} takes {', '.join(names)}")
        arrays = []
        for port in self.inputs:
            if port["name"] not in inputs:
                raise TypeError(f"input {port['name']!r} is missing; {self.name} takes {', '.join(names)}")
            arrays.append(_checked(np.asarray(inputs[port["name"]]), port))
        outputs = self.call(arrays)
        return {port["name"]: array for port, array in zip(self.outputs, outputs, strict=True)}

    def call(self, arrays: Sequence[Array]) -> list[Array]:
        """The outputs in order, of inputs in order, whose element types are not checked."""
        entry = self.entry(arrays)
        outputs: list[Array] = [np.empty(port["shape"], _TYPES[port["dtype"]]) for port in entry["outputs"]]
        self._library.call(entry, [np.ascontiguousarray(array) for array in arrays], outputs)
        return outputs

    def entry(self, arrays: Sequence[Array]) -> dict[str, Any]:
        """The entry point for arrays of these shapes."""
        shapes = [list(array.shape) for array in arrays]
        for entry in self.entries:
            if [port["shape"] for port in entry["inputs"]] == shapes:
                return entry
        known = " or ".join(self._shown([port["shape"] for port in entry["inputs"]]) for entry in self.entries)
        raise ValueError(f"{self.name} was compiled for {known}; given {self._shown(shapes)}")

    def _shown(self, shapes: list[list[int]]) -> str:
        names = (port["name"] for port in self.inputs)
        return ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))


class Library:
    """The shared library with its weights and one scratch memory."""

    def __init__(self, path: Path, weights: Array | None, arena_bytes: int) -> None:
        self._library = ctypes.CDLL(str(path))
        self._arena = aligned(arena_bytes)
        self._weights = weights
        self._functions: dict[str, Any] = {}
        self._lock = threading.Lock()
        if weights is None:
            address = getattr(self._library, path.stem.removeprefix("lib") + "_weights")
            address.restype = ctypes.c_void_p
            self._fixed = (self._arena.ctypes.data, address())
        else:
            self._fixed = (self._arena.ctypes.data, weights.ctypes.data)

    def call(self, entry: dict[str, Any], inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        """Run an entry point on C-contiguous arrays."""
        arrays = (*inputs, *outputs)
        function = self._functions.get(entry["symbol"])
        if function is None:
            function = getattr(self._library, entry["symbol"])
            function.argtypes = [ctypes.c_void_p] * (2 + len(arrays))
            function.restype = None
            self._functions[entry["symbol"]] = function
        with self._lock:
            function(*self._fixed, *(array.ctypes.data for array in arrays))


def open_library(folder: Path, manifest: dict[str, Any]) -> Library:
    """The library of a folder, once it is clear that this processor runs it."""
    build = manifest["builds"][0]
    path = folder / build["file"]
    here = _ARCHITECTURES.get(platform.machine().lower(), platform.machine())
    if build["arch"] != here:
        raise OSError(f"{path.name} is compiled for {build['arch']}; this machine is {here}")
    lacking = set(build["cpu_flags"]) - _flags()
    if lacking and _flags():
        raise OSError(f"{path.name} needs a processor with {', '.join(sorted(lacking))}, which this one lacks")
    size = max(entry["arena_bytes"] for function in manifest["functions"].values() for entry in function["entries"])
    return Library(path, _weights(folder, build), size)


def _weights(folder: Path, build: dict[str, Any]) -> Array | None:
    """The weights beside the library; None when they are in it."""
    if build["weights"] is None:
        return None
    path = folder / build["weights"]
    size = build["weights_bytes"]
    weights = aligned(size)
    read: Array = np.fromfile(path, np.uint8)
    if read.size < size:
        raise OSError(f"{path} has {read.size} bytes, expected {size}: it belongs to another library")
    weights[:size] = read[:size]
    return weights


def _flags() -> set[str]:
    """The processor's instruction sets as Linux names them; empty where it does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    found = next((line for line in lines if line.lower().startswith(("flags", "features"))), ":")
    return set(found.partition(":")[2].split())


def _checked(array: Array, port: dict[str, Any]) -> Array:
    if array.dtype != _TYPES[port["dtype"]]:
        raise TypeError(f"input {port['name']!r} is {array.dtype}, expected {port['dtype']}")
    return array


def aligned(nbytes: int) -> Array:
    """Memory at a multiple of 64 bytes."""
    whole = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % _ALIGNMENT
    return whole[start : start + max(nbytes, 1)]
