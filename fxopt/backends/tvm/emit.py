"""Write TIR functions statement by statement: flat buffers, vector loads and stores, Python loops as unrolled code.

A kernel takes raw pointers (the C ABI); nothing in it needs TVM's runtime. Accumulators are local buffers that are
only accessed at constant offsets, which LLVM turns into registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fxopt.backends.tvm.library import ir, tirx

Expr = Any  # a TIR expression; plain ints are constants


class Kernel:
    """A function under construction; `function()` closes it.

    Buffers are declared in the order of the C parameters. No two of them may overlap.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._parameters: list[Any] = []
        self._declarations: list[Any] = []
        self._blocks: list[list[Any]] = [[]]
        self._count = 0

    # ---- memory

    def buffer(self, name: str, size: int, dtype: str = "float32") -> Any:
        """A parameter: a pointer to `size` values."""
        pointer = tirx.Var(f"{name}_pointer", ir.PointerType(ir.PrimType(dtype), "global"))
        buffer = tirx.decl_buffer((max(size, 1),), dtype, name, layout=None)
        self._parameters.append(pointer)
        self._declarations.append(tirx.DeclBuffer(buffer, data=pointer))
        return buffer

    def local(self, size: int, dtype: str = "float32") -> Any:
        """Registers (or the stack): `size` values."""
        self._count += 1
        buffer = tirx.decl_buffer((size,), dtype, f"local{self._count}", scope="local", layout=None)
        self._declarations.append(tirx.AllocBuffer(buffer))
        return buffer

    def load(self, buffer: Any, offset: Expr, lanes: int = 1, stride: int = 1) -> Expr:
        """A value, or a vector of `lanes` values that lie `stride` apart."""
        return tirx.BufferLoad(buffer, [_index(offset, lanes, stride)])

    def store(self, buffer: Any, offset: Expr, value: Expr, lanes: int = 1, stride: int = 1) -> None:
        """Write a value or a vector."""
        self._blocks[-1].append(tirx.BufferStore(buffer, value, [_index(offset, lanes, stride)]))

    def prefetch(self, buffer: Any, offset: Expr) -> None:
        """Ask for the cache line of a value; an address outside the buffer is allowed, and ignored."""
        address = tirx.address_of(self.load(buffer, offset))
        read, keep, data = (tirx.IntImm("int32", value) for value in (0, 3, 1))
        self._emit(tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, read, keep, data)))

    # ---- control

    @contextmanager
    def loop(self, extent: Expr, name: str = "i") -> Iterator[Expr]:
        """A serial loop from zero; the value is its variable (the constant 0 for one round)."""
        if isinstance(extent, int) and extent == 1:
            yield int32(0)
            return
        self._count += 1
        variable = tirx.Var(f"{name}{self._count}", "int32")
        with self._block() as body:
            yield variable
        if body and not (isinstance(extent, int) and extent == 0):
            self._emit(tirx.For(variable, int32(0), int32(extent), tirx.ForKind.SERIAL, _sequence(body)))

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        """Statements that run only under a condition."""
        with self._block() as body:
            yield
        if body:
            self._emit(tirx.IfThenElse(condition, _sequence(body), None))

    def let(self, value: Expr, name: str = "v") -> Expr:
        """A name for a value that is used more than once (truth values stay as they are: TVM takes none of vectors)."""
        if "bool" in str(value.ty):
            return value
        self._count += 1
        variable = tirx.Var(f"{name}{self._count}", value.ty)
        self._emit(tirx.Bind(variable, value))
        return variable

    def call(self, function: str, *arguments: Expr) -> None:
        """Call another function of the module that returns nothing."""
        self._emit(tirx.Evaluate(tirx.call_extern("void", function, *arguments)))

    def function(self) -> Any:
        """The finished PrimFunc."""
        body = _sequence([*self._declarations, *self._blocks[0]] or [tirx.Evaluate(int32(0))])
        function = tirx.PrimFunc(self._parameters, body)
        return function.with_attr({"global_symbol": self.name, "calling_conv": 0, "tirx.noalias": True})

    @contextmanager
    def _block(self) -> Iterator[list[Any]]:
        body: list[Any] = []
        self._blocks.append(body)
        yield body
        self._blocks.pop()

    def _emit(self, statement: Any) -> None:
        self._blocks[-1].append(statement)


def tail(size: int, lanes: int) -> list[tuple[int, int]]:
    """(offset, lanes) pieces that cover `size` values with vectors of at most `lanes`, a power of two each.

    >>> tail(11, 4)
    [(0, 4), (4, 4), (8, 2), (10, 1)]
    """
    pieces, done = [], 0
    while done < size:
        while lanes > size - done:
            lanes //= 2
        pieces.append((done, lanes))
        done += lanes
    return pieces


def each(kernel: Kernel, size: int, lanes: int, write: Callable[[Expr, int], None]) -> None:
    """Call `write(offset, lanes)` for vectors that cover 0 ... size - 1: a loop over full ones, then the rest."""
    full = size // lanes
    if full:
        with kernel.loop(full, "v") as index:
            write(index * lanes, lanes)
    for offset, width in tail(size - full * lanes, lanes):
        write(int32(full * lanes + offset), width)


def int32(value: Expr) -> Expr:
    """An index."""
    return tirx.IntImm("int32", value) if isinstance(value, int) else value


def float32(value: float, lanes: int = 1) -> Expr:
    """A constant, in every lane."""
    return spread(tirx.FloatImm("float32", value), lanes)


def differs(a: Expr, b: Expr) -> Expr:
    """a != b, which is true of NaN and anything; TVM's own NE is not."""
    return tirx.Not(tirx.EQ(a, b))


def is_nan(value: Expr) -> Expr:
    """Whether a float is NaN."""
    return differs(value, value)


def spread(value: Expr, lanes: int) -> Expr:
    """The same value in every lane."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def typed(base: str, lanes: int) -> str:
    """TVM's name of a vector type."""
    return base if lanes == 1 else f"{base}x{lanes}"


def reinterpret(dtype: str, value: Expr) -> Expr:
    """The same bits as another type."""
    return tirx.reinterpret(dtype, value)


def cast(dtype: str, value: Expr) -> Expr:
    """Conversion; floats are cut towards zero."""
    return tirx.Cast(dtype, value)


def shuffle(vectors: Sequence[Expr], indices: Sequence[int]) -> Expr:
    """The values at `indices` of the vectors (of one type), one behind the other, as one vector."""
    return tirx.Shuffle(list(vectors), [tirx.IntImm("int32", index) for index in indices])


def intrinsic(dtype: str, name: str, *arguments: Expr) -> Expr:
    """A call of an LLVM intrinsic without effects."""
    return tirx.call_llvm_pure_intrin(dtype, name, *arguments)


def _index(offset: Expr, lanes: int, stride: int) -> Expr:
    start = int32(offset)
    return start if lanes == 1 else tirx.Ramp(start, int32(stride), lanes)


def _sequence(statements: Sequence[Any]) -> Any:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))
