"""y = act((q - zero) @ C.T * scales + b): 8-bit codes of x and W, 32-bit sums, float32 results.

x is rounded to bytes once per call (static scale and zero point), in the range that the machine's instruction takes:

- `vpdpbusd` (AVX-512 VNNI, AVX-VNNI): unsigned bytes times signed ones, exact;
- `vpmaddubsw` (AVX2): the same, but pairs are summed in 16 bits, so x has 7 bits: 2 * 127 * 127 < 2**15;
- `sdot` (Arm): signed times signed;
- `relaxed_dot` (WebAssembly relaxed SIMD): x has 7 bits, since what a set top bit does is the engine's choice;
- `dot_i16x8` (WebAssembly) and `smull` (Arm without dot product): widened to 16 bits, pairs are summed in 32.

The zero point is folded into the bias: sum((q - z) c) = sum(q c) - z sum(c).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.emit import (
    Expr,
    Kernel,
    cast,
    each,
    float32,
    int32,
    intrinsic,
    reinterpret,
    spread,
    tail,
    typed,
)
from fxopt.backends.tvm.kernels.activations import Activation, apply
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine

Codes = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Range:
    """The codes of x for a machine: low ... high, of `dtype`, `group` of them summed into a lane at a time."""

    low: int
    high: int
    dtype: str
    group: int


def code_range(machine: Machine) -> Range:
    """Which integers x is rounded to."""
    if machine.dot == "vpdpbusd":
        return Range(0, 255, "uint8", 4)
    if machine.dot in ("vpmaddubsw", "relaxed_dot"):
        return Range(0, 127, "uint8", 4)
    if machine.dot == "sdot":
        return Range(-128, 127, "int8", 4)
    return Range(-128, 127, "int16", 2)


def padded(inner: int, machine: Machine) -> int:
    """Inputs, rounded up to whole groups."""
    group = code_range(machine).group
    return -(-inner // group) * group


def pack_int8(codes: Codes, machine: Machine) -> npt.NDArray[Any]:
    """[out, in] codes in -127 ... 127 -> [panels, in / group, columns, group], zero padded, int16 where group is 2."""
    group, width = code_range(machine).group, machine.columns
    outputs, inner = codes.shape
    whole = np.zeros((-(-outputs // width) * width, padded(inner, machine)), np.int8 if group == 4 else np.int16)
    whole[:outputs, :inner] = codes
    return np.ascontiguousarray(whole.reshape(-1, width, whole.shape[1] // group, group).transpose(0, 2, 1, 3))


def code_sums(codes: Codes, zero: int, width: int) -> npt.NDArray[np.int32]:
    """-zero * sum(c) per output, padded to whole panels: what the sums start from."""
    sums = np.zeros(-(-codes.shape[0] // width) * width, np.int32)
    sums[: codes.shape[0]] = -zero * codes.astype(np.int32).sum(1)
    return sums


def quantize(name: str, rows: int, inner: int, scale: float, zero: int, machine: Machine) -> Any:
    """`void NAME(x [rows, inner], q [rows, padded])`: clamp(round(x / scale) + zero), half to even; NaN: low end."""
    codes = code_range(machine)
    width = padded(inner, machine)
    kernel = Kernel(name)
    x, q = kernel.buffer("x", rows * inner), kernel.buffer("q", rows * width, codes.dtype)
    magic = 12582912.0  # 1.5 * 2**23: adding it rounds half to even, and the integer is in the low bits
    with kernel.loop(rows, "row") as row:

        def write(at: Expr, n: int, row: Expr = row) -> None:
            scaled = kernel.load(x, row * inner + at, n) / float32(scale, n)
            low, high = float32(float(codes.low - zero), n), float32(float(codes.high - zero), n)
            clamped = kernel.let(tirx.Min(tirx.Max(scaled, low), high))
            rounded = reinterpret(typed("int32", n), kernel.let(clamped + float32(magic, n)))
            start = spread(tirx.IntImm("int32", 0x4B400000 - zero), n)
            kernel.store(q, row * width + at, cast(typed(codes.dtype, n), rounded - start), n)

        each(kernel, inner, machine.lanes, write)
        for extra in range(inner, width):
            kernel.store(q, row * width + extra, tirx.IntImm(codes.dtype, 0))
    return kernel.function()


def dense_int8(name: str, rows: int, inner: int, outputs: int, machine: Machine, activation: Activation = "") -> Any:
    """`void NAME(q [rows, padded], w, starts, scales, bias, y [rows, outputs])`; scales are weight scale * x scale."""
    codes = code_range(machine)
    groups, width = padded(inner, machine) // codes.group, machine.columns
    panels = -(-outputs // width)
    kernel = Kernel(name)
    q = kernel.buffer("q", rows * groups * codes.group, codes.dtype)
    w = kernel.buffer("w", panels * groups * width * codes.group, "int8" if codes.group == 4 else "int16")
    starts = kernel.buffer("starts", panels * width, "int32")
    scales, bias = kernel.buffer("scales", panels * width), kernel.buffer("bias", panels * width)
    y = kernel.buffer("y", rows * outputs)
    lanes = machine.lanes

    def tile(panel: Expr, row: Expr, count: int, columns: int) -> None:
        sums = kernel.local(count * width, "int32")
        for r in range(count):
            for v in range(0, width, lanes):
                kernel.store(sums, r * width + v, kernel.load(starts, panel * width + v, lanes), lanes)
        with kernel.loop(groups, "g") as g:
            size = lanes * codes.group
            place = (panel * groups + g) * (width * codes.group)
            weights = [kernel.let(kernel.load(w, place + v * codes.group, size)) for v in range(0, width, lanes)]
            for r in range(count):
                some = kernel.load(q, ((row + r) * groups + g) * codes.group, codes.group)
                value = kernel.let(spread(reinterpret("int32", some), lanes))
                for v, weight in zip(range(0, width, lanes), weights, strict=True):
                    old = kernel.load(sums, r * width + v, lanes)
                    kernel.store(sums, r * width + v, _dot(machine, old, value, weight), lanes)
        for r in range(count):
            for v, n in tail(columns, lanes):
                at = panel * width + v
                value = cast(typed("float32", n), kernel.load(sums, r * width + v, n)) * kernel.load(scales, at, n)
                value = apply(kernel, activation, kernel.let(value + kernel.load(bias, at, n)), n)
                kernel.store(y, (row + r) * outputs + at, value, n)

    def panel_of(panel: Expr, columns: int) -> None:
        tile_rows = min(machine.rows, 4)
        full, rest = divmod(rows, tile_rows)
        with kernel.loop(full, "tile") as index:
            tile(panel, index * tile_rows, tile_rows, columns)
        if rest:
            tile(panel, int32(full * tile_rows), rest, columns)

    full, rest = divmod(outputs, width)
    with kernel.loop(full, "panel") as panel:
        panel_of(panel, width)
    if rest:
        panel_of(int32(full), rest)
    return kernel.function()


def _dot(machine: Machine, sums: Expr, x: Expr, w: Expr) -> Expr:
    """sums + the products of each lane's group; x holds one group's codes in every lane's 32 bits."""
    n = machine.lanes
    sum_type, bytes_type = typed("int32", n), typed("int8", 4 * n)
    if machine.dot == "vpdpbusd":
        x = reinterpret(typed("uint8", 4 * n), x)
        return intrinsic(sum_type, f"llvm.x86.avx512.vpdpbusd.{32 * n}", sums, x, w)
    if machine.dot == "vpmaddubsw":
        names = {8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
                 16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512")}[n]  # fmt: skip
        pairs = intrinsic(typed("int16", 2 * n), names[0], reinterpret(bytes_type, x), w)
        ones = spread(tirx.IntImm("int16", 1), 2 * n)
        return sums + intrinsic(sum_type, names[1], pairs, ones)
    if machine.dot == "sdot":
        return intrinsic(sum_type, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, w, reinterpret(bytes_type, x))
    if machine.dot == "relaxed_dot":
        return intrinsic(sum_type, "llvm.wasm.relaxed.dot.i8x16.i7x16.add.signed", w, reinterpret(bytes_type, x), sums)
    pairs = reinterpret(typed("int16", 2 * n), x)
    if machine.dot == "dot_i16x8":
        return sums + intrinsic(sum_type, "llvm.wasm.dot", w, pairs)
    return sums + _pairwise(pairs, w, n)


def _pairwise(a: Expr, b: Expr, lanes: int) -> Expr:
    """a[2i] b[2i] + a[2i+1] b[2i+1] in 32 bits: even and odd halves by shifts, which LLVM makes into smull or mla."""
    wide = typed("int32", lanes)
    a32, b32 = reinterpret(wide, a), reinterpret(wide, b)
    by = spread(tirx.IntImm("int32", 16), lanes)
    odd = (a32 >> by) * (b32 >> by)
    even = ((a32 << by) >> by) * ((b32 << by) >> by)
    return even + odd
