"""TIR functions to one LLVM object file with plain C functions: `void NAME(float*, ...)`, no undefined symbols.

Only what the code generator needs is run: the target is bound and intrinsics are lowered. `LowerTVMBuiltin` is left
out, since it would put every local buffer behind a call of TVM's runtime, and so is `StmtSimplify`, which takes floats
for reals: it makes (x + c) - c to x.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fxopt.backends.tvm.library import tirx, tvm
from fxopt.backends.tvm.machine import Machine
from fxopt.errors import OutputError, Unsupported


def generate(functions: Iterable[Any], machine: Machine) -> Any:
    """LLVM code of the functions, which are named by their attribute `global_symbol`."""
    target = tvm.target.Target(machine.llvm)
    module = tvm.IRModule({str(function.attrs["global_symbol"]): function for function in functions})
    module = tirx.transform.BindTarget(target.with_host(target))(module)
    module = tirx.transform.LowerIntrin()(module)
    return tvm.get_global_func("target.build.llvm")(module, target)


def check_processor(machine: Machine) -> None:
    """Raise when LLVM knows that the machine's processor lacks one of its instruction sets.

    Raises:
        Unsupported: it does; code with these instructions would crash there.
    """
    if machine.family != "arm" or not machine.cpu:
        return
    target = tvm.target.Target({"kind": "llvm", "mtriple": machine.triple, "mcpu": machine.cpu})
    names = [feature.removeprefix("+") for feature in machine.features]
    lacking = [name for name in names if not tvm.target.codegen.llvm_cpu_has_features(name, target)]
    if lacking:
        has = ", ".join(name for name in names if name not in lacking) or "none of them"
        raise Unsupported(
            f"{machine.cpu} has no {' and no '.join(lacking)} (it has {has}): code for it would crash there"
        )


def write_object(functions: Iterable[Any], machine: Machine, path: str | os.PathLike[str]) -> Path:
    """Write a relocatable object.

    Raises:
        OutputError: the file cannot be written.
    """
    return _write(generate(functions, machine), path, "o")


def assembly(functions: Iterable[Any], machine: Machine, scratch: Path) -> str:
    """The assembly text: tests look for the instructions that a kernel was made for."""
    return _write(generate(functions, machine), scratch / "kernel.s", "s").read_text(encoding="utf-8")


def _write(code: Any, path: str | os.PathLike[str], kind: str) -> Path:
    made = Path(path)
    try:
        code.write_to_file(str(made), kind)
    except Exception as error:  # tvm raises its own classes
        raise OutputError(f"{made} cannot be written: {error}") from error
    return made
