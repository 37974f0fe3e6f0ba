"""Compile a graph at fixed sizes to a library file and its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fxopt.backends.tvm.entry import Port, Signature, embedding, entry_function, exports, header
from fxopt.backends.tvm.link import compile_c, link
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.lowering import Lowering
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.program import Program
from fxopt.backends.tvm.rules import RULES
from fxopt.backends.tvm.values import Slot
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph

_MOST_BYTES = 1 << 31  # kernels count in 32 bits


@dataclass(frozen=True)
class Compiled:
    """A model on disk: the library (`.so` or `.wasm`), its weights beside it, and the signature of its function."""

    signature: Signature
    library: Path
    weights: Path
    steps: tuple[str, ...]  # the kernels in order, as "function (node)"


def lowered(
    graph: Graph, machine: Machine, shapes: list[tuple[int, ...]], name: str = "model"
) -> tuple[Program, bytes, list[tuple[int, ...]]]:
    """The program of a graph for input shapes, laid out in memory, its weights, and the shapes of its results.

    Raises:
        Unsupported: an operator has no kernel, or a tensor is too large.
    """
    program = Program(machine, prefix=f"{name}_k")
    lowering = Lowering(graph, program, shapes, RULES)
    lowering.run()
    weights = program.lay_out()
    largest = max((slot.nbytes for step in program.steps for slot in step.slots), default=0)
    if largest >= _MOST_BYTES:
        raise Unsupported(f"a tensor has {largest} bytes; the kernels count in 32 bits, at most {_MOST_BYTES}")
    return program, weights, [lowering.shape(node) for node in graph.result_nodes]


def compile_graph(graph: Graph, machine: Machine, shapes: list[tuple[int, ...]], folder: Path, name: str) -> Compiled:
    """Write `NAME.h`, `weights.bin` and `NAME.so` or, with everything embedded, `NAME.wasm` into `folder`."""
    program, weights, results = lowered(graph, machine, shapes, name)
    signature = Signature(
        name,
        program.arena_bytes,
        len(weights),
        tuple(map(_port, (spec.name for spec in graph.inputs), program.inputs, shapes)),
        tuple(map(_port, (spec.name for spec in graph.outputs), program.outputs, results)),
    )
    (folder / "weights.bin").write_bytes(weights or b"\0")
    (folder / f"{name}.h").write_text(header(signature), encoding="utf-8")
    # Two objects: TVM tells LLVM that different buffers never share memory, which holds within a kernel and not between
    # kernels that reuse the arena; were they inlined into one function, their stores would be reordered.
    objects = [write_object([entry_function(program, name)], machine, folder / f"{name}.o")]
    if program.functions:
        objects.append(write_object(program.kernels(), machine, folder / f"{name}_kernels.o"))
    shown = [name]
    if machine.family == "wasm":
        source = folder / f"{name}_embedded.c"
        source.write_text(embedding(signature, "weights.bin"), encoding="utf-8")
        objects.append(compile_c(source, machine))
        shown += exports(signature)
    library = folder / f"{name}{'.wasm' if machine.family == 'wasm' else '.so'}"
    link(objects, shown, machine, library)
    steps = tuple(f"{step.function} ({step.why})" for step in program.steps)
    return Compiled(signature, library, folder / "weights.bin", steps)


def identifier(name: str) -> str:
    """A C identifier like `name`."""
    found = re.sub(r"\W+", "_", name).strip("_").lower() or "model"
    return f"model_{found}" if found[0].isdigit() else found


def _port(name: str, slot: Slot, shape: tuple[int, ...]) -> Port:
    return Port(name, slot.dtype, shape, slot.nbytes)
