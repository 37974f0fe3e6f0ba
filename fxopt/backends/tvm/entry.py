"""The one C function of a model, which calls the kernels in order, and what describes it: header, wrapper, manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fxopt.backends.tvm.emit import Expr
from fxopt.backends.tvm.library import ir, tirx
from fxopt.backends.tvm.program import Program
from fxopt.backends.tvm.values import Slot


@dataclass(frozen=True)
class Port:
    """An input or output: name, element type (int64, float32, uint8 for truth values), shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Signature:
    """What a caller must know: `void NAME(void* arena, const void* weights, inputs ..., outputs ...)`."""

    name: str
    arena_bytes: int
    weights_bytes: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def manifest(self) -> dict[str, Any]:
        """As JSON would have it."""
        return asdict(self)


def entry_function(program: Program, name: str) -> Any:
    """The PrimFunc; all pointers are 64-byte aligned, and no two of them may overlap."""
    arena, weights = _pointer("arena"), _pointer("weights")
    inputs = [_pointer(f"in{i}") for i in range(len(program.inputs))]
    outputs = [_pointer(f"out{i}") for i in range(len(program.outputs))]
    bases = {"arena": [arena], "constant": [weights], "input": inputs, "output": outputs}

    def address(slot: Slot) -> Expr:
        base = bases[slot.place][slot.index if slot.place in ("input", "output") else 0]
        if not slot.offset:
            return base
        return tirx.call_intrin("handle", "tirx.handle_add_byte_offset", base, slot.offset)

    calls: list[Any] = [
        tirx.Evaluate(tirx.call_extern("void", step.function, *map(address, step.slots))) for step in program.steps
    ]
    calls = calls or [tirx.Evaluate(tirx.IntImm("int32", 0))]
    body = calls[0] if len(calls) == 1 else tirx.SeqStmt(calls)
    function = tirx.PrimFunc([arena, weights, *inputs, *outputs], body)
    return function.with_attr({"global_symbol": name, "calling_conv": 0})


def _pointer(name: str) -> Any:
    return tirx.Var(name, ir.PointerType(ir.PrimType("uint8"), "global"))


def header(signature: Signature) -> str:
    """The C header."""
    upper = signature.name.upper()
    lines = [
        "#pragma once",
        "/* Compiled by fxopt. Pointers are 64-byte aligned and do not overlap; one thread at a time per arena. */",
        f"#define {upper}_ARENA_BYTES {signature.arena_bytes}",
        f"#define {upper}_WEIGHTS_BYTES {signature.weights_bytes}",
    ]
    for kind, ports in (("IN", signature.inputs), ("OUT", signature.outputs)):
        for index, port in enumerate(ports):
            lines.append(f"#define {upper}_{kind}{index}_BYTES {port.nbytes} /* {port.name}: {_type(port)} */")
    lines += [
        "#ifdef __cplusplus", 'extern "C"', "#endif", f"void {signature.name}({_parameters(signature)});", "",
    ]  # fmt: skip
    return "\n".join(lines)


def embedding(signature: Signature, weights: str) -> str:
    """A C file with the weights and static buffers: `NAME_input(i)`, `NAME_output(i)`, `NAME_run()`."""
    name, upper = signature.name, signature.name.upper()
    show = '__attribute__((visibility("default")))'
    lines = [f'#include "{name}.h"', _static("arena", f"{upper}_ARENA_BYTES")]
    lines += [f'static const _Alignas(64) unsigned char weights[] = {{\n#embed "{weights}"\n}};']
    names = {"in": len(signature.inputs), "out": len(signature.outputs)}
    for kind, count in names.items():
        lines += [_static(f"{kind}{i}", f"{upper}_{kind.upper()}{i}_BYTES") for i in range(count)]
    for kind, word in (("in", "input"), ("out", "output")):
        listed = ", ".join(f"{kind}{i}" for i in range(names[kind])) or "0"
        lines.append(f"{show} void* {name}_{word}(int i) {{ void* all[] = {{{listed}}}; return all[i]; }}")
    given = ", ".join(["arena", "weights", *(f"{kind}{i}" for kind, count in names.items() for i in range(count))])
    lines.append(f"{show} void {name}_run(void) {{ {name}({given}); }}")
    return "\n".join([*lines, ""])


def exports(signature: Signature) -> list[str]:
    """The names that `embedding` adds."""
    return [f"{signature.name}_{word}" for word in ("input", "output", "run")]


def _static(name: str, size: str) -> str:
    return f"static _Alignas(64) unsigned char {name}[{size} + 64];"


def _parameters(signature: Signature) -> str:
    inputs = [f"const void* in{i}" for i in range(len(signature.inputs))]
    outputs = [f"void* out{i}" for i in range(len(signature.outputs))]
    return ", ".join(["void* arena", "const void* weights", *inputs, *outputs])


def _type(port: Port) -> str:
    return f"{port.dtype}[{', '.join(map(str, port.shape))}]"
