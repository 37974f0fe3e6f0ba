"""Rows of floats to bytes: rounding with a factor per channel, alone or after a layer norm.

    codes = clamp(round(y * inverse) + zero, 0, 255)        y = x, or the layer norm of x

The number of rows is known at run time only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fxopt.backends.tvm.emit import Expr, Kernel, cast, each, float32, int32, reinterpret, spread, tail, typed
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine

# Of the C functions, all pointers; without a norm, gamma and beta are not read.
ROW_PARAMETERS = ("rows", "x", "gamma", "beta", "inverse", "zero", "codes")
ANY_ROWS = 1 << 20  # what buffers are declared with; their sizes are not checked

_MAGIC = 12582912.0  # 1.5 * 2**23: a float of this size holds an integer in its low bits, rounded half to even
Value = Callable[[Expr, int], Expr]  # of some columns of a row: (first column, lanes)


@dataclass(frozen=True)
class RowForm:
    """Rows of `size` floats to bytes; `eps` is that of the layer norm before, None where there is none."""

    size: int
    eps: float | None = None


def rows_u8(name: str, form: RowForm, machine: Machine) -> Any:
    """`void NAME(...)` with the pointers `ROW_PARAMETERS`.

    rows: int32 [1]; x: float32 [rows, size]; gamma, beta, inverse: float32 [size]; zero: float32 [1]; codes: uint8
    [rows, size].
    """
    kernel, size = Kernel(name), form.size
    sizes = {"rows": (1, "int32"), "x": (ANY_ROWS * size, "float32"), "zero": (1, "float32"),
             "codes": (ANY_ROWS * size, "uint8")}  # fmt: skip
    at = {key: kernel.buffer(key, *sizes.get(key, (size, "float32"))) for key in ROW_PARAMETERS}
    with kernel.loop(kernel.let(kernel.load(at["rows"], 0)), "row") as row:
        start = kernel.let(row * size)

        def write(column: Expr, n: int, value: Expr | None = None) -> None:
            value = kernel.load(at["x"], start + column, n) if value is None else value
            round_to_bytes(kernel, at, value, start + column, column, n)

        if form.eps is None:
            each(kernel, size, machine.lanes, write)
        else:
            norm_row(kernel, machine.lanes, size, form.eps, at, at["x"], start, write)
    return kernel.function()


def round_to_bytes(kernel: Kernel, at: dict[str, Any], value: Expr, place: Expr, column: Expr, n: int) -> None:
    """codes[place]: the sum with 1.5 * 2**23 + zero is rounded by the adder, and the byte is its last eight bits."""
    zero = kernel.load(at["zero"], 0)
    shifted = value * kernel.load(at["inverse"], column, n) + spread(zero + float32(_MAGIC), n)
    low, high = float32(_MAGIC, n), float32(_MAGIC + 255, n)
    bits = reinterpret(typed("int32", n), kernel.let(tirx.Min(tirx.Max(shifted, low), high)))
    kernel.store(at["codes"], place, cast(typed("uint8", n), bits), n)


def norm_row(
    kernel: Kernel,
    lanes: int,
    size: int,
    eps: float,
    at: dict[str, Any],
    x: Any,
    start: Expr,
    write: Callable[[Expr, int, Expr], None],
) -> None:
    """Layer norm of x[start ...]: `write(column, lanes, value)`. The variance is that of the centred values."""
    total = _row_total(kernel, lanes, size, lambda column, n: kernel.load(x, start + column, n))
    mean = kernel.let(total * float32(1 / size))

    def square(column: Expr, n: int) -> Expr:
        centred = kernel.let(kernel.load(x, start + column, n) - spread(mean, n))
        return centred * centred

    variance = _row_total(kernel, lanes, size, square) * float32(1 / size)
    factor = kernel.let(float32(1.0) / tirx.sqrt(variance + float32(eps)))

    def scaled(column: Expr, n: int) -> None:
        value = (kernel.load(x, start + column, n) - spread(mean, n)) * spread(factor, n)
        gamma, beta = (kernel.load(at[key], column, n) for key in ("gamma", "beta"))
        write(column, n, kernel.let(value * gamma + beta))

    each(kernel, size, lanes, scaled)


def _row_total(kernel: Kernel, lanes: int, size: int, value: Value) -> Expr:
    """The sum of a row: four vectors of partial sums, then halves onto halves."""
    chains = 4 * lanes
    partial = kernel.local(chains)
    for c in range(0, chains, lanes):
        kernel.store(partial, c, float32(0.0, lanes), lanes)

    def add(column: Expr, c: int, n: int) -> None:
        kernel.store(partial, c, kernel.load(partial, c, n) + value(column, n), n)

    full = size // chains
    with kernel.loop(full, "r") as index:
        for c in range(0, chains, lanes):
            add(index * chains + c, c, lanes)
    for offset, n in tail(size - full * chains, lanes):
        add(int32(full * chains + offset), offset, n)
    width = chains
    while width > 1:
        width //= 2
        for c, n in tail(width, lanes):
            kernel.store(partial, c, kernel.load(partial, c, n) + kernel.load(partial, width + c, n), n)
    return kernel.let(kernel.load(partial, 0))


__all__ = ["ANY_ROWS", "ROW_PARAMETERS", "RowForm", "norm_row", "round_to_bytes", "rows_u8"]
