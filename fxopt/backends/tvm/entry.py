"""Entry points: one C function for each function of a model and each set of sizes, which calls the kernels in order."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fxopt.backends.tvm.emit import Expr
from fxopt.backends.tvm.library import ir, tirx
from fxopt.backends.tvm.program import Program
from fxopt.backends.tvm.values import Slot


@dataclass(frozen=True)
class Port:
    """An input or output: name, element type ("float32", "int64", "int32", "bool" in bytes), shape, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """`void SYMBOL(void* arena, const void* weights, inputs ..., outputs ...)`.

    Attributes:
        function: the function of the model.
        sizes: of its named dimensions.
        arena_bytes: memory that the call may overwrite; what it holds before does not matter.
        kernels: what it calls in order, as "kernel (node)".
    """

    symbol: str
    function: str
    sizes: dict[str, int]
    arena_bytes: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    kernels: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What a caller must know, as plain data."""
        found = asdict(self)
        del found["kernels"], found["function"]
        return found


def entry_function(program: Program, symbol: str) -> Any:
    """The PrimFunc; no two of its pointers may overlap."""
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
    return function.with_attr({"global_symbol": symbol, "calling_conv": 0})


def _pointer(name: str) -> Any:
    return tirx.Var(name, ir.PointerType(ir.PrimType("uint8"), "global"))
