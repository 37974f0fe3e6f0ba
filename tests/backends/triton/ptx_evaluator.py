"""An evaluator of the PTX instructions that the kernels' inline assembly uses, on numpy."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]


def evaluate(text: str, outputs: int, inputs: list[Words]) -> list[Words]:
    """The registers `$0` ... `$outputs-1` after the text ran on many lanes at once."""
    registers: dict[str, Words] = {f"${outputs + index}": words for index, words in enumerate(inputs)}
    lanes = len(inputs[0])
    declared = {name.strip() for names in re.findall(r"\.reg \.b32 ([^;]*);", text) for name in names.split(",")}
    written = set()
    for statement in re.split(r"[;{}]", text):
        line = statement.strip()
        if not line or line.startswith(".reg"):
            continue
        name, rest = line.split(None, 1)
        out, *operands = (operand.strip() for operand in rest.split(","))
        assert out in declared or out.startswith("$"), f"{out} is not declared"
        values = [_operand(operand, registers, lanes) for operand in operands]
        registers[out] = _INSTRUCTIONS[name](*values)
        written.add(out)
    return [registers[f"${index}"] for index in range(outputs)]


def fp16(words: Words) -> npt.NDArray[np.float64]:
    """Pairs of halves, [lanes, 2]."""
    return np.ascontiguousarray(words).view(np.float16).reshape(-1, 2).astype(np.float64)


def bf16(words: Words) -> npt.NDArray[np.float64]:
    """Pairs of bfloat16, [lanes, 2]."""
    halves = np.ascontiguousarray(words).view(np.uint16).astype(np.uint32) << np.uint32(16)
    return halves.view(np.float32).reshape(-1, 2).astype(np.float64)


def _operand(text: str, registers: dict[str, Words], lanes: int) -> Words:
    if text in registers:
        return registers[text]
    return np.full(lanes, int(text, 0), np.uint32)


def _lop3(a: Words, b: Words, c: Words, table: Words) -> Words:
    result = np.zeros_like(a)
    for index in range(8):
        if int(table[0]) >> index & 1:
            result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    sources = [(word >> np.uint32(8 * index)) & np.uint32(255) for word in (a, b) for index in range(4)]
    chosen = int(selector[0])
    result = np.zeros_like(a)
    for index in range(4):
        picked = chosen >> (4 * index) & 15
        assert picked < 8, "the sign mode of prmt is not used"
        result |= sources[picked] << np.uint32(8 * index)
    return result


def _rounded_fp16(values: npt.NDArray[np.float64]) -> Words:
    return np.ascontiguousarray(values.astype(np.float16)).view(np.uint32).reshape(-1)


def _rounded_bf16(values: npt.NDArray[np.float64]) -> Words:
    wide = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
    rounded = (wide + np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.ascontiguousarray(rounded.astype(np.uint16)).view(np.uint32).reshape(-1)


_INSTRUCTIONS = {
    "mov.b32": lambda a: a.copy(),
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "add.f16x2": lambda a, b: _rounded_fp16(fp16(a) + fp16(b)),
    "fma.rn.f16x2": lambda a, b, c: _rounded_fp16(fp16(a) * fp16(b) + fp16(c)),
    "fma.rn.bf16x2": lambda a, b, c: _rounded_bf16(bf16(a) * bf16(b) + bf16(c)),
}
