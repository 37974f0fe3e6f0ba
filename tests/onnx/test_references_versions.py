"""Older versions and corner cases of operators, which the node suite has not, against ONNX Runtime or by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, defs, helper

from fxopt.errors import MissingReference
from fxopt.ir.onnx.op import OnnxOp

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


X = normal(2, 3, 4)
IMAGE = normal(2, 4, 6, 7)
LENGTHS = np.array([4, 2, 3], np.int32)
Case = tuple[str, int, list[Array | None], int, dict[str, Any]]
CASES: list[Case] = [
    *(("Softmax", opset, [X], 1, {"axis": axis}) for opset in (7, 11, 13) for axis in (1, 2)),
    *(("LogSoftmax", opset, [X], 1, {}) for opset in (7, 13)),
    *(("Hardmax", opset, [X], 1, {}) for opset in (7, 13)),
    ("Clip", 7, [X], 1, {"min": -0.5, "max": 0.5}),
    ("Clip", 10, [X], 1, {"max": 0.5}),
    ("Clip", 13, [X, None, np.float32(0.2)], 1, {}),
    ("Squeeze", 11, [normal(1, 3, 1)], 1, {"axes": [0, 2]}),
    ("Squeeze", 13, [normal(1, 3, 1)], 1, {}),
    ("Unsqueeze", 11, [X], 1, {"axes": [0, 4]}),
    ("Unsqueeze", 13, [X, ints(-1, 0)], 1, {}),
    ("Split", 7, [normal(6, 4)], 2, {"split": [2, 4]}),
    ("Split", 11, [normal(6, 4)], 3, {}),
    ("Split", 13, [normal(6, 4), ints(2, 4)], 2, {"axis": -2}),
    ("Split", 18, [normal(7, 4)], 3, {"num_outputs": 3}),
    ("Slice", 7, [X], 1, {"starts": [1, -3], "ends": [100, -1], "axes": [1, 2]}),
    ("Slice", 10, [X, ints(-1, 3), ints(-100, 0), ints(0, 2), ints(-1, -2)], 1, {}),
    ("Slice", 13, [X, ints(-100), ints(-200), ints(1), ints(-1)], 1, {}),
    ("Pad", 7, [X], 1, {"pads": [0, 1, 0, 1, 0, 2], "value": 1.5}),
    ("Pad", 7, [X], 1, {"pads": [0, 1, 0, 1, 0, 2], "mode": "reflect"}),
    ("Pad", 13, [X, ints(0, -1, 0, 1, 0, 2), np.float32(2.5)], 1, {}),
    *(("ReduceMean", opset, [X], 1, {"axes": [-1, 0], "keepdims": 0}) for opset in (7, 11, 13)),
    ("ReduceMean", 18, [X, ints(-1, 0)], 1, {"keepdims": 0}),
    ("ReduceSum", 11, [X], 1, {"axes": [1]}),
    ("ReduceSum", 13, [X, ints()], 1, {"noop_with_empty_axes": 1}),
    ("ReduceLogSumExp", 11, [X], 1, {}),
    ("TopK", 10, [np.round(normal(3, 5)), ints(3)], 2, {"axis": 1}),
    ("TopK", 11, [np.round(normal(3, 5)), ints(3)], 2, {"largest": 0}),
    ("Upsample", 7, [IMAGE], 1, {"scales": [1.0, 1.0, 2.0, 1.5]}),
    ("Upsample", 9, [IMAGE, floats(1, 1, 2, 2)], 1, {"mode": "linear"}),
    ("Resize", 10, [IMAGE, floats(1, 1, 2, 2)], 1, {"mode": "linear"}),
    ("Resize", 11, [IMAGE, floats(), floats(1, 1, 1.5, 0.5)], 1, {"mode": "cubic"}),
    ("Resize", 13, [IMAGE, None, None, ints(2, 4, 3, 11)], 1, {"mode": "linear"}),
    (
        *("Resize", 11, [IMAGE, floats(), floats(1, 1, 0.2, 3)], 1),
        {"mode": "cubic", "coordinate_transformation_mode": "pytorch_half_pixel"},
    ),
    ("BatchNormalization", 7, [X, *(np.abs(normal(3)) for _ in range(4))], 1, {}),
    ("BatchNormalization", 15, [X, *(np.abs(normal(3)) for _ in range(4))], 1, {}),
    ("Gemm", 7, [normal(3, 4), normal(4, 5), normal(5)], 1, {"alpha": 0.5, "beta": 2.0}),
    ("Gemm", 13, [normal(4, 3), normal(5, 4), normal(3, 1)], 1, {"transA": 1, "transB": 1}),
    ("Gemm", 13, [normal(3, 4), normal(5, 4), normal(1)], 1, {"transB": 1}),
    ("Conv", 11, [IMAGE, normal(4, 2, 3, 2), normal(4)], 1, {"group": 2, "pads": [2, 0, 1, 1], "dilations": [2, 1]}),
    ("Conv", 11, [IMAGE, normal(2, 4, 2, 3)], 1, {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    ("ConvTranspose", 11, [IMAGE, normal(4, 3, 3, 2), normal(3)], 1, {"strides": [2, 3], "output_padding": [1, 2]}),
    ("ConvTranspose", 11, [IMAGE, normal(4, 1, 3, 2), normal(2)], 1, {"group": 2, "pads": [1, 0, 0, 1]}),
    ("ConvTranspose", 11, [IMAGE, normal(4, 3, 3, 3)], 1, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("ConvTranspose", 11, [IMAGE, normal(4, 3, 3, 3)], 1, {"strides": [2, 2], "output_shape": [12, 14]}),
    *(
        (op_type, 19, [IMAGE], 1, {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1], "ceil_mode": 1})
        for op_type in ("MaxPool", "AveragePool", "LpPool")
    ),
    (
        *("AveragePool", 19, [IMAGE], 1),
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1, "count_include_pad": 1},
    ),
    ("MaxPool", 12, [IMAGE], 2, {"kernel_shape": [3, 2], "pads": [1, 0, 2, 1], "dilations": [2, 1]}),
    (
        *("LSTM", 14, [normal(4, 3, 5), normal(2, 8, 5), normal(2, 8, 2), normal(2, 16), LENGTHS], 3),
        {"direction": "bidirectional", "hidden_size": 2},
    ),
    (
        *("GRU", 14, [normal(4, 3, 5), normal(1, 6, 5), normal(1, 6, 2), normal(1, 12), LENGTHS], 2),
        {"direction": "reverse", "hidden_size": 2, "linear_before_reset": 1, "clip": 1.0},
    ),
]


def runtime(op_type: str, opset: int, inputs: list[Array | None], outputs: int, attributes: dict[str, Any]) -> Any:
    """The outputs of one node by ONNX Runtime."""
    names = [f"x{index}" if value is not None else "" for index, value in enumerate(inputs)]
    results = [f"y{index}" for index in range(outputs)]
    feeds = {name: np.asarray(value) for name, value in zip(names, inputs) if value is not None}
    graph = helper.make_graph(
        [helper.make_node(op_type, names, results, **attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in results],
    )
    for value in graph.output:
        value.type.Clear()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_equals_onnxruntime(case: Case) -> None:
    op_type, opset, inputs, outputs, attributes = case
    expected = runtime(*case)
    op = OnnxOp("", op_type, defs.get_schema(op_type, opset).since_version)
    tensors = [None if value is None else torch.from_numpy(np.array(value)) for value in inputs]
    results = op(*tensors, **attributes, **({"_outputs": outputs} if outputs > 1 else {}))
    for result, reference in zip(results if outputs > 1 else (results,), expected, strict=True):
        assert (result.numpy().dtype, tuple(result.shape)) == (reference.dtype, reference.shape)
        np.testing.assert_allclose(result.numpy(), reference, rtol=1e-4, atol=1e-5)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_broadcast_attribute_aligns_axes() -> None:
    a, b = torch.zeros(2, 3, 4), tensor(1.0, 2.0, 3.0)
    result = OnnxOp("", "Add", 6)(a, b, broadcast=1, axis=1)
    assert result[0, :, 0].tolist() == [1.0, 2.0, 3.0]


def test_prelu_below_7_is_per_channel() -> None:
    result = OnnxOp("", "PRelu", 6)(-torch.ones(1, 2, 2, 2), tensor(1.0, 2.0))
    assert result[0, :, 0, 0].tolist() == [-1.0, -2.0]


def test_attributes_of_the_first_versions() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert OnnxOp("", "Reshape", 1)(x, shape=[3, -1]).shape == (3, 2)
    assert OnnxOp("", "Pad", 1)(x, paddings=[0, 1, 0, 0], mode="edge").shape == (2, 4)
    assert OnnxOp("", "Tile", 1)(x, tensor(2.0), tensor(1.0)).shape == (2, 6)
    assert OnnxOp("", "TopK", 1)(x, k=2, axis=1, _outputs=2)[1].tolist() == [[2, 1], [2, 1]]
    assert OnnxOp("", "Cast", 1)(x, to="INT32").dtype == torch.int32
    assert OnnxOp("", "Dropout", 6)(x, is_test=1) is x


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda: OnnxOp("", "Cast", 21)(torch.zeros(1), to=99), "no conversion to ONNX data type 99"),
        (lambda: OnnxOp("", "QuantizeLinear", 21)(torch.ones(2), torch.tensor(1.0), output_dtype=7), "data type 7"),
        (lambda: OnnxOp("", "Resize", 11)(torch.ones(2, 2).int(), None, floats(2, 2), mode="linear"), "torch.int32"),
        (lambda: OnnxOp("", "LSTM", 14)(*[torch.zeros(1, 4, 1)] * 3, clip=1.0), "LSTM with clip"),
        (lambda: OnnxOp("", "BatchNormalization", 1)(*[torch.ones(1, 1)] * 5), "trains"),
    ],
)
def test_what_is_not_written_says_so(run: Any, reason: str) -> None:
    with pytest.raises(MissingReference, match=reason):
        run()
