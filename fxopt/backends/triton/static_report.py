"""What a compiled kernel is made of: registers, spills, shared memory, instructions, and how many blocks fit a chip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxopt.backends.triton import library
from fxopt.backends.triton.chips import Chip
from fxopt.errors import Unsupported

# Classes of instructions, by the beginning of their names; the first that fits counts.
_CLASSES = (
    ("tensor", r"(HMMA|IMMA|DMMA|QMMA|OMMA|[HIQ]GMMA|UTC\w*MMA)"),
    ("async_copy", r"LDGSTS"),
    ("tma", r"(UTMA|UBLKCP)"),
    ("global_load", r"LDG"),
    ("global_store", r"STG"),
    ("shared_load", r"LDS"),
    ("shared_store", r"STS"),
    ("local", r"(LDL|STL)"),
    ("atomic", r"(ATOM|RED)"),
    ("half", r"(HFMA|HMUL|HADD|HSETP|HMNMX)"),
    ("float", r"(FFMA|FMUL|FADD|FSEL|FMNMX|FSETP)"),
    ("convert", r"(I2F|F2I|F2F|I2I|F2FP|I2FP|I2IP)"),
    ("special", r"MUFU"),
    ("logic", r"(LOP3|PRMT|SHF|SHL|SHR|SGXT|BREV|POPC|FLO)"),
    ("integer", r"(IADD|IMAD|LEA|IABS|IMNMX|VIADD|VIMNMX|ISETP|IDP|VIADDMNMX)"),
    ("barrier", r"(BAR|WARPSYNC|SYNCS|WARPGROUP|DEPBAR|LDGDEPBAR|ARRIVES|ERRBAR|MEMBAR|FENCE|CCTL)"),
    ("shuffle", r"(SHFL|VOTE|REDUX|MATCH)"),
    ("branch", r"(BRA|BSSY|BSYNC|EXIT|BREAK|CALL|RET|JMP)"),
    ("move", r"(MOV|SEL|CS2R|S2R|S2UR|R2UR|R2P|P2R|PLOP3|NOP)"),
)
_UNIFORM = re.compile(r"U(?!TC|TMA|BLKCP)(?=[A-Z])")  # the same instruction once per warp


@dataclass(frozen=True)
class StaticReport:
    """One compiled kernel.

    Attributes:
        registers: of a thread. spilled: bytes of a thread that are stored to memory for lack of registers.
        shared: bytes of a block.
        loop: instructions of the hottest loop by class (most tensor instructions, else the longest).
        tensor_names: the tensor-core instructions of the whole kernel, by the beginning of their names ("HMMA").
    """

    kernel: str
    arch: int
    warps: int
    registers: int
    spilled: int
    shared: int
    loop: Mapping[str, int]
    tensor_names: Mapping[str, int]

    @property
    def loop_length(self) -> int:
        """Instructions of a thread in one trip of the hottest loop."""
        return sum(self.loop.values())

    def per_weight(self, weights: int) -> float:
        """Thread instructions per weight, where the hottest loop takes so many weights a trip."""
        return self.loop_length * self.warps * 32 / weights

    def resident(self, chip: Chip) -> int:
        """Blocks that a multiprocessor holds at the same time."""
        per_warp = -(-self.registers * 32 // 256) * 256
        fits = [
            chip.threads // (32 * self.warps),
            chip.blocks,
            chip.registers // max(1, per_warp) // self.warps,
            chip.shared // (self.shared + 1024),  # the system takes 1 KiB of each block's
        ]
        return max(0, min(fits))

    def occupancy(self, chip: Chip) -> float:
        """Share of a multiprocessor's threads that are in use."""
        return self.resident(chip) * self.warps * 32 / chip.threads

    def refusal(self, chip: Chip) -> str:
        """Why the kernel is not used on the chip; "" when it is."""
        if self.spilled:
            return f"{self.registers} registers do not suffice: {self.spilled} bytes a thread are spilled"
        if self.shared > chip.block_shared:
            return f"{self.shared} bytes of shared memory a block; {chip.sm} has {chip.block_shared}"
        return ""

    def __str__(self) -> str:
        mix = ", ".join(f"{count} {name}" for name, count in self.loop.items())
        return (
            f"{self.kernel} on sm_{self.arch}: {self.warps} warps, {self.registers} registers, {self.spilled} bytes "
            f"spilled, {self.shared} bytes shared; loop of {self.loop_length}: {mix}"
        )


def report_on(kernel: Any) -> StaticReport:
    """The report of one of Triton's compiled kernels.

    Raises:
        Unsupported: it was not compiled for an NVIDIA GPU, or the disassembler fails.
    """
    cubin = kernel.asm.get("cubin")
    if cubin is None:
        raise Unsupported(f"kernel {kernel.metadata.name} holds no cubin; reports are of NVIDIA kernels")
    registers, _ = usage_of(kernel)
    listing = _tool("-sass", cubin)
    code = _instructions(listing)
    loop = _hottest(code)
    spilled = sum(_width(name) for _, name, _ in code if name.startswith("STL"))
    tensor = Counter(name.split(".")[0] for _, name, _ in code if re.match(_CLASSES[0][1], name))
    return StaticReport(
        str(kernel.metadata.name), int(kernel.metadata.target.arch), int(kernel.metadata.num_warps), registers,
        spilled, int(kernel.metadata.shared), _classified(loop), dict(tensor),
    )  # fmt: skip


def usage_of(kernel: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: without a stack nothing is spilled.

    Raises:
        Unsupported: as `report_on`.
    """
    usage = _tool("-res-usage", kernel.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise Unsupported(f"the disassembler says nothing of the registers of {kernel.metadata.name}")
    return int(found[1]), int(found[2])


def _tool(option: str, cubin: bytes) -> str:
    """What cuobjdump prints."""
    tool = str(library.module("knobs").nvidia.cuobjdump.path)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise Unsupported(f"{tool} {option} fails: {done.stderr.strip()}")
    return done.stdout


_Instruction = tuple[int, str, str]  # address, full name, text


def _instructions(listing: str) -> list[_Instruction]:
    code = []
    for match in re.finditer(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", listing, re.MULTILINE):
        text = match[2].strip()
        name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
        if name != "NOP":
            code.append((int(match[1], 16), name, text))
    return code


def _hottest(code: list[_Instruction]) -> list[str]:
    """The names of the loop with most tensor instructions (of equal ones the shortest), else of the longest one.

    Of nested loops the inner one counts.
    """
    bodies: list[tuple[int, int, list[str]]] = []
    for address, name, text in code:
        target = re.search(r"0x([0-9a-f]+)", text) if name.startswith("BRA") else None
        if target is not None and int(target[1], 16) < address:
            begin = int(target[1], 16)
            bodies.append((begin, address, [other for place, other, _ in code if begin <= place <= address]))
    bodies = [found for found in bodies if _tensor(found[2])] or bodies
    inner = [
        body
        for begin, end, body in bodies
        if not any((begin, end) != (b, e) and begin <= b and e <= end for b, e, _ in bodies)
    ]
    return max(inner, key=lambda body: (_tensor(body), -len(body) if _tensor(body) else len(body)), default=[])


def _tensor(body: list[str]) -> int:
    return sum(1 for name in body if re.match(_CLASSES[0][1], name))


def _classified(names: Any) -> dict[str, int]:
    found: Counter[str] = Counter()
    for name in names:
        plain = _UNIFORM.sub("", name, count=1) if name.startswith("U") else name
        found[next((label for label, pattern in _CLASSES if re.match(pattern, plain)), "other")] += 1
    return {label: found[label] for label in (*(label for label, _ in _CLASSES), "other") if found[label]}


def _width(name: str) -> int:
    """Bytes that a load or store of local memory moves."""
    return 16 if ".128" in name else 8 if ".64" in name else 4
