"""Run what was compiled, before it is called good, and compare with torch.

Every entry point of every build is run where it can be: WebAssembly in wasmtime, libraries of this machine in this
process, those for Arm in qemu. Inputs are the samples that fit, else made-up ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from fxopt.backends.tvm.compile import Build
from fxopt.backends.tvm.entry import Entry
from fxopt.backends.tvm.lowering import bound
from fxopt.backends.tvm.qemu import EMULATOR, missing, run_entry
from fxopt.backends.tvm.runners import runner_of
from fxopt.backends.tvm.source import Source
from fxopt.errors import OutputError, VerificationError
from fxopt.ir.graph import Graph, set_attribute
from fxopt.ir.ops.linear_nbits import linear_nbits
from fxopt.ir.verify import synthetic_sample

if TYPE_CHECKING:
    from fxopt.backends.tvm.package import Package

_SAMPLES = 2  # of each entry point
_ROUNDING = 3e-4  # relative error (of the L2 norm) between two ways of computing one float model
_ROUNDING_OF_CODES = 3e-2  # the same where values are rounded to 8-bit levels, which a last digit can turn
_LAST_DIGITS = 2.0**-22  # of the weights: what turning them does to such a model, it does with other orders of sums too
_TIMES = 4.0  # as far from torch as torch is from itself then

Sample = Sequence[Any]
Run = Callable[[Entry, Sequence[Any]], list[Any]]


def verify(package: Package, samples: Mapping[str, Sequence[Sample]]) -> str:
    """What was run and how far it is from torch, as a sentence.

    Args:
        samples: of each function, where there are any.

    Raises:
        VerificationError: an entry point computes something else than torch.
    """
    worst, done, left_out = 0.0, [], []
    graphs = [package.graphs[source.function] for source in package.sources]
    chosen = [
        _inputs(graph, source, samples.get(source.function, ()))
        for graph, source in zip(graphs, package.sources, strict=True)
    ]
    if not any(chosen):
        return "nothing was run: there are no samples, and the inputs are too large to make some up"
    references = [[graph.run(list(sample)) for sample in taken] for graph, taken in zip(graphs, chosen, strict=True)]
    limits = [
        max((_limit(graph, sample, outputs) for sample, outputs in zip(taken, expected, strict=True)), default=0.0)
        for graph, taken, expected in zip(graphs, chosen, references, strict=True)
    ]
    for build in package.builds:
        name = " ".join(filter(None, [build.library.name, build.machine.label]))
        run, where = _runner(package, build)
        if run is None:
            left_out.append(f"{name} was not run: {where}")
            continue
        try:
            for entry, taken, expected, limit in zip(build.entries, chosen, references, limits, strict=True):
                for sample, outputs in zip(taken, expected, strict=True):
                    worst = max(worst, _difference(run(entry, sample), outputs, entry, where, limit))
        except OutputError as error:
            left_out.append(f"{name} was not verified: {error}")
            continue
        done.append(f"{name} in {where}")
    count = sum(map(len, chosen))
    shown = f"{count} sample{'s' if count > 1 else ''}"
    found = f"{' and '.join(done)} gave torch's results on {shown} (relative error {worst:.2g})" if done else ""
    return "; ".join(filter(None, [found, *left_out]))


def _inputs(graph: Graph, source: Source, samples: Sequence[Sample]) -> list[Sample]:
    fitting = [
        sample
        for sample in samples
        if all(isinstance(value, torch.Tensor) for value in sample)
        and tuple(tuple(value.shape) for value in sample) == source.shapes
    ]
    if fitting:
        return fitting[:_SAMPLES]
    fixed = [replace(spec, shape=shape) for spec, shape in zip(graph.inputs, source.shapes, strict=True)]
    made = _resized(source, samples) or synthetic_sample(fixed, {})
    return [] if made is None else [made]


def _resized(source: Source, samples: Sequence[Sample]) -> list[torch.Tensor] | None:
    """The first sample at the source's sizes: repeated or cut, so that indices stay within their range."""
    for sample in samples:
        if all(isinstance(value, torch.Tensor) and value.numel() for value in sample) and all(
            value.dim() == len(shape) for value, shape in zip(sample, source.shapes, strict=True)
        ):
            return [_fitted(value, shape) for value, shape in zip(sample, source.shapes, strict=True)]
    return None


def _fitted(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    repeats = [-(-size // have) for size, have in zip(shape, value.shape, strict=True)]
    found = value.repeat(repeats) if shape else value
    return found[tuple(slice(0, size) for size in shape)].contiguous()


def _limit(graph: Graph, sample: Sample, outputs: Sequence[Any]) -> float:
    """Of the relative error; where values are rounded to levels, deep models enlarge the error of a last digit."""
    if not any(map(_rounds, graph.calls())):
        return _ROUNDING
    errors = (_relative(a, b) for a, b in zip(_shaken(graph).run(list(sample)), outputs, strict=True))
    return max(_ROUNDING_OF_CODES, _TIMES * max((error for error in errors if error < 1.0), default=0.0))


def _rounds(node: fx.Node) -> bool:
    """Whether an operator rounds values to levels."""
    if node.target is linear_nbits.target:
        return int(bound(node)["activation_bits"]) == 8
    return any(word in str(node.target).lower() for word in ("quantize", "a8", "u8", "integer", "qlinear"))


def _shaken(graph: Graph) -> Graph:
    """The graph with other last digits of its float32 constants."""
    found, generator = graph.copy(), torch.Generator().manual_seed(0)
    for node in found.nodes:
        value = found.constant(node) if node.op == "get_attr" else None
        if value is not None and value.dtype == torch.float32:
            change = 1 + _LAST_DIGITS * torch.randn(value.shape, generator=generator)
            set_attribute(found.root, str(node.target), value * change)
    return found


def _runner(package: Package, build: Build) -> tuple[Run | None, str]:
    """How a build runs here, and where; None with the reason."""
    if build.machine.family == "wasm" or build.machine == package.here:
        runner = runner_of(build, package.name)

        def run(entry: Entry, sample: Sequence[Any]) -> list[Any]:
            return runner.run(entry.to_json(), [value.numpy() for value in sample])

        return run, "wasmtime" if build.machine.family == "wasm" else "this process"
    if build.machine.family == "arm":
        if missing():
            return None, missing()
        return lambda entry, sample: _in_qemu(build, entry, sample), EMULATOR
    return None, f"this machine does not have {', '.join(build.machine.features)}"


def _in_qemu(build: Build, entry: Entry, sample: Sequence[Any]) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="fxopt-qemu-") as folder:
        return run_entry(build, entry, [value.numpy() for value in sample], Path(folder))[0]


def _difference(found: Sequence[Any], expected: Sequence[Any], entry: Entry, where: str, limit: float) -> float:
    worst = 0.0
    for port, ours, theirs in zip(entry.outputs, found, expected, strict=True):
        value = torch.from_numpy(np.array(ours))
        if value.shape != theirs.shape or value.dtype != theirs.dtype:
            raise VerificationError(
                f"{entry.symbol} in {where}: output {port.name!r} is {value.dtype} {list(value.shape)}, torch gives "
                f"{theirs.dtype} {list(theirs.shape)}"
            )
        error = _relative(value, theirs)
        if not error <= limit:
            raise VerificationError(
                f"{entry.symbol} in {where}: output {port.name!r} differs from torch by {error:.3g} of its norm "
                f"(allowed {limit:g}); nothing was written"
            )
        worst = max(worst, error)
    return worst


def _relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference|, where an element that is infinite or NaN in both does not count."""
    value, reference = value.double(), reference.double()
    same = (value == reference) | (value.isnan() & reference.isnan())
    noise = torch.where(same, 0.0, value - reference).norm().item()
    if noise == 0.0:
        return 0.0
    energy = torch.where(reference.isfinite(), reference, 0.0).norm().item()
    return noise / energy if energy and noise == noise else float("inf")
