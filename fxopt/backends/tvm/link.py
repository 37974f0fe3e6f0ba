"""Objects to shared libraries and WebAssembly modules, with the linkers and the C compiler of the package ziglang.

Nothing here needs a C library for the target: kernels have no undefined symbols but `memcpy` and `memset`, which the
program that loads a shared library has, and which WebAssembly has as instructions. So no C library is ever built.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fxopt.backends.tvm.machine import Machine
from fxopt.errors import MissingDependency, OutputError

STACK_BYTES = 1 << 20  # of a WebAssembly module
_EMULATIONS = {"x86": "elf_x86_64", "arm": "aarch64linux"}
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
    """Link objects of one folder to a `.so` (soname: its file name) or a `.wasm` (which exports its memory too).

    A `.so` without `exports` shows all of its symbols.

    Raises:
        MissingDependency: the package ziglang is not installed.
        OutputError: the linker refuses.
    """
    names, made = [item.name for item in objects], str(path.resolve())
    folder = objects[0].parent
    if machine.family == "wasm":
        shown = [f"--export={name}" for name in (*exports, "__heap_base")]
        options = ["--no-entry", "--strip-all", "--gc-sections", "-z", f"stack-size={STACK_BYTES}", "--stack-first"]
        _zig("wasm-ld", *options, *shown, *names, "-o", made, cwd=folder)
        return path
    options = ["-shared", "-Bsymbolic", "-soname", path.name, "--strip-all"]
    if exports:
        script = folder / f"{path.name}.version"
        script.write_text(f"{{ global: {'; '.join(exports)}; local: *; }};\n", encoding="utf-8")
        options.append(f"--version-script={script.name}")
    _zig("ld.lld", "-m", _EMULATIONS[machine.family], *options, *names, "-o", made, cwd=folder)
    return path


def link_program(objects: Sequence[Path], machine: Machine, path: Path) -> Path:
    """Link a program that starts at `_start` and uses no library; it keeps its symbols.

    Raises:
        MissingDependency: the package ziglang is not installed.
        OutputError: the linker refuses.
    """
    options = ["-static", "-e", "_start"]
    names = [str(item.resolve()) for item in objects]
    _zig("ld.lld", "-m", _EMULATIONS[machine.family], *options, *names, "-o", path.name, cwd=path.resolve().parent)
    return path


def _zig(*arguments: str, cwd: Path) -> None:
    command = [sys.executable, "-m", "ziglang", *arguments]
    cache = str(cwd / "zig")  # not the user's: it would keep a copy of every model's weights
    settings = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    try:
        done = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OutputError(f"zig {arguments[0]} did not run: {error}") from error
    if "No module named ziglang" in done.stderr:
        raise MissingDependency("linking needs ziglang; install it: pip install 'fxopt[tvm]'")
    if done.returncode:
        raise OutputError(f"zig {arguments[0]} failed: {' '.join(done.stderr.split())[-2000:]}")
