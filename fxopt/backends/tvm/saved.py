"""Open a folder with a compiled model and run it in this process, by fxopt's own means."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt.backends.base import Executable
from fxopt.backends.tvm.artifact.manifest import FORMAT
from fxopt.backends.tvm.buckets import sizes_of
from fxopt.backends.tvm.executable import arrays_of, of_port
from fxopt.backends.tvm.runners import runner_in
from fxopt.errors import InvalidInput, InvalidModel, unknown
from fxopt.ir.folders import MANIFEST, digest, write_folder
from fxopt.ir.graph import Graph, ValueSpec

_DTYPES = {
    "float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool, "uint8": torch.uint8,
    "int8": torch.int8,
}  # fmt: skip


class SavedExecutable(Executable):
    """A function of a saved folder; sizes are those that were compiled."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], function: str) -> None:
        self.folder = folder
        self._manifest = manifest
        self._described = manifest["functions"][function]
        self.graph = signature(function, self._described)
        build = manifest["builds"][-1]  # of WebAssembly, the one with relaxed SIMD
        try:
            self._runner = runner_in(folder, manifest, build)
        except OSError as error:  # of another machine, or damaged
            raise InvalidModel(f"{folder} does not run here: {error}") from error
        where = "wasmtime" if build["arch"] == "wasm32" else "this machine"
        self.executed_on = f"tvm, 1 thread, {where}"

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs as tensors."""
        arrays = arrays_of(inputs, self.graph)
        entry = self._entry([list(array.shape) for array in arrays])
        given = [of_port(array, port) for array, port in zip(arrays, entry["inputs"], strict=True)]
        return [torch.from_numpy(array) for array in self._runner.run(entry, given)]

    def _entry(self, shapes: list[list[int]]) -> Mapping[str, Any]:
        entries: list[dict[str, Any]] = self._described["entries"]
        for entry in entries:
            if [port["shape"] for port in entry["inputs"]] == shapes:
                return entry
        sizes = sizes_of(self.graph, shapes)
        known = ", ".join(" ".join(f"{name}={size}" for name, size in entry["sizes"].items()) for entry in entries)
        given = " ".join(f"{name}={size}" for name, size in sizes.items())
        raise InvalidInput(f"the model is compiled for {known}; the inputs have {given}")

    def write(self, folder: Path) -> dict[str, Any]:
        """Copy the files; returns the manifest."""
        for name in self._manifest["files"]:
            shutil.copyfile(self.folder / name, folder / name)
        return {key: value for key, value in self._manifest.items() if key != "files"}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Copy the folder."""
        write_folder(Path(path), self.write)


def open_saved(folder: Path, manifest: Mapping[str, Any], function: str | None) -> SavedExecutable:
    """A function of a folder that was saved; None: the only one.

    Raises:
        InvalidModel: the folder is of another format, damaged, or for another machine.
        UnknownName: it has no such function.
    """
    if manifest.get("library") != FORMAT:
        raise InvalidModel(f"{folder} has format {manifest.get('library')}; this version reads {FORMAT}")
    for name, written in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise InvalidModel(f"{folder} lacks {name}, which {MANIFEST} lists; save the result again")
        if digest(path) != written["sha256"]:
            raise InvalidModel(f"{path} is not the file that was saved (its SHA-256 differs from {MANIFEST})")
    names = list(manifest["functions"])
    if function is None and len(names) > 1:
        raise InvalidModel(f"{folder} has the functions {', '.join(names)}; choose one with function=")
    chosen = names[0] if function is None else function
    if chosen not in names:
        raise unknown("function", chosen, names)
    return SavedExecutable(folder, manifest, chosen)


def signature(name: str, described: Mapping[str, Any]) -> Graph:
    """A graph with the function's inputs and outputs, and nothing between."""
    body = fx.Graph()
    for index, _ in enumerate(described["inputs"]):
        body.placeholder(f"x{index}")
    body.output(())
    inputs, outputs = (
        tuple(ValueSpec(port["name"], _DTYPES[port["dtype"]], tuple(port["shape"])) for port in described[key])
        for key in ("inputs", "outputs")
    )
    return Graph(body, torch.nn.Module(), "torch", inputs, outputs, name)
