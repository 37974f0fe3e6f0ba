"""Fused 8-bit products as a custom-operator library of ONNX Runtime: a `.so` that deploys beside the `.onnx` file.

    options.register_custom_ops_library("model.so")

The file's nodes are `fxopt::FusedLinearInt8` (fused_int8.c says what its inputs and attributes are). A library has the
kernels of one model, for AVX-512 VNNI, AVX-VNNI and AVX2; the best one is chosen by the CPU's features when a node is
loaded, which is also when its weight is packed. It needs neither fxopt nor TVM, and C's malloc and free only.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from fxopt.backends.tvm.kernels.fused_int8 import Epilogue, Form, fused_int8, tile_for
from fxopt.backends.tvm.link import compile_c, link
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import machine_for
from fxopt.cost_model.targets import get_target

DOMAIN, OPERATOR = "fxopt", "FusedLinearInt8"
EPILOGUES: tuple[str, ...] = get_args(Epilogue)
LEVELS = {"x86-avx2": 1, "x86-avx-vnni": 2, "x86-avx512-vnni": 3}  # targets, and their places in fused_int8.c
_SOURCES = ("fused_int8.c", "ort_abi.h")


def attributes(form: Form, x_zero: int, y_zero: int = 0) -> dict[str, int | float]:
    """The attributes of the form's node."""
    return {
        "x_zero": x_zero,
        "y_zero": y_zero,
        "epilogue": EPILOGUES.index(form.epilogue),
        "floats": int(form.floats),
        "codes": int(form.codes),
        "eps": form.eps,
    }


def build_custom_ops(forms: Iterable[Form], path: Path) -> Path:
    """Write the library of the forms, each once.

    Raises:
        MissingDependency: a package of fxopt[tvm] is not installed.
        OutputError: the compiler or the linker refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        unique = list(dict.fromkeys(forms))
        objects, declared, rows = [], [], []
        for target, level in LEVELS.items():
            machine = machine_for(get_target(target))
            functions = {f"kernel_{level}_{index}": form for index, form in enumerate(unique)}
            made = [fused_int8(name, form, machine) for name, form in functions.items()]
            objects.append(write_object(made, machine, scratch / f"level{level}.o"))
            for name, form in functions.items():
                tile = tile_for(form.outputs, machine)
                declared.append(f"extern Function {name};")
                values = (
                    level, form.inner, form.outputs, EPILOGUES.index(form.epilogue), int(form.floats), int(form.codes),
                    f"{float(form.eps).hex()}f", tile.columns, tile.group, name,
                )  # fmt: skip
                rows.append("  {" + ", ".join(map(str, values)) + "},")
        table = [*declared, "static const Form KERNELS[] = {", *rows, "};", f"enum {{ COUNT = {len(rows)} }};", ""]
        (scratch / "kernels.h").write_text("\n".join(table), encoding="utf-8")
        for source in _SOURCES:
            shutil.copyfile(Path(__file__).with_name(source), scratch / source)
        host = machine_for(get_target("x86-avx2"))
        objects.append(compile_c(scratch / _SOURCES[0], host))
        return link(objects, ["RegisterCustomOps"], host, path)
