"""Properties of the quantization operators: equal to ONNX's reference evaluator, and exact integer products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from fxopt.ir.onnx.dtypes import from_numpy
from fxopt.ir.onnx.op import OnnxOp

Array = np.ndarray[Any, Any]
FLOATS = st.floats(-1e4, 1e4, width=32)


def evaluate(op_type: str, opset: int, inputs: list[Array | None], outputs: int = 1, **attributes: Any) -> list[Array]:
    """The outputs of one node by onnx.reference."""
    names = [f"x{index}" if value is not None else "" for index, value in enumerate(inputs)]
    results = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(op_type, names, results, **attributes)
    given_ = {name: value for name, value in zip(names, inputs) if value is not None}
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in given_.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in results],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return list(ReferenceEvaluator(model).run(None, given_))


def compute(op_type: str, version: int, inputs: list[Array | None], outputs: int = 1, **attributes: Any) -> list[Array]:
    """The outputs of one node by the torch reference."""
    if outputs > 1:
        attributes["_outputs"] = outputs
    tensors = [None if value is None else from_numpy(np.asarray(value)) for value in inputs]
    results = OnnxOp("", op_type, version)(*tensors, **attributes)
    return [result.numpy() for result in (results if isinstance(results, tuple) else (results,))]


@st.composite
def quantized(draw: st.DrawFn, form: str) -> tuple[Array, Array, Array | None, dict[str, Any]]:
    """(shape-carrying values, scale, zero point, attributes) for a tensor, axis or blocked quantization."""
    x = draw(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=5), elements=FLOATS))
    axis = draw(st.integers(0, x.ndim - 1))
    attributes: dict[str, Any] = {}
    shape: tuple[int, ...] = ()
    if form == "axis":
        shape, attributes = (x.shape[axis],), {"axis": axis}
    if form == "blocked":
        block = draw(st.integers(1, x.shape[axis]))
        blocks = -(-x.shape[axis] // block)
        block = -(-x.shape[axis] // blocks)  # ONNX wants the smallest block size that gives this many blocks
        shape = tuple(-(-x.shape[axis] // block) if dim == axis else size for dim, size in enumerate(x.shape))
        attributes = {"axis": axis, "block_size": block}
    scale = draw(hnp.arrays(np.float32, shape, elements=st.floats(np.float32(1e-3), 100, width=32)))
    dtype = draw(st.sampled_from(["uint8", "int8", "int16", "uint16"]))
    zero = draw(st.none() | hnp.arrays(np.dtype(dtype), shape))
    return x, np.asarray(scale), None if zero is None else np.asarray(zero), attributes


@pytest.mark.parametrize("form", ["tensor", "axis", "blocked"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_quantize_linear(form: str, data: st.DataObject) -> None:
    x, scale, zero, attributes = data.draw(quantized(form))
    (expected,) = evaluate("QuantizeLinear", 23, [x, scale, zero], **attributes)
    (result,) = compute("QuantizeLinear", 23, [x, scale, zero], **attributes)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("form", ["tensor", "axis", "blocked"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_dequantize_linear(form: str, data: st.DataObject) -> None:
    values, scale, zero, attributes = data.draw(quantized(form))
    dtype = np.dtype("uint8") if zero is None else zero.dtype
    x = data.draw(hnp.arrays(dtype, values.shape))
    (expected,) = evaluate("DequantizeLinear", 23, [x, scale, zero], **attributes)
    (result,) = compute("DequantizeLinear", 23, [x, scale, zero], **attributes)
    np.testing.assert_array_equal(result, expected)


@settings(max_examples=100, deadline=None)
@given(x=hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=FLOATS))
def test_dynamic_quantize_linear(x: Array) -> None:
    assume(not 0 < np.abs(x).max(initial=0) < 1e-35)  # the scale would be 0
    expected = evaluate("DynamicQuantizeLinear", 11, [x], outputs=3)
    result = compute("DynamicQuantizeLinear", 11, [x], outputs=3)
    for actual, wanted in zip(result, expected, strict=True):
        assert actual.dtype == wanted.dtype
        np.testing.assert_array_equal(actual, wanted)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_matmul_integer_is_exact(data: st.DataObject) -> None:
    m, k, n = (data.draw(st.integers(1, 5)) for _ in range(3))
    left, right = (data.draw(st.sampled_from([np.uint8, np.int8])) for _ in range(2))
    a, b = data.draw(hnp.arrays(left, (m, k))), data.draw(hnp.arrays(right, (k, n)))
    a_zero = data.draw(st.none() | hnp.arrays(left, ()) | hnp.arrays(left, (m,)))
    b_zero = data.draw(st.none() | hnp.arrays(right, ()) | hnp.arrays(right, (n,)))
    shifted_a = a.astype(np.int32) - (0 if a_zero is None else np.asarray(a_zero, np.int32).reshape(-1, 1))
    shifted_b = b.astype(np.int32) - (0 if b_zero is None else np.asarray(b_zero, np.int32))
    (result,) = compute("MatMulInteger", 10, [a, b, a_zero, b_zero])
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, shifted_a @ shifted_b)


def test_long_integer_sums_wrap_as_int32() -> None:
    a, b = np.full((1, 2**16), 255, np.uint8), np.full((2**16, 1), 127, np.int8)
    (result,) = compute("MatMulInteger", 10, [a, b])
    np.testing.assert_array_equal(result, a.astype(np.int32) @ b.astype(np.int32))


def test_quantize_rounds_half_to_even() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 300, -300], np.float32)
    (result,) = compute("QuantizeLinear", 13, [x, np.float32(1), np.int8(0)])
    np.testing.assert_array_equal(result, np.array([0, 2, 2, 0, -2, 127, -128], np.int8))


def test_quantize_computes_in_float64() -> None:
    x = torch.tensor([0.5 + 1e-12], dtype=torch.float64)
    assert OnnxOp("", "QuantizeLinear", 13)(x, torch.tensor(1.0, dtype=torch.float64)).tolist() == [1]
