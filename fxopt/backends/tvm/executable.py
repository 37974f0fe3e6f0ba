"""Compiled models: called through ctypes on this machine or in wasmtime, one specialisation for each set of shapes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxopt.backends.base import Executable
from fxopt.backends.tvm.compile import Compiled, compile_graph, identifier
from fxopt.backends.tvm.entry import Port
from fxopt.backends.tvm.load import ALIGNMENT, HostLibrary, WasmLibrary, load
from fxopt.backends.tvm.loader import MODULE
from fxopt.backends.tvm.machine import Machine
from fxopt.errors import InvalidInput, OutputError
from fxopt.ir.graph import Graph

Array = npt.NDArray[Any]
Shapes = tuple[tuple[int, ...], ...]
_NUMPY = {"float32": np.float32, "int64": np.int64, "int32": np.int32, "uint8": np.bool_}


def aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Memory at a multiple of 64 bytes."""
    whole = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    return whole[start : start + max(nbytes, 1)]


class HostModel:
    """A specialisation in this process: no copies but of inputs that do not lie as C wants them."""

    def __init__(self, compiled: Compiled) -> None:
        signature = compiled.signature
        self.signature = signature
        self.arena = aligned(signature.arena_bytes)
        self.weights = aligned(signature.weights_bytes)
        self.weights[: signature.weights_bytes] = np.fromfile(compiled.weights, np.uint8)[: signature.weights_bytes]
        self.library = HostLibrary(compiled.library)
        count = 2 + len(signature.inputs) + len(signature.outputs)
        self.function = self.library.function(signature.name, count)
        self.fixed = (self.arena.ctypes.data, self.weights.ctypes.data)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """The outputs on arrays of the signature's types and shapes."""
        outputs: list[Array] = [np.empty(port.shape, _NUMPY[port.dtype]) for port in self.signature.outputs]
        addresses = (array.ctypes.data for array in (*inputs, *outputs))
        self.function(*self.fixed, *addresses)
        return outputs


class WasmModel:
    """A specialisation in wasmtime; inputs and outputs are copied."""

    def __init__(self, compiled: Compiled) -> None:
        self.signature = compiled.signature
        library = load(compiled.library)
        assert isinstance(library, WasmLibrary)
        self.library = library
        name = self.signature.name
        self.go = library.function(f"{name}_run")
        self.places = {
            word: [library.function(f"{name}_{word}")(library.store, i) for i in range(len(ports))]
            for word, ports in (("input", self.signature.inputs), ("output", self.signature.outputs))
        }

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """The outputs on arrays of the signature's types and shapes."""
        store, memory = self.library.store, self.library.memory
        for place, array in zip(self.places["input"], inputs, strict=True):
            memory.write(store, array.tobytes(), place)
        self.go(store)
        found = []
        for place, port in zip(self.places["output"], self.signature.outputs, strict=True):
            values: Array = np.frombuffer(memory.read(store, place, place + port.nbytes), _NUMPY[port.dtype])
            found.append(values.reshape(port.shape).copy())
        return found


class TvmExecutable(Executable):
    """A graph, compiled for the machine of its target and, where that is not here, for this one to run it."""

    def __init__(self, graph: Graph, machine: Machine, runner: Machine, shapes: Shapes) -> None:
        self.graph = graph
        self.machine = machine
        self.runner = runner
        self.name = identifier(graph.name)
        self._scratch = tempfile.TemporaryDirectory(prefix="fxopt-tvm-")
        self._models: dict[Shapes, HostModel | WasmModel] = {}
        self.first = self._compiled(machine, shapes)
        shown = "wasmtime" if machine.family == "wasm" else "this machine"
        away = "" if runner == machine else f"; compiled for {machine.triple}, which is not here"
        self.executed_on = f"tvm, 1 thread, {shown}{away}"
        self._shapes = shapes
        self._model(shapes)

    def _compiled(self, machine: Machine, shapes: Shapes) -> Compiled:
        folder = Path(tempfile.mkdtemp(dir=self._scratch.name))
        return compile_graph(self.graph, machine, list(shapes), folder, self.name)

    def _model(self, shapes: Shapes) -> HostModel | WasmModel:
        if shapes not in self._models:
            known = self.runner == self.machine and shapes == self._shapes
            compiled = self.first if known else self._compiled(self.runner, shapes)
            kind = WasmModel if self.runner.family == "wasm" else HostModel
            self._models[shapes] = kind(compiled)
        return self._models[shapes]

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs as tensors; shapes that were not seen before are compiled first."""
        specs = self.graph.inputs
        if len(inputs) != len(specs):
            raise InvalidInput(f"{len(inputs)} inputs given, the model takes {len(specs)}: {[s.name for s in specs]}")
        arrays = [_array(value) for value in inputs]
        for array, spec in zip(arrays, specs, strict=True):
            _check(array, spec)
        model = self._model(tuple(array.shape for array in arrays))
        ports = model.signature.inputs
        given = [_of_port(array, port) for array, port in zip(arrays, ports, strict=True)]
        return [torch.from_numpy(array) for array in model.run(given)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder: library, header, weights, manifest, and for WebAssembly a module that loads it.

        Raises:
            OutputError: the folder cannot be written.
        """
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        signature = self.first.signature
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            shutil.copy(self.first.library, part)
            if self.machine.family == "wasm":
                (part / f"{signature.name}.mjs").write_text(MODULE.replace("NAME", signature.name), encoding="utf-8")
            else:
                shutil.copy(self.first.library.with_name(f"{signature.name}.h"), part)
                shutil.copy(self.first.weights, part)
            manifest = {
                "format": "fxopt-tvm-1",
                "machine": {"triple": self.machine.triple, "features": list(self.machine.features)},
                "kernels": list(self.first.steps),
                **signature.manifest(),
            }
            (part / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            os.replace(part, target)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Drop the models and the scratch folder."""
        self._models.clear()
        self._scratch.cleanup()


def _array(value: Any) -> Array:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    return np.asarray(value)


def _check(array: Array, spec: Any) -> None:
    fits = len(array.shape) == len(spec.shape) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise InvalidInput(f"input {spec.name!r} has shape {list(array.shape)}, expected {list(spec.shape)}")


def _of_port(array: Array, port: Port) -> Array:
    wanted = _NUMPY[port.dtype]
    if array.dtype != wanted:
        raise InvalidInput(f"input {port.name!r} is {array.dtype}, expected {np.dtype(wanted)}")
    return np.ascontiguousarray(array)
