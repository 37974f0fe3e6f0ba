"""The custom-operator library beside an ONNX file: own kernels that ONNX Runtime loads, without fxopt or TVM.

    options.register_custom_ops_library("model.so")

A file says in its metadata that it needs one (`fxopt.library`, the name of a file in the same folder). Loading such a
file runs the library's code, as loading any library does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from fxopt.backends.onnxruntime.fused_forms import ATTENTION, DOMAIN, LINEAR, SPARSE
from fxopt.errors import InvalidModel
from fxopt.ir.ops.linear_u8s8 import EPILOGUES

KEY = "fxopt.library"
SUFFIX = ".so"
_END = 1 << 18  # bytes of a file in which its metadata lie: behind the graph


def needs_library(model: ModelProto) -> bool:
    """Whether nodes of the model are our own operators."""
    return any(entry.domain == DOMAIN for entry in model.opset_import)


def build_library(model: ModelProto, path: Path) -> Path:
    """Write the library with the kernels that the nodes of a model need.

    Raises:
        MissingDependency: a package of fxopt[tvm] is not installed.
        OutputError: the compiler or the linker refuses, or the file cannot be written.
    """
    from fxopt.backends.tvm.custom_ops import build_custom_ops
    from fxopt.backends.tvm.kernels.attention_int8 import AttentionForm
    from fxopt.backends.tvm.kernels.fused_int8 import Form
    from fxopt.backends.tvm.kernels.rows_u8 import RowForm
    from fxopt.backends.tvm.kernels.sparse_int8 import SparseForm

    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    forms: list[Form | RowForm | AttentionForm] = []
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        values = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if node.op_type in (LINEAR, SPARSE):
            outputs, inner = sizes[node.input[1]]
            epilogue: Any = EPILOGUES[values["epilogue"]]
            made = SparseForm if node.op_type == SPARSE else Form
            forms.append(made(inner, outputs, epilogue, bool(values["floats"]), bool(values["codes"]), values["eps"]))
        elif node.op_type == ATTENTION:
            (size,) = sizes[node.input[3]]
            forms.append(AttentionForm(size // values["num_heads"], size))
        else:
            forms.append(RowForm(sizes[node.input[1]][0], values.get("eps")))
    return build_custom_ops(forms, path)


def library_of(path: str | os.PathLike[str]) -> Path | None:
    """The library that a model file needs; None when it needs none.

    Raises:
        InvalidModel: it needs one that is not there.
    """
    beside = Path(path).with_suffix(SUFFIX)
    if not beside.is_file() and not _may_need_one(Path(path)):
        return None
    model = onnx.load(path, load_external_data=False)
    named = {entry.key: entry.value for entry in model.metadata_props}.get(KEY)
    if not needs_library(model):
        return None
    library = Path(path).with_name(Path(named).name) if named else beside
    library = library if library.is_file() else beside  # both were renamed
    if not library.is_file():
        raise InvalidModel(
            f"{path} needs the library {library.name} with its kernels, which was written beside it; copy both files"
        )
    return library


def _may_need_one(path: Path) -> bool:
    """Whether the end of the file, where the metadata are, names a library: files may be large."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _END))
        return KEY.encode() in file.read()
