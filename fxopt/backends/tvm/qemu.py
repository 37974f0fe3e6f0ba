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

from fxopt.backends.tvm.compile import Build
from fxopt.backends.tvm.entry import Entry
from fxopt.backends.tvm.link import compile_c, link, link_program
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import Machine, machine_for
from fxopt.backends.tvm.runners import NUMPY
from fxopt.cost_model.targets import get_target
from fxopt.errors import OutputError

Array = npt.NDArray[Any]
EMULATOR = "qemu-aarch64"
_SECONDS = 600  # of one run


@dataclass(frozen=True)
class Call:
    """A call of a function on places in arrays: (number of the array, bytes from its start)."""

    function: str
    places: tuple[tuple[int, int], ...]


def missing() -> str:
    """Why nothing can be emulated here; "" when it can."""
    if shutil.which(EMULATOR) is None:
        return f"{EMULATOR} is not on the path (Debian's package qemu-user has it)"
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
    return run_objects([write_object(functions, machine, folder / "kernels.o")], calls, arrays, machine, folder, count)


def run_objects(
    objects: Sequence[Path], calls: Sequence[Call], arrays: Sequence[Array], machine: Machine, folder: Path,
    count: bool = False,
) -> tuple[list[Array], dict[str, int]]:  # fmt: skip
    """The same with functions that were compiled before.

    Raises:
        OutputError: the emulator fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = _built(objects, calls, machine, folder)
    plugin = ["-plugin", f"{_plugin(folder)}", "-d", "plugin", "-D", str(folder / "count.txt")] if count else []
    command = [EMULATOR, *plugin, str(program)]
    try:
        done = subprocess.run(command, input=_packed(arrays), capture_output=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OutputError(f"{EMULATOR} did not finish: {type(error).__name__}") from error
    if done.returncode or len(done.stdout) != sum(array.nbytes for array in arrays):
        text = done.stderr.decode(errors="replace").strip()
        raise OutputError(f"{EMULATOR} ended with {done.returncode} and {len(done.stdout)} bytes: {text[-500:]}")
    found, at = [], 0
    for array in arrays:
        piece = np.frombuffer(done.stdout, array.dtype, array.size, at)
        found.append(piece.reshape(array.shape).copy())
        at += array.nbytes
    return found, _counts(folder / "count.txt") if count else {}


def run_entry(
    build: Build, entry: Entry, inputs: Sequence[Array], folder: Path, count: bool = False
) -> tuple[list[Array], dict[str, int]]:
    """The outputs of an entry point on inputs of its types, and the instructions of each of its kernels.

    Raises:
        OutputError: the emulator fails.
    """
    arena = np.zeros(max(entry.arena_bytes, 1), np.uint8)
    weights = np.fromfile(build.weights, np.uint8)
    outputs: list[Array] = [np.zeros(port.shape, NUMPY[port.dtype]) for port in entry.outputs]
    arrays: list[Array] = [arena, weights, *inputs, *outputs]
    call = Call(entry.symbol, tuple((number, 0) for number in range(len(arrays))))
    found, counts = run_objects(build.objects, [call], arrays, build.machine, folder, count)
    return found[2 + len(inputs) :], counts


def _built(objects: Sequence[Path], calls: Sequence[Call], machine: Machine, folder: Path) -> Path:
    """The program: the kernels, one function with all calls, the runner."""
    (folder / "job.c").write_text(_job(calls), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("qemu_runner.c"), folder / "runner.c")
    made = [compile_c(folder / name, machine) for name in ("job.c", "runner.c")]
    return link_program([*objects, *made], machine, folder / "program")


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
    shown = subprocess.run([EMULATOR, "--version"], capture_output=True, text=True, check=True).stdout
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
