"""Torch references against the ONNX backend node suite, under fake tensors, and against ONNX's own evaluator.

`suite_exceptions.txt` lists the cases that are known not to pass, each with the reason; `test_backend_suite.py` checks
that the list is no longer than it must be.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import AttributeProto, NodeProto, TensorProto, defs, helper, numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.ir.onnx.dtypes import from_numpy
from fxopt.ir.onnx.foreign import holds_foreign
from fxopt.ir.onnx.lane import HOST_LIMIT
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.onnx.values import to_array

MISSING = {
    line.split(": ")[0].split("/")[-1]
    for line in Path(__file__).with_name("suite_exceptions.txt").read_text().splitlines()
    if line and not line.startswith("#")
}
DATA_DEPENDENT = {  # their output shape, or an operand that is not an int64 constant in the suite, needs data
    *("Compress", "NonZero", "Unique", "CumSum", "CumProd", "Dropout", "OneHot", "Range", "Resize", "Upsample"),
    *("BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix"),
    *("LabelEncoder", "OneHotEncoder", "TfIdfVectorizer", "TreeEnsemble"),
    *("NonMaxSuppression", "RoiAlign", "MaxRoiPool", "ImageDecoder", "Multinomial"),
}
FIXED_TYPE = {  # the output type is in an attribute, or none of the inputs'
    *("Cast", "CastLike", "BitCast", "Constant", "EyeLike", "BlackmanWindow", "HammingWindow", "HannWindow"),
    *("DequantizeLinear", "MelWeightMatrix", "TreeEnsemble", "Bernoulli"),
}


def domain_of(name: str) -> str:
    return "" if name == "ai.onnx" else name


def operator_of(case: TestCase) -> OnnxOp:
    node = case.model.graph.node[0]
    domain = domain_of(node.domain)
    opset = next(entry.version for entry in case.model.opset_import if domain_of(entry.domain) == domain)
    return OnnxOp(domain, node.op_type, defs.get_schema(node.op_type, opset, domain).since_version)


def is_runnable(case: TestCase) -> bool:
    """A single node without sub-graphs whose operator has a reference."""
    if len(case.model.graph.node) != 1:
        return False
    node = case.model.graph.node[0]
    if any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute):
        return False
    domains = {domain_of(entry.domain) for entry in case.model.opset_import}
    return domain_of(node.domain) in domains and operator_of(case).has_reference


@cache
def cases() -> dict[str, TestCase]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: dict[str, TestCase] = {}
        for case in load_model_tests(kind="node"):
            if is_runnable(case):
                found[f"{case.name}#2" if case.name in found else case.name] = case
    return found


def has_foreign(case: TestCase) -> bool:
    """Whether an input or an output has an element type that torch lacks."""
    inputs, outputs = case.data_sets[0]
    return any(map(holds_foreign, map(value_of, (*inputs, *outputs))))


def depends_on_data(case: TestCase) -> bool:
    inputs, outputs = case.data_sets[0]
    return (
        any(isinstance(data, (list, dict)) for data in (*inputs, *outputs))
        or has_foreign(case)
        or case.model.graph.node[0].op_type in DATA_DEPENDENT
    )


RUN = [name for name in cases() if name not in MISSING]


def value_of(data: Any, host: bool = False) -> Any:
    """A value of the suite as a value of the dialect; with `host`, small int64 arrays are host data."""
    if data is None:
        return None
    if isinstance(data, list):
        return [value_of(item) for item in data]
    array = np.asarray(numpy_helper.to_array(data) if isinstance(data, TensorProto) else data)
    if host and array.dtype == np.int64 and array.size <= HOST_LIMIT:
        return array
    try:
        return from_numpy(array)
    except TypeError:  # strings, 4-bit numbers, ...
        return array


def attributes_of(node: NodeProto) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        elif isinstance(value, TensorProto):
            value = value_of(value)
        elif attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
            value = list(value)
        elif attribute.type == AttributeProto.STRINGS:
            value = [item.decode() for item in value]
        result[attribute.name] = value
    if len(node.output) != 1:
        result["_outputs"] = len(node.output)
    return result


def operands(case: TestCase, inputs: list[Any], host: bool = False) -> list[Any]:
    graph = case.model.graph
    given = dict(zip([value.name for value in graph.input], inputs, strict=False))
    given |= {tensor.name: tensor for tensor in graph.initializer}
    return [value_of(given[name], host) if name else None for name in graph.node[0].input]


def as_tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_equal(result: Any, expected: Any, case: TestCase) -> None:
    if isinstance(expected, list):
        assert len(result) == len(expected)
        for item, wanted in zip(result, expected):
            assert_equal(item, wanted, case)
        return
    if expected is None:
        assert result is None
        return
    actual = to_array(result)
    wanted = np.asarray(numpy_helper.to_array(expected) if isinstance(expected, TensorProto) else expected)
    assert actual.shape == wanted.shape
    if wanted.dtype.kind in "OU":
        assert actual.tolist() == wanted.tolist()
        return
    assert actual.dtype == wanted.dtype
    kind = wanted.dtype.name
    if wanted.dtype.kind not in "fiubc":
        actual, wanted = actual.astype(np.float32), wanted.astype(np.float32)
    rtol = max(case.rtol, 2**-6) if kind == "bfloat16" else case.rtol  # as the suite's own runner
    np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=case.atol)


def check(case: TestCase, host: bool) -> None:
    node = case.model.graph.node[0]
    wanted = [value.name for value in case.model.graph.output]
    for inputs, outputs in case.data_sets:
        results = as_tuple(operator_of(case)(*operands(case, inputs, host), **attributes_of(node)))
        named = dict(zip(node.output, results, strict=True))
        for name, expected in zip(wanted, outputs, strict=True):
            assert_equal(named[name], expected, case)


def has_host_data(case: TestCase) -> bool:
    return any(isinstance(value, np.ndarray) for inputs, _ in case.data_sets for value in operands(case, inputs, True))


def by_operator(names: list[str], most: int | None = None) -> list[Any]:
    """Parameters (names of one operator's cases), evenly spaced when there are more than `most`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(cases()[name].model.graph.node[0].op_type, []).append(name)
    step = {op_type: -(-len(group) // (most or len(group))) for op_type, group in groups.items()}
    return [pytest.param(group[:: step[op_type]], id=op_type) for op_type, group in groups.items()]


@pytest.mark.parametrize("name", RUN)
def test_node_suite(name: str) -> None:
    check(cases()[name], host=False)


@pytest.mark.parametrize("names", by_operator([name for name in RUN if has_host_data(cases()[name])]))
def test_host_arrays(names: list[str]) -> None:
    for name in names:
        check(cases()[name], host=True)


@pytest.mark.parametrize("names", by_operator([name for name in RUN if not depends_on_data(cases()[name])], 4))
def test_fake_tensors(names: list[str]) -> None:
    """Shapes and types are the same without data."""
    for name in names:
        check_fake(cases()[name])


def check_fake(case: TestCase) -> None:
    values, attributes = operands(case, case.data_sets[0][0], True), attributes_of(case.model.graph.node[0])
    real = as_tuple(operator_of(case)(*values, **attributes))
    mode = FakeTensorMode()

    def fake(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    with mode:
        results = as_tuple(
            operator_of(case)(*map(fake, values), **{key: fake(value) for key, value in attributes.items()})
        )
    for result, expected in zip(results, real, strict=True):
        assert (tuple(result.shape), result.dtype) == (tuple(expected.shape), expected.dtype), case.name


class NoNarrowFloats(TorchDispatchMode):
    """Fails where a float tensor of less than 64 bits is made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.element_size() > 1:
                assert value.dtype == torch.float64, f"{func} makes {value.dtype}"
        return result


def float64_cases() -> Iterator[str]:
    for name in RUN:
        case = cases()[name]
        arrays = [np.asarray(data) for data in case.data_sets[0][0] if isinstance(data, np.ndarray)]
        single = any(array.dtype == np.float32 for array in arrays)
        if single and not has_foreign(case) and case.model.graph.node[0].op_type not in FIXED_TYPE:
            yield name


@pytest.mark.parametrize("names", by_operator(list(float64_cases()), 10))
def test_float64_stays_float64(names: list[str]) -> None:
    """The verifier repeats graphs in float64: no reference may round to less on the way."""
    for name in names:
        check_float64(cases()[name])


def check_float64(case: TestCase) -> None:
    attributes = attributes_of(case.model.graph.node[0])
    values = operands(case, case.data_sets[0][0])
    wide = [
        value.to(torch.float64) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value
        for value in values
    ]
    single = as_tuple(operator_of(case)(*values, **attributes))
    with NoNarrowFloats():
        double = as_tuple(operator_of(case)(*wide, **attributes))
    for result, expected in zip(double, single, strict=True):
        if isinstance(expected, torch.Tensor) and expected.dtype == torch.float32:
            assert result.dtype == torch.float64, case.name
            torch.testing.assert_close(result.to(torch.float32), expected, rtol=1e-3, atol=1e-4, equal_nan=True)
