"""Objects to shared libraries and WebAssembly modules, with the linkers and the C compiler of the package ziglang.

Nothing here needs a C library for the target: kernels have no undefined symbols but `memcpy` and `memset`, which the
program that loads a shared library has, and which WebAssembly has as instructions. So no C library is ever built.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fxopt.backends.tvm.machine import Machine
from fxopt.errors import MissingDependency, OutputError

STACK_BYTES = 1 << 20  # of a WebAssembly module
_FREESTANDING = ("-O2", "-std=c23", "-ffreestanding", "-fno-stack-protector", "-c")


def compile_c(source: Path, machine: Machine) -> Path:
    """Compile a C file that includes no header of a C library; the object lies beside it.

    Raises:
        MissingDependency: the package ziglang is not installed.
        OutputError: the compiler refuses.
    """
    made = source.with_suffix(".c.o")
    position = () if machine.family == "wasm" else ("-fPIC",)
    _zig("cc", "-target", machine.clang, *_FREESTANDING, *position, source.name, "-o", made.name, cwd=source.parent)
    return made


def link(objects: Sequence[Path], exports: Sequence[str], machine: Machine, path: Path) -> Path:
    """Link a `.so` (soname: its file name) or, for WebAssembly, a `.wasm` with the exports and its memory.

    Raises:
        MissingDependency: the package ziglang is not installed.
        OutputError: the linker refuses.
    """
    names = [str(item.resolve()) for item in objects]
    folder = path.resolve().parent
    if machine.family == "wasm":
        shown = [f"--export={name}" for name in (*exports, "__heap_base")]
        stack = ["-z", f"stack-size={STACK_BYTES}", "--stack-first"]
        _zig(
            "wasm-ld", "--no-entry", "--strip-all", "--gc-sections", *stack, *shown, *names, "-o", path.name, cwd=folder
        )
        return path
    emulation = {"x86": "elf_x86_64", "arm": "aarch64linux"}[machine.family]
    _zig(
        "ld.lld",
        "-m",
        emulation,
        "-shared",
        "-Bsymbolic",
        "-soname",
        path.name,
        "--strip-all",
        *names,
        "-o",
        path.name,
        cwd=folder,
    )
    return path


def link_program(objects: Sequence[Path], machine: Machine, path: Path) -> Path:
    """Link a program that starts at `_start` and uses no library; it keeps its symbols.

    Raises:
        MissingDependency: the package ziglang is not installed.
        OutputError: the linker refuses.
    """
    emulation = {"x86": "elf_x86_64", "arm": "aarch64linux"}[machine.family]
    names = [str(item.resolve()) for item in objects]
    _zig("ld.lld", "-m", emulation, "-static", "-e", "_start", *names, "-o", path.name, cwd=path.resolve().parent)
    return path


def _zig(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "ziglang", *arguments]
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OutputError(f"zig {arguments[0]} did not run: {error}") from error
    if "No module named ziglang" in done.stderr:
        raise MissingDependency("linking needs ziglang; install it: pip install 'fxopt[tvm]'")
    if done.returncode:
        raise OutputError(f"zig {arguments[0]} failed: {' '.join(done.stderr.split())[-2000:]}")
