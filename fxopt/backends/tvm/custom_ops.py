"""Fused 8-bit products as a custom-operator library of ONNX Runtime: a `.so` that deploys beside the `.onnx` file.

    options.register_custom_ops_library("model.so")

The file's nodes are of the domain `fxopt` (fused_int8.c says what their inputs and attributes are). A library has the
kernels of one model, for AVX-512 VNNI, AVX-VNNI and AVX2; the best one is chosen by the CPU's features when a node is
loaded, which is also when its weight is packed. It needs neither fxopt nor TVM, and C's malloc and free only.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fxopt.backends.tvm.kernels.attention_int8 import AttentionForm, attention_int8, attention_tile
from fxopt.backends.tvm.kernels.fused_int8 import Form, fused_int8, tile_for
from fxopt.backends.tvm.kernels.rows_u8 import RowForm, rows_u8
from fxopt.backends.tvm.kernels.sparse_int8 import SparseForm, group_of, sparse_int8
from fxopt.backends.tvm.kernels.turn_u8 import panel_to_rows, rows_to_panel
from fxopt.backends.tvm.link import compile_c, link
from fxopt.backends.tvm.lower import write_object
from fxopt.backends.tvm.machine import Machine, machine_for
from fxopt.cost_model.targets import get_target
from fxopt.ir.ops.linear_u8s8 import EPILOGUES

DOMAIN, OPERATOR, SPARSE = "fxopt", "FusedLinearInt8", "SparseLinearInt8"
QUANTIZE, NORM_QUANTIZE, ATTENTION = "QuantizeRows", "LayerNormQuantizeRows", "AttentionInt8"
LEVELS = {"x86-avx2": 1, "x86-avx-vnni": 2, "x86-avx512-vnni": 3}  # targets, and their places in fused_int8.c
_SOURCES = ("fused_int8.c", "attention_int8.c", "rows_u8.c", "sparse_int8.c", "ort_abi.h")


def attributes(form: Form, x_zero: int, y_zero: int = 0) -> dict[str, int | float]:
    """The attributes of the form's node."""
    return {
        **({"x_panels": 0, "codes_panels": 0} if isinstance(form, SparseForm) else {}),
        "x_zero": x_zero,
        "y_zero": y_zero,
        "epilogue": EPILOGUES.index(form.epilogue),
        "floats": int(form.floats),
        "codes": int(form.codes),
        "eps": form.eps,
    }


def build_custom_ops(forms: Iterable[Form | RowForm | AttentionForm], path: Path) -> Path:
    """Write the library of the forms, each once.

    Raises:
        MissingDependency: a package of fxopt[tvm] is not installed.
        OutputError: the compiler or the linker refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        unique = list(dict.fromkeys(forms))
        objects = []
        tables: dict[str, list[tuple[Any, ...]]] = {"": [], "Sparse": [], "Turn": [], "Row": [], "Attention": []}
        for target, level in LEVELS.items():
            machine = machine_for(get_target(target))
            functions = []
            for index, form in enumerate(unique):
                name = f"kernel_{level}_{index}"
                table, function, row = _kernel(name, form, level, machine)
                functions.append(function)
                tables[table].append(row)
            if tables["Sparse"]:
                for into_panel, turn in enumerate((panel_to_rows, rows_to_panel)):
                    functions.append(turn(f"turn_{level}_{into_panel}", machine))
                    tables["Turn"].append((level, into_panel, f"turn_{level}_{into_panel}"))
            objects.append(write_object(functions, machine, scratch / f"level{level}.o"))
        text = "".join(_table(prefix, rows) for prefix, rows in tables.items())
        (scratch / "kernels.h").write_text(text, encoding="utf-8")
        for source in _SOURCES:
            shutil.copyfile(Path(__file__).with_name(source), scratch / source)
        host = machine_for(get_target("x86-avx2"))
        objects.append(compile_c(scratch / _SOURCES[0], host))
        return link(objects, ["RegisterCustomOps"], host, path)


def _kernel(
    name: str, form: Form | RowForm | AttentionForm, level: int, machine: Machine
) -> tuple[str, Any, tuple[Any, ...]]:
    """The name of the form's table, its function and its row in the table."""
    if isinstance(form, SparseForm):
        return "Sparse", sparse_int8(name, form, machine), (*_sizes(form, level), group_of(machine), name)
    if isinstance(form, Form):
        tile = tile_for(form.outputs, machine)
        return "", fused_int8(name, form, machine), (*_sizes(form, level), tile.columns, tile.group, name)
    if isinstance(form, AttentionForm):
        tile = attention_tile(form, machine)
        row = (level, form.width, form.stride, tile.rows, tile.columns, tile.group, name)
        return "Attention", attention_int8(name, form, machine), row
    return "Row", rows_u8(name, form, machine), (
        level, form.size, int(form.eps is not None), _literal(form.eps or 0.0), name,
    )  # fmt: skip


def _sizes(form: Form, level: int) -> tuple[Any, ...]:
    results = int(form.floats), int(form.codes)
    return (level, form.inner, form.outputs, EPILOGUES.index(form.epilogue), *results, _literal(form.eps))


def _table(prefix: str, rows: Sequence[tuple[Any, ...]]) -> str:
    """C: the functions, and the array of structs that ends with them (one empty row: C has no arrays of none)."""
    kernels, count = f"{prefix.upper()}_KERNELS".lstrip("_"), f"{prefix.upper()}_COUNT".lstrip("_")
    lines = [f"extern {prefix}Function {row[-1]};" for row in rows]
    lines.append(f"static const {prefix}Form {kernels}[] = {{")
    lines += ["  {" + ", ".join(map(str, row)) + "}," for row in rows]
    return "\n".join([*lines, "  {0}", "};", f"enum {{ {count} = {len(rows)} }};", ""])


def _literal(value: float) -> str:
    return f"{float(value).hex()}f"
