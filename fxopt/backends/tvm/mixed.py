"""Regions with kernels compiled, the rest in torch: only on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.backends.base import Executable
from fxopt.backends.tvm.executable import TvmExecutable
from fxopt.backends.tvm.machine import Machine
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, hint
from fxopt.ir.partition import extract, partition, run_partitioned


class MixedExecutable(Executable):
    """A partitioned graph; `executed_on` names what runs in torch and why."""

    def __init__(self, graph: Graph, machine: Machine, refuses: Callable[[fx.Node], str]) -> None:
        self.graph = graph
        self.parts = partition(graph, refuses)
        self._compiled: list[TvmExecutable] = []
        self._runners = [self._runner(region, machine) for region in self.parts.regions]
        refused = "; ".join(str(region) for region in self.parts.regions if not region.accepted)
        self.executed_on = f"tvm, 1 thread, this machine; in torch: {refused}"

    def _runner(self, region: Any, machine: Machine) -> Callable[[Sequence[Any]], Sequence[Any]]:
        piece = extract(self.graph, region)
        if not region.accepted:
            return piece.run
        shapes = []
        for node in piece.placeholders:
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                raise Unsupported(f"a size crosses the border of a region at {node.name}; give static shapes")
            shapes.append(tuple(int(hint(dim)) for dim in value.shape))
        made = TvmExecutable(piece, machine, machine, tuple(shapes))
        self._compiled.append(made)
        return made.run

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """The outputs on flat inputs."""
        return run_partitioned(self.graph, self.parts, self._runners, inputs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """A part needs torch: there is no file for it."""
        raise Unsupported(f"this model cannot be saved for tvm: {self.executed_on}")

    def close(self) -> None:
        """Drop the compiled regions."""
        for made in self._compiled:
            made.close()
