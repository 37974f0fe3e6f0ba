"""One ONNX node in ONNX Runtime and in torch, for comparisons."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, TypeProto, ValueInfoProto, defs, helper

from fxopt.frontends.onnx import load
from fxopt.ir.onnx.values import from_array, to_array

Array = np.ndarray[Any, Any]


def model_of(
    op_type: str, opset: int, inputs: list[Any], outputs: int, attributes: dict[str, Any], domain: str = ""
) -> Any:
    """A model of one node; None is an omitted input."""
    names = [f"x{index}" if value is not None else "" for index, value in enumerate(inputs)]
    results = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(op_type, names, results, domain=domain, **attributes)
    infos = [
        helper.make_tensor_value_info(name, element_type(value), np.shape(value))
        for name, value in zip(names, inputs, strict=True)
        if value is not None
    ]
    graph = helper.make_graph([node], "one", infos, [ValueInfoProto(name=name, type=TypeProto()) for name in results])
    for value in graph.output:
        value.ClearField("type")
    imports = [
        helper.make_opsetid("", 20 if domain else opset),
        *([helper.make_opsetid(domain, opset)] if domain else []),
    ]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def element_type(value: Any) -> int:
    """The ONNX data type of a numpy value."""
    array = np.asarray(value)
    return int(TensorProto.STRING) if array.dtype.kind in "OUS" else int(helper.np_dtype_to_tensor_dtype(array.dtype))


def feeds_of(inputs: list[Any]) -> dict[str, Any]:
    """The inputs by name."""
    return {f"x{index}": np.asarray(value) for index, value in enumerate(inputs) if value is not None}


def by_runtime(model: Any, feeds: dict[str, Any]) -> list[Any]:
    """The outputs in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def by_torch(model: Any, feeds: dict[str, Any]) -> list[Any]:
    """The outputs by the references, without any evaluator."""
    results = load(model, check=False).run([from_array(feeds[value.name]) for value in model.graph.input])
    return [to_array(result) for result in results]


def assert_same(actual: list[Any], expected: list[Any], rtol: float = 0.0, atol: float = 0.0) -> None:
    """Equal types, shapes and values; floats within the tolerances."""
    assert len(actual) == len(expected)
    for result, wanted in zip(actual, expected):
        result, wanted = np.asarray(result), np.asarray(wanted)
        assert result.shape == wanted.shape
        if wanted.dtype.kind in "OUS":
            assert result.astype(str).tolist() == wanted.astype(str).tolist()
            continue
        assert result.dtype == wanted.dtype
        np.testing.assert_allclose(result, wanted, rtol=rtol, atol=atol)


def newest(op_type: str, domain: str = "") -> int:
    """The newest since-version of an operator."""
    versions = [
        schema.since_version
        for schema in defs.get_all_schemas_with_history()
        if (schema.domain, schema.name) == (domain, op_type)
    ]
    return max(versions)
