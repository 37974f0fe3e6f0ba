"""Run kernels and models for 64-bit Arm under qemu-user, and count the instructions that they execute.

Nothing of the emulated program needs a C library: `qemu_runner.c` reads arrays, calls the kernels and writes the arrays
back. `qemu_count.c` is a plug-in of qemu that counts per function. Times under an emulator say nothing; results do, and
counts of instructions are the same at every run.
"""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.link import compile_c, link, link_program
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import Machine, machine_for
from fxopt.backends.tvm.program import Program
from fxopt.backends.tvm.values import Slot
from fxopt.cost_model.targets import get_target
from fxopt.errors import OutputError

Array = npt.NDArray[Any]
_EMULATOR = "qemu-aarch64"


@dataclass(frozen=True)
class Call:
    """A call of a function on places in arrays: (number of the array, bytes from its start)."""

    function: str
    places: tuple[tuple[int, int], ...]


def missing() -> str:
    """Why nothing can be emulated here; "" when it can."""
    if shutil.which(_EMULATOR) is None:
        return f"{_EMULATOR} is not on the path (Debian's package qemu-user has it)"
    return ""


def run(
    functions: Sequence[Any], calls: Sequence[Call], arrays: Sequence[Array], machine: Machine, folder: Path,
    count: bool = False,
) -> tuple[list[Array], dict[str, int]]:  # fmt: skip
    """The arrays after the calls, and, with `count`, how many instructions each function executed.

    Raises:
        OutputError: the emulator fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = _built(functions, calls, machine, folder)
    plugin = ["-plugin", f"{_plugin(folder)}", "-d", "plugin", "-D", str(folder / "count.txt")] if count else []
    done = subprocess.run(
        [_EMULATOR, *plugin, str(program)], input=_packed(arrays), capture_output=True, timeout=1800, check=False
    )
    if done.returncode or len(done.stdout) != sum(array.nbytes for array in arrays):
        text = done.stderr.decode(errors="replace").strip()
        raise OutputError(f"{_EMULATOR} ended with {done.returncode} and {len(done.stdout)} bytes: {text[-500:]}")
    found, at = [], 0
    for array in arrays:
        piece = np.frombuffer(done.stdout, array.dtype, array.size, at)
        found.append(piece.reshape(array.shape).copy())
        at += array.nbytes
    return found, _counts(folder / "count.txt") if count else {}


def run_program(
    program: Program, weights: bytes, inputs: Sequence[Array], machine: Machine, folder: Path, count: bool = False
) -> tuple[list[Array], dict[str, int]]:
    """The outputs of a whole model on inputs of its types, and the instructions of each kernel."""
    kinds = {"float32": np.float32, "int64": np.int64, "int32": np.int32, "uint8": np.uint8}
    outputs = [np.zeros(slot.count, kinds[slot.dtype]) for slot in program.outputs]
    arena = np.zeros(max(program.arena_bytes, 1), np.uint8)
    constants = np.frombuffer(weights or b"\0", np.uint8)
    arrays: list[Array] = [arena, constants, *inputs, *outputs]
    firsts = {"arena": 0, "constant": 1, "input": 2, "output": 2 + len(inputs)}

    def place(slot: Slot) -> tuple[int, int]:
        number = firsts[slot.place] + (slot.index if slot.place in ("input", "output") else 0)
        return number, slot.offset

    calls = [Call(step.function, tuple(map(place, step.slots))) for step in program.steps]
    found, counts = run(program.kernels(), calls, arrays, machine, folder, count)
    return found[firsts["output"] :], counts


def _built(functions: Sequence[Any], calls: Sequence[Call], machine: Machine, folder: Path) -> Path:
    """The program: the kernels, one function with all calls, the runner."""
    (folder / "job.c").write_text(_job(calls), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("qemu_runner.c"), folder / "runner.c")
    objects = [write_object(functions, machine, folder / "kernels.o")]
    objects += [compile_c(folder / name, machine) for name in ("job.c", "runner.c")]
    return link_program(objects, machine, folder / "program")


def _job(calls: Sequence[Call]) -> str:
    sizes = {call.function: len(call.places) for call in calls}
    lines = [f"void {name}({', '.join(['void *'] * count) or 'void'});" for name, count in sorted(sizes.items())]
    lines.append("void job(void **arrays) {")
    for call in calls:
        given = ", ".join(f"(char *)arrays[{number}] + {offset}" for number, offset in call.places)
        lines.append(f"  {call.function}({given});")
    return "\n".join([*lines, "}", ""])


def _plugin(folder: Path) -> Path:
    """The plug-in, for the interface that the installed qemu has."""
    shown = subprocess.run([_EMULATOR, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"version (\d+)\.(\d+)", shown)
    newer = version is not None and (int(version[1]), int(version[2])) >= (8, 2)
    source = Path(__file__).with_name("qemu_count.c").read_text(encoding="utf-8")
    (folder / "count.c").write_text(f"#define PLUGIN_VERSION {2 if newer else 1}\n{source}", encoding="utf-8")
    host = machine_for(get_target("host" if platform.machine() in ("x86_64", "AMD64") else "aarch64"))
    return link([compile_c(folder / "count.c", host)], [], host, folder / "count.so")


def _packed(arrays: Sequence[Array]) -> bytes:
    parts = [struct.pack("<q", len(arrays))]
    for array in arrays:
        parts += [struct.pack("<q", array.nbytes), np.ascontiguousarray(array).tobytes()]
    return b"".join(parts)


def _counts(path: Path) -> dict[str, int]:
    rows = re.findall(r"executed (\S+) (\d+)", path.read_text(encoding="utf-8", errors="replace"))
    return {name: int(number) for name, number in rows}
