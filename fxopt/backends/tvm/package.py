"""Functions compiled together for a target: what is written, and verified before."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxopt.backends.tvm.artifact.manifest import write_files
from fxopt.backends.tvm.buckets import suffix
from fxopt.backends.tvm.compile import Build, build
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.source import Source, identifier
from fxopt.errors import InvalidOption
from fxopt.ir.graph import Graph
from fxopt.ir.target import Target


class Package:
    """One library for each machine, with all entry points, in a scratch folder that lives as long as the object.

    Args:
        name: of the library.
        graphs: every function as it came, of either origin.
        sources: the entry points of all functions.
        machines: of the target.
        here: the machine that runs code of this process; equal to one of `machines`, or not.
        embedded: weights in the libraries, or in a file beside them.
    """

    def __init__(
        self,
        name: str,
        graphs: Mapping[str, Graph],
        sources: Sequence[Source],
        target: Target,
        machines: Sequence[Machine],
        here: Machine,
        *,
        embedded: bool,
    ) -> None:
        self.name = name
        self.graphs = dict(graphs)
        self.sources = tuple(sources)
        self.target = target
        self.machines = tuple(machines)
        self.here = here
        self.embedded = embedded
        self._scratch = tempfile.TemporaryDirectory(prefix="fxopt-tvm-")
        self.builds = tuple(self.build(machine, self.sources) for machine in machines)

    def build(self, machine: Machine, sources: Sequence[Source]) -> Build:
        """A library of other entry points or for another machine, in the same scratch folder."""
        folder = Path(tempfile.mkdtemp(dir=self._scratch.name))
        return build(sources, machine, folder, self.name, embedded=self.embedded)

    def write(self, folder: Path) -> dict[str, Any]:
        """Write libraries and loaders into an empty folder; returns the manifest."""
        return write_files(folder, self.name, self.builds, self.target, self.graphs)

    def close(self) -> None:
        """Drop the scratch folder."""
        self._scratch.cleanup()


def joined(packages: Mapping[str, Package], name: str, *, embedded: bool) -> Package:
    """One package of the functions of several.

    Raises:
        InvalidOption: there are none, they are for different targets, or two names make one C identifier.
    """
    targets = {key: package.target.name for key, package in packages.items()}
    if len(set(targets.values())) != 1:
        shown = ", ".join(f"{key}: {target}" for key, target in targets.items()) or "none"
        raise InvalidOption(f"a bundle takes functions for one target; given {shown}")
    library = identifier(name)
    sources = [
        replace(source, function=key, symbol=f"{library}_{identifier(key)}{suffix(source.sizes)}")
        for key, package in packages.items()
        for source in package.sources
    ]
    if len({source.symbol for source in sources}) < len(sources):
        raise InvalidOption(f"two of the names {', '.join(packages)} make one C identifier; give others")
    graphs = {key: next(iter(package.graphs.values())) for key, package in packages.items()}
    first = next(iter(packages.values()))
    return Package(library, graphs, sources, first.target, first.machines, first.here, embedded=embedded)
