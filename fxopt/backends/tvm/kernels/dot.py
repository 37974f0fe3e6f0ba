"""Sums of products of 8-bit codes in 32 bits, exact on every machine: which instruction, and how codes are held for it.

x has the 256 levels of its operator's definition, codes q in 0 ... 255 with a zero point; W has codes in -127 ... 127:

    sum((q - zero) c) = sum((q - o) c) + (o - zero) sum(c)        where q - o is what is stored

- `vpdpbusd` (AVX-512 VNNI, AVX-VNNI): unsigned bytes times signed ones; o = 0;
- `vpmaddubsw` (AVX2): the same, but pairs are summed in 16 bits: only for weights of which two neighbours of one sign
  add up to 128 at most, as the quantiser makes them for such machines; others take `vpmaddwd`;
- `sdot` (Arm): signed bytes, o = 128; `smull` (Arm without dot product): pairs of products fit 16 bits, 2 * 128 * 127;
- `relaxed_dot` (WebAssembly relaxed SIMD): signed bytes times bytes in 0 ... 127, so the weights are raised by 64 (less
  64 * sum(q - o) for each row of x): only for weights of seven bits, as the quantiser makes them for that target;
- `dot_i16x8` (WebAssembly) and `vpmaddwd` (x86): both widened to 16 bits, pairs are summed in 32; o = zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.codes import BYTES, SIGNED, WIDE, Format
from fxopt.backends.tvm.emit import Expr, Kernel, cast, intrinsic, reinterpret, spread, typed
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine

Codes = npt.NDArray[np.int8]
Instruction = Literal["vpdpbusd", "vpmaddubsw", "vpmaddwd", "sdot", "smull", "relaxed_dot", "dot_i16x8"]


@dataclass(frozen=True)
class Dot:
    """An instruction: `group` codes of x times as many of W are summed into a 32-bit lane at a time."""

    instruction: Instruction
    x: Format
    group: int
    raised: int = 0  # added to the weights in memory

    @property
    def weights(self) -> str:
        """The type of the weights in memory."""
        return "uint8" if self.raised else "int8"


DOTS = {
    "vpdpbusd": Dot("vpdpbusd", BYTES, 4),
    "vpmaddubsw": Dot("vpmaddubsw", BYTES, 4),
    "vpmaddwd": Dot("vpmaddwd", WIDE, 2),
    "sdot": Dot("sdot", SIGNED, 4),
    "smull": Dot("smull", SIGNED, 4),
    "relaxed_dot": Dot("relaxed_dot", SIGNED, 4, 64),
    "dot_i16x8": Dot("dot_i16x8", WIDE, 2),
}
_PAIRS = {
    ("dot_i16x8", 4): "llvm.wasm.dot",
    ("vpmaddwd", 8): "llvm.x86.avx2.pmadd.wd",
    ("vpmaddwd", 16): "llvm.x86.avx512.pmaddw.d.512",
}
_INSTEAD = {"vpmaddubsw": "vpmaddwd", "relaxed_dot": "dot_i16x8"}


def preferred(machine: Machine) -> Dot:
    """The machine's fastest instruction, which not all weights may take."""
    return DOTS[machine.dot]


def dot_for(machine: Machine, codes: Codes) -> Dot:
    """The fastest instruction that is exact for weights [out, in]."""
    found = preferred(machine)
    if found.instruction == "vpmaddubsw" and not pairs_fit(codes):
        return DOTS[_INSTEAD["vpmaddubsw"]]
    if found.instruction == "relaxed_dot" and codes.size and not -64 <= codes.min() <= codes.max() <= 63:
        return DOTS[_INSTEAD["relaxed_dot"]]
    return found


def pairs_fit(codes: Codes) -> bool:
    """Whether `vpmaddubsw` sums neighbours [out, in] without saturating, whatever x is."""
    padded = np.pad(codes.astype(np.int32), ((0, 0), (0, codes.shape[1] % 2))).reshape(len(codes), -1, 2)
    sums = np.maximum(np.maximum(padded, 0).sum(-1), np.maximum(-padded, 0).sum(-1))
    return int(sums.max(initial=0)) * 255 < 1 << 15


def in_groups(inner: int, dot: Dot) -> int:
    """Inputs, rounded up to whole groups."""
    return -(-inner // dot.group) * dot.group


def pack_codes(codes: Codes, width: int, dot: Dot) -> npt.NDArray[Any]:
    """[out, in] -> [panels, in / group, width, group], zero padded, raised where the instruction asks for it."""
    outputs, inner = codes.shape
    whole = np.zeros((-(-outputs // width) * width, in_groups(inner, dot)), np.int16)
    whole[:outputs, :inner] = codes.astype(np.int16) + dot.raised
    packed = whole.reshape(-1, width, whole.shape[1] // dot.group, dot.group).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(packed.astype(dot.weights))


def column_sums(codes: Codes, width: int) -> npt.NDArray[np.int32]:
    """sum(c) per output, padded to whole panels."""
    sums = np.zeros(-(-codes.shape[0] // width) * width, np.int32)
    sums[: codes.shape[0]] = codes.astype(np.int32).sum(1)
    return sums


def load_weights(kernel: Kernel, dot: Dot, buffer: Any, at: Expr, lanes: int) -> Expr:
    """The codes of `lanes` outputs (a group each), as `multiply` takes them."""
    count = lanes * dot.group
    loaded = kernel.load(buffer, at, count)
    return kernel.let(cast(typed("int16", count), loaded) if dot.group == 2 else loaded)


def spread_group(kernel: Kernel, dot: Dot, buffer: Any, at: Expr, lanes: int) -> Expr:
    """One group of x in every lane."""
    some = reinterpret("int32", kernel.load(buffer, at, dot.group))
    return kernel.let(spread(some, lanes))


def spread_weight(kernel: Kernel, buffer: Any, at: Expr, lanes: int) -> Expr:
    """One output's group of weights, which lies as an int32, in every lane."""
    return kernel.let(spread(kernel.load(buffer, at), lanes))


def multiply(dot: Dot, sums: Expr, x: Expr, w: Expr, lanes: int) -> Expr:
    """sums [lanes] + the products of each lane's group; x and w are vectors of 32 bits a lane, of any element type."""
    total, name = typed("int32", lanes), dot.instruction
    if dot.group == 2:
        pairs = typed("int16", 2 * lanes)
        x, w = reinterpret(pairs, x), reinterpret(pairs, w)
        return sums + intrinsic(total, _PAIRS[name, lanes], x, w)
    signed, unsigned = typed("int8", 4 * lanes), typed("uint8", 4 * lanes)
    if name == "vpdpbusd":
        x, w = reinterpret(unsigned, x), reinterpret(signed, w)
        return intrinsic(total, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", sums, x, w)
    if name == "vpmaddubsw":
        first, second = {8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
                         16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512")}[lanes]  # fmt: skip
        halves = intrinsic(typed("int16", 2 * lanes), first, reinterpret(signed, x), reinterpret(signed, w))
        return sums + intrinsic(total, second, halves, spread(tirx.IntImm("int16", 1), 2 * lanes))
    x, w = reinterpret(signed, x), reinterpret(signed, w)
    if name == "sdot":
        return intrinsic(total, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, w, x)
    if name == "relaxed_dot":
        return intrinsic(total, "llvm.wasm.relaxed.dot.i8x16.i7x16.add.signed", x, w, sums)
    return sums + _two_products(x, w)


def _two_products(x: Expr, w: Expr) -> Expr:
    """smull, smlal and the sum of neighbours: the first two codes of every lane's four, plus the other two."""
    halves = []
    for half in range(2):
        chosen = [tirx.IntImm("int32", 4 * lane + 2 * half + i) for lane in range(4) for i in range(2)]
        parts = (cast("int16x8", tirx.Shuffle([value], chosen)) for value in (x, w))
        halves.append(next(parts) * next(parts))
    return intrinsic("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", halves[0] + halves[1])


__all__ = ["DOTS", "Dot", "column_sums", "dot_for", "in_groups", "load_weights", "multiply", "pack_codes", "pairs_fit",
           "preferred", "spread_group", "spread_weight"]  # fmt: skip
