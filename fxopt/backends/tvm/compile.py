"""Compile functions at fixed sizes to one library for one machine: an entry point each, kernels and weights shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fxopt.backends.tvm.entry import Entry, Port, entry_function
from fxopt.backends.tvm.link import compile_c, link
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.lowering import Lowering
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.program import Program
from fxopt.backends.tvm.rules import RULES
from fxopt.backends.tvm.source import Source
from fxopt.backends.tvm.values import Slot
from fxopt.errors import Unsupported
from fxopt.ir.graph import ValueSpec

_MOST_BYTES = 1 << 31  # kernels count in 32 bits


@dataclass(frozen=True)
class Build:
    """A library on disk, `.so` or `.wasm`.

    Attributes:
        weights: the file of the constants; they are in the library too when `embedded`.
        objects: of kernels, entry points and embedded constants.
    """

    machine: Machine
    library: Path
    weights: Path
    weights_bytes: int
    embedded: bool
    entries: tuple[Entry, ...]
    objects: tuple[Path, ...]


def build(sources: Sequence[Source], machine: Machine, folder: Path, name: str, *, embedded: bool = True) -> Build:
    """Write `NAME.wasm` or `libNAME.so`, and `NAME.weights.bin`, into `folder`.

    Raises:
        Unsupported: an operator has no kernel, or a tensor is too large.
        OutputError: the compiler or the linker refuses, or a file cannot be written.
    """
    programs, weights, results = _lowered(sources, machine, name)
    stored = folder / f"{name}.weights.bin"
    stored.write_bytes(weights or b"\0")
    # Two objects: TVM tells LLVM that different buffers never share memory, which holds within a kernel and not between
    # kernels that reuse the arena; were they inlined into one function, their stores would be reordered.
    symbols = [source.symbol for source in sources]
    functions = [entry_function(program, symbol) for program, symbol in zip(programs, symbols, strict=True)]
    objects = [write_object(functions, machine, folder / f"{name}.o")]
    if programs[0].functions:
        objects.append(write_object(programs[0].kernels(), machine, folder / f"{name}_kernels.o"))
    exports = list(symbols)
    if embedded:
        objects.append(_embedded(name, stored, machine))
        exports.append(f"{name}_weights")
    library = folder / (f"{name}.wasm" if machine.family == "wasm" else f"lib{name}.so")
    link(objects, exports, machine, library)
    entries = tuple(map(_entry, sources, programs, results))
    return Build(machine, library, stored, len(weights), embedded, entries, tuple(objects))


def _lowered(
    sources: Sequence[Source], machine: Machine, name: str
) -> tuple[list[Program], bytes, list[list[tuple[int, ...]]]]:
    """The programs, laid out in memory, their weights, and the shapes of the results."""
    empty = Program(machine, prefix=f"{name}_k")
    programs, results = [], []
    for source in sources:
        program = empty.another()
        lowering = Lowering(source.graph, program, list(source.shapes), RULES)
        lowering.run()
        programs.append(program)
        results.append([lowering.shape(node) for node in source.graph.result_nodes])
    weights = [program.lay_out() for program in programs][-1]  # of all, now that all are lowered
    largest = max((slot.nbytes for program in programs for step in program.steps for slot in step.slots), default=0)
    if largest >= _MOST_BYTES:
        raise Unsupported(f"a tensor has {largest} bytes; the kernels count in 32 bits, at most {_MOST_BYTES}")
    return programs, weights, results


def _embedded(name: str, weights: Path, machine: Machine) -> Path:
    """An object with the weights and `NAME_weights()`, which gives their address."""
    source = weights.with_name(f"{name}_weights.c")
    lines = [
        f'static const _Alignas(64) unsigned char weights[] = {{\n#embed "{weights.name}"\n}};',
        f"const void *{name}_weights(void) {{ return weights; }}",
    ]
    source.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return compile_c(source, machine)


def _entry(source: Source, program: Program, results: Sequence[tuple[int, ...]]) -> Entry:
    graph = source.graph
    inputs = tuple(map(_port, graph.inputs, program.inputs, source.shapes))
    outputs = tuple(map(_port, graph.outputs, program.outputs, results))
    kernels = tuple(f"{step.function} ({step.why})" for step in program.steps)
    return Entry(source.symbol, source.function, source.sizes, program.arena_bytes, inputs, outputs, kernels)


def _port(spec: ValueSpec, slot: Slot, shape: tuple[int, ...]) -> Port:
    return Port(spec.name, "bool" if spec.dtype == torch.bool else slot.dtype, shape, slot.nbytes)
