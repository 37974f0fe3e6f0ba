"""Regions with kernels compiled, the rest in torch: only on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt.backends.base import Executable
from fxopt.backends.tvm.buckets import guessed_sizes
from fxopt.backends.tvm.executable import TvmExecutable
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.package import Package
from fxopt.backends.tvm.source import Source, identifier, source_at
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph
from fxopt.ir.partition import Region, extract, partition, run_partitioned
from fxopt.ir.target import Target


class MixedExecutable(Executable):
    """A partitioned graph at fixed sizes; `executed_on` names what runs in torch and why."""

    def __init__(self, source: Source, target: Target, machine: Machine, refuses: Callable[[fx.Node], str]) -> None:
        self.graph: Graph = source.graph
        self.target = target
        self.machine = machine
        self.parts = partition(self.graph, refuses)
        self._compiled: list[TvmExecutable] = []
        self._runners = [self._runner(region) for region in self.parts.regions]
        refused = "; ".join(str(region) for region in self.parts.regions if not region.accepted)
        self.executed_on = f"tvm, 1 thread, this machine; in torch: {refused}"

    def _runner(self, region: Region) -> Callable[[Sequence[Any]], Sequence[Any]]:
        piece = extract(self.graph, region)
        if not region.accepted:
            return piece.run
        for node in piece.placeholders:
            if not isinstance(node.meta.get("val"), torch.Tensor):
                raise Unsupported(f"a size crosses the border of a region at {node.name}; give static shapes")
        name = identifier(piece.name)
        first = source_at(piece, guessed_sizes(piece), name, name)
        graphs, machines = {name: piece}, [self.machine]
        package = Package(name, graphs, [first], self.target, machines, self.machine, embedded=False)
        made = TvmExecutable(package, is_open=True)
        self._compiled.append(made)
        return made.run

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs on flat inputs."""
        return run_partitioned(self.graph, self.parts, self._runners, inputs)

    def write(self, folder: Path) -> dict[str, Any]:
        """A part needs torch: there is no file for it."""
        raise Unsupported(f"this model cannot be saved for tvm: {self.executed_on}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """The same."""
        self.write(Path(path))

    def close(self) -> None:
        """Drop the compiled regions."""
        for made in self._compiled:
            made.close()
