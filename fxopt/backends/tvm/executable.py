"""A compiled function that runs in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxopt.backends.base import Executable
from fxopt.backends.tvm.buckets import combinations, sizes_of
from fxopt.backends.tvm.compile import Build
from fxopt.backends.tvm.expand import settled
from fxopt.backends.tvm.package import Package
from fxopt.backends.tvm.runners import NUMPY, Runner, runner_of
from fxopt.backends.tvm.source import Shapes, Source, source_at
from fxopt.backends.tvm.verify import verify
from fxopt.errors import InvalidInput
from fxopt.ir.folders import write_folder
from fxopt.ir.graph import Graph

Array = npt.NDArray[Any]


class TvmExecutable(Executable):
    """The one function of a package; where its target is not here, this machine's code runs instead.

    Args:
        is_open: sizes were not fixed: there is nothing to save.
    """

    def __init__(self, package: Package, *, is_open: bool = False) -> None:
        self.package = package
        self.is_open = is_open
        self._runners: dict[Shapes, tuple[Runner, dict[str, Any]]] = {}
        here = [made for made in package.builds if made.machine == package.here]
        self._keep(here[0] if here else package.build(package.here, package.sources), package.sources)
        shown = "wasmtime" if package.here.family == "wasm" else "this machine"
        away = "" if here else f"; compiled for {package.target.name}, which is not here"
        self.executed_on = f"tvm, 1 thread, {shown}{away}"

    def _keep(self, made: Build, sources: Sequence[Source]) -> None:
        runner = runner_of(made, self.package.name)
        for source, entry in zip(sources, made.entries, strict=True):
            self._runners[source.shapes] = runner, entry.to_json()

    @property
    def graph(self) -> Graph:
        """The function as it came."""
        return next(iter(self.package.graphs.values()))

    @property
    def steps(self) -> tuple[str, ...]:
        """The kernels that the first entry point calls, as "kernel (node)"."""
        return self.package.builds[0].entries[0].kernels

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs as tensors; sizes that were not compiled before are compiled first, for this machine."""
        arrays = arrays_of(inputs, self.graph)
        runner, entry = self._runner(tuple(array.shape for array in arrays))
        given = [of_port(array, port) for array, port in zip(arrays, entry["inputs"], strict=True)]
        return [torch.from_numpy(array) for array in runner.run(entry, given)]

    def _runner(self, shapes: Shapes) -> tuple[Runner, dict[str, Any]]:
        if shapes not in self._runners:
            name = self.package.name
            source = source_at(self.graph, sizes_of(self.graph, shapes), name, name)
            source, _ = settled(source, self.package.here)
            self._keep(self.package.build(self.package.here, [source]), [source])
        return self._runners[shapes]

    def verify(self, samples: Sequence[Sequence[Any]]) -> str:
        """Run every entry point of every build where it can be run, and compare with torch."""
        return verify(self.package, dict.fromkeys(self.package.graphs, samples))

    def closed(self) -> Package:
        """The package, when it is whole.

        Raises:
            Unsupported: a dimension has no fixed sizes.
        """
        if self.is_open:
            combinations(self.graph, {})
        return self.package

    def write(self, folder: Path) -> dict[str, Any]:
        """Write libraries and loaders into an empty folder; returns the manifest.

        Raises:
            Unsupported: a dimension has no fixed sizes.
        """
        return self.closed().write(folder)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder: libraries, loaders, manifest.

        Raises:
            OutputError: the folder cannot be written.
            Unsupported: a dimension has no fixed sizes.
        """
        write_folder(Path(path), self.write)

    def close(self) -> None:
        """Drop the libraries and the scratch folder."""
        self._runners.clear()
        self.package.close()


def arrays_of(inputs: Sequence[Any], graph: Graph) -> list[Array]:
    """Tensors, or what numpy takes, as arrays.

    Raises:
        InvalidInput: their number is not that of the graph's inputs.
    """
    if len(inputs) != len(graph.inputs):
        names = [spec.name for spec in graph.inputs]
        raise InvalidInput(f"{len(inputs)} inputs given, the model takes {len(names)}: {names}")
    return [value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value) for value in inputs]


def of_port(array: Array, port: Mapping[str, Any]) -> Array:
    """The array, contiguous.

    Raises:
        InvalidInput: its element type is another one than the port's.
    """
    wanted = NUMPY[port["dtype"]]
    if array.dtype != wanted:
        raise InvalidInput(f"input {port['name']!r} is {array.dtype}, expected {np.dtype(wanted)}")
    return np.ascontiguousarray(array)
