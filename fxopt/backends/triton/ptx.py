"""PTX texts that turn packed weight codes into pairs of 16-bit floats, for inline assembly in kernels.

Two neighbouring 32-bit words of a planar layout (`formats.py`) go in; per plane one register with two values comes out,
that of the first word in the low half. A code is put into the mantissa of a float of known exponent, so that the float
is `base + code * step`; one fused multiply-add removes base and step. All of it is exact.

Source of the trick: Kim et al., "Who Says Elephants Can't Run: Bringing Large Scale MoE Models into Cloud Scale
Production" (2022).
"""

from __future__ import annotations

import struct
from typing import Literal

Element = Literal["fp16", "bf16"]

_LOW, _HIGH = "0x5410", "0x7632"  # of prmt: the low halves of two words as one word, the high halves
_AND_OR = "0xea"  # of lop3: (a & b) | c
_TYPE = {"fp16": "f16x2", "bf16": "bf16x2"}
_MANTISSA = {"fp16": 10, "bf16": 7}  # bits
_BASE = {"fp16": 1024.0, "bf16": 128.0}  # the float whose mantissa counts in steps of one
_LEAST_SHIFT = 15  # of `shift4`: the value of code c is 2 ** (c - 15), where fp16 has it anyway


def integers(element: Element, bits: int) -> str:
    """The planes of codes of 4 or 2 bits, minus the middle code (8 or 2).

    As many codes of a 16-bit half as fit the mantissa are masked where they lie; then the half is shifted.
    """
    planes = 32 // bits
    middle = float(1 << (bits - 1))
    together = min(8 // bits, _MANTISSA[element] // bits)
    text = _Text(planes, element)
    for place in range(planes // 2):
        inside = place % together
        for half, source in enumerate("tu"):
            out = f"${half * planes // 2 + place}"
            if place and not inside:
                text.line(f"shr.u32 {source}, {source}, {bits * together};")
            mask = _twice(((1 << bits) - 1) << (bits * inside))
            base, step = _BASE[element], 2.0 ** (-bits * inside)
            text.line(f"lop3.b32 {out}, {source}, {mask:#010x}, {text.float_name(base)}, {_AND_OR};")
            text.affine(out, step, -base * step - middle)
    return str(text)


def shift4(element: Element) -> str:
    """Eight planes of +-2 ** (c - 15), of codes of a sign bit and three bits c; c = 0 is zero.

    The bits are moved to where a float has its sign and exponent: nothing is multiplied in fp16; in bf16, whose
    exponents begin lower, the result is scaled by a power of two.
    """
    exponent = _MANTISSA[element]  # position of its lowest bit
    bias = {"fp16": 15, "bf16": 127}[element]
    text = _Text(8, element)
    for half, source in enumerate("tu"):
        for place in range(4):
            out = f"${4 * half + place}"
            text.shifted("c", source, exponent - 4 * place)
            text.shifted("s", source, 12 - 4 * place)
            text.line(f"and.b32 c, c, {_twice(7 << exponent):#010x};")
            text.line(f"lop3.b32 {out}, s, 0x80008000, c, {_AND_OR};")
            if bias != _LEAST_SHIFT:
                text.affine(out, 2.0 ** (bias - _LEAST_SHIFT), -0.0)
    return str(text)


def scaled(element: Element, with_offset: bool) -> str:
    """A pair of values ($1) times a pair of scales ($2), plus, perhaps, a pair of offsets ($3)."""
    if with_offset:
        return f"fma.rn.{_TYPE[element]} $0, $1, $2, $3;"
    nothing = "{ .reg .b32 z; mov.b32 z, 0x80008000; "  # -0: adding it changes nothing, not even a sign
    return f"{nothing}fma.rn.{_TYPE[element]} $0, $1, $2, z; }}"


def constraints(outputs: int, inputs: int) -> str:
    """The register constraints of a text; results are written before all operands are read."""
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


class _Text:
    """A block of instructions; pairs of constants get a register each."""

    def __init__(self, planes: int, element: Element) -> None:
        self.element: Element = element
        self.constants: dict[int, str] = {}
        self.lines = [f"prmt.b32 {out}, ${planes}, ${planes + 1}, {half};" for out, half in (("t", _LOW), ("u", _HIGH))]

    def line(self, text: str) -> None:
        self.lines.append(text)

    def float_name(self, value: float) -> str:
        """The register that holds the 16-bit float twice."""
        bits = _twice(half_bits(self.element, value))
        return self.constants.setdefault(bits, f"k{len(self.constants)}")

    def affine(self, register: str, factor: float, added: float) -> None:
        """register * factor + added."""
        kind, offset = _TYPE[self.element], self.float_name(added)
        if factor == 1.0 and self.element == "fp16":  # sm_80 has no addition of bf16
            self.line(f"add.{kind} {register}, {register}, {offset};")
        else:
            self.line(f"fma.rn.{kind} {register}, {register}, {self.float_name(factor)}, {offset};")

    def shifted(self, out: str, source: str, left: int) -> None:
        """`source` moved to the left, by a negative number to the right."""
        if left < 0:
            self.line(f"shr.u32 {out}, {source}, {-left};")
        else:
            self.line(f"shl.b32 {out}, {source}, {left};" if left else f"mov.b32 {out}, {source};")

    def __str__(self) -> str:
        names = ["t", "u", "c", "s", *self.constants.values()]
        loads = [f"mov.b32 {name}, {bits:#010x};" for bits, name in self.constants.items()]
        return "{ " + " ".join([f".reg .b32 {', '.join(names)};", *loads, *self.lines]) + " }"


def half_bits(element: Element, value: float) -> int:
    """The bits of a 16-bit float that is exactly `value`."""
    if element == "fp16":
        bits: int = struct.unpack("<H", struct.pack("<e", value))[0]
        exact = struct.unpack("<e", struct.pack("<H", bits))[0] == value
    else:
        wide: int = struct.unpack("<I", struct.pack("<f", value))[0]
        bits, exact = wide >> 16, wide & 0xFFFF == 0
    assert exact, f"{value} is no {element}"
    return bits


def _twice(half: int) -> int:
    return half << 16 | half
