"""The manifest of a compiled model: what programs must know to call it, and what it was made with."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fxopt.backends.tvm.artifact.native import write_native
from fxopt.backends.tvm.artifact.web import write_web
from fxopt.backends.tvm.compile import Build
from fxopt.backends.tvm.entry import Entry
from fxopt.backends.tvm.machine import Machine
from fxopt.ir.folders import digest
from fxopt.ir.graph import Graph, ValueSpec
from fxopt.ir.target import Target

FORMAT = "fxopt-library-1"
_PACKAGES = ("fxopt", "torch", "apache-tvm", "apache-tvm-ffi", "ziglang", "numpy", "onnx")
_LINUX = {"neon": "asimd", "dotprod": "asimddp", "avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni"}


def write_files(
    folder: Path, name: str, builds: Sequence[Build], target: Target, functions: dict[str, Graph]
) -> dict[str, Any]:
    """Write libraries, weights and loaders into an empty folder; returns the manifest.

    Args:
        functions: the graph of each function, for the names of its dimensions.
    """
    described = [_build(build, name, len(builds) > 1, folder) for build in builds]
    manifest: dict[str, Any] = {
        "library": FORMAT,
        "name": name,
        "target": {"name": target.name, "arch": target.arch, "features": sorted(target.features)},
        "builds": described,
        "call": "void SYMBOL(void *arena, const void *weights, inputs ..., outputs ...)",
        "functions": {key: _function(key, graph, builds) for key, graph in functions.items()},
        "versions": versions(),
    }
    if builds[0].machine.family == "wasm":
        write_web(folder, manifest)
    else:
        write_native(folder, manifest)
    return manifest


def versions() -> dict[str, str]:
    """Of the packages that the code depends on."""
    import fxopt

    found = {"fxopt": fxopt.__version__}
    for name in _PACKAGES[1:]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_flags(machine: Machine) -> list[str]:
    """The instruction sets that the code needs, as Linux names them in /proc/cpuinfo."""
    if machine.family == "wasm":
        return []
    plain = (feature.removeprefix("+") for feature in machine.features)
    return sorted(_LINUX.get(feature, feature) for feature in plain)


def _build(build: Build, name: str, several: bool, folder: Path) -> dict[str, Any]:
    """Copy a build's files; equal weights of several builds become one file."""
    file = f"{name}.{build.machine.label}.wasm" if several else build.library.name
    shutil.copyfile(build.library, folder / file)
    weights = None
    if not build.embedded:
        weights = build.weights.name
        if (folder / weights).exists() and digest(folder / weights) != digest(build.weights):
            weights = f"{name}.{build.machine.label}.weights.bin"
        shutil.copyfile(build.weights, folder / weights)
    return {
        "label": build.machine.label,
        "file": file,
        "arch": build.machine.arch,
        "triple": build.machine.triple,
        "features": list(build.machine.features),
        "cpu_flags": cpu_flags(build.machine),
        "weights": weights,
        "weights_bytes": build.weights_bytes,
        "kernels": {entry.symbol: list(entry.kernels) for entry in build.entries},
    }


def _function(name: str, graph: Graph, builds: Sequence[Build]) -> dict[str, Any]:
    found = [[entry for entry in build.entries if entry.function == name] for build in builds]
    return {
        "inputs": [_port(spec, port.dtype) for spec, port in zip(graph.inputs, found[0][0].inputs, strict=True)],
        "outputs": [_port(spec, port.dtype) for spec, port in zip(graph.outputs, found[0][0].outputs, strict=True)],
        "entries": [_merged(versions) for versions in zip(*found, strict=True)],
    }


def _merged(versions: Sequence[Entry]) -> dict[str, Any]:
    """One entry point as its builds have it; they differ in the memory that they need."""
    return {**versions[0].to_json(), "arena_bytes": max(entry.arena_bytes for entry in versions)}


def _port(spec: ValueSpec, dtype: str) -> dict[str, Any]:
    shape = [f"{spec.name}_{axis}" if dim is None else dim for axis, dim in enumerate(spec.shape or ())]
    return {"name": spec.name, "dtype": dtype, "shape": shape}
