"""Run a build in this process: a library of this machine through ctypes, a WebAssembly module in wasmtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.artifact.native_loader import Library, aligned, open_library
from fxopt.backends.tvm.compile import Build
from fxopt.backends.tvm.load import WasmLibrary

Array = npt.NDArray[Any]
NUMPY: dict[str, Any] = {
    "float32": np.float32, "int64": np.int64, "int32": np.int32, "bool": np.bool_, "uint8": np.uint8, "int8": np.int8,
}  # fmt: skip


class Runner(Protocol):
    """Runs entry points, which are given as the manifest describes them."""

    def run(self, entry: Mapping[str, Any], inputs: Sequence[Array]) -> list[Array]:
        """The outputs on arrays of the entry's types and shapes."""
        ...


class NativeRunner:
    """A shared library in this process: no copies but of inputs that do not lie as C wants them."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def run(self, entry: Mapping[str, Any], inputs: Sequence[Array]) -> list[Array]:
        """The outputs on arrays of the entry's types and shapes."""
        outputs: list[Array] = [np.empty(port["shape"], NUMPY[port["dtype"]]) for port in entry["outputs"]]
        self.library.call(dict(entry), [np.ascontiguousarray(array) for array in inputs], outputs)
        return outputs


class WasmRunner:
    """A module in wasmtime; inputs and outputs are copied. The module's memory grows to what an entry needs."""

    def __init__(self, library: Path, name: str, weights: Path | None, weights_bytes: int, arena_bytes: int) -> None:
        self.library = WasmLibrary(library)
        store = self.library.store
        (self._arena,) = self.library.place([np.empty(arena_bytes, np.uint8)], keep=True)
        if weights is None:
            self._weights = self.library.function(f"{name}_weights")(store)
        else:
            stored = np.fromfile(weights, np.uint8)[:weights_bytes]
            (self._weights,) = self.library.place([stored], keep=True)
            self.library.memory.write(store, stored.tobytes(), self._weights)

    def run(self, entry: Mapping[str, Any], inputs: Sequence[Array]) -> list[Array]:
        """The outputs on arrays of the entry's types and shapes."""
        library = self.library
        outputs: list[Array] = [np.empty(port["shape"], NUMPY[port["dtype"]]) for port in entry["outputs"]]
        places = library.place([*inputs, *outputs])
        for place, array in zip(places, inputs, strict=False):
            library.memory.write(library.store, array.tobytes(), place)
        library.function(entry["symbol"])(library.store, self._arena, self._weights, *places)
        found = []
        for place, array in zip(places[len(inputs) :], outputs, strict=True):
            values: Array = np.frombuffer(library.memory.read(library.store, place, place + array.nbytes), array.dtype)
            found.append(values.reshape(array.shape).copy())
        return found


def runner_of(build: Build, name: str) -> Runner:
    """The runner of a build for this machine or for WebAssembly."""
    arena = max(entry.arena_bytes for entry in build.entries)
    size = build.weights_bytes
    if build.machine.family == "wasm":
        return WasmRunner(build.library, name, None if build.embedded else build.weights, size, arena)
    weights: Array | None = None
    if not build.embedded:
        weights = aligned(size)
        weights[:size] = np.fromfile(build.weights, np.uint8)[:size]
    return NativeRunner(Library(build.library, weights, arena))


def runner_in(folder: Path, manifest: Mapping[str, Any], build: Mapping[str, Any]) -> Runner:
    """The runner of a saved build."""
    if build["arch"] != "wasm32":
        return NativeRunner(open_library(folder, dict(manifest)))
    weights = None if build["weights"] is None else folder / build["weights"]
    entries = [entry for function in manifest["functions"].values() for entry in function["entries"]]
    arena = max(entry["arena_bytes"] for entry in entries)
    return WasmRunner(folder / build["file"], manifest["name"], weights, build["weights_bytes"], arena)
