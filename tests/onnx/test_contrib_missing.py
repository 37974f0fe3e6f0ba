"""The list of ONNX Runtime's own operators without a torch reference is complete, and every reference is tested."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state

from fxopt.errors import MissingReference
from fxopt.ir.onnx import registry
from fxopt.ir.onnx.op import OnnxOp

HERE = Path(__file__).parent
STANDARD = {"ai.onnx.ml", "ai.onnx.preview.training", "ai.onnx.training"}
OWN = ("com.microsoft", "com.ms.internal.nhwc")


def listed() -> dict[tuple[str, str], str]:
    found = {}
    for line in (HERE / "contrib_missing.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        name, reason = line.split(": ", 1)
        domain, op_type = name.rsplit("::", 1)
        assert reason, line
        assert (domain, op_type) not in found, line
        found[domain, op_type] = reason
    return found


def own_operators() -> set[tuple[str, str]]:
    """Operators of ONNX Runtime that are in no version of the ONNX specification."""
    standard = {schema.name for schema in onnx.defs.get_all_schemas()}
    every = {(schema.domain, schema.name) for schema in onnxruntime_pybind11_state.get_all_operator_schema()}
    return {(domain, name) for domain, name in every if domain not in STANDARD and (domain or name not in standard)}


@pytest.mark.skipif(not onnxruntime.__version__.startswith("1.32."), reason="the list is for ONNX Runtime 1.32")
def test_list_is_complete() -> None:
    missing = {key for key in own_operators() if key not in registry.table()}
    assert missing == set(listed())


def test_listed_operator_says_that_it_has_no_reference() -> None:
    for domain, op_type in listed():
        with pytest.raises(MissingReference, match=op_type):
            OnnxOp(domain, op_type, 1)()


def test_every_reference_is_tested() -> None:
    text = "".join(path.read_text() for path in HERE.glob("test_*contrib*.py"))
    own = [name for domain, name in registry.table() if domain in OWN]
    assert [name for name in own if f'"{name}"' not in text] == []
