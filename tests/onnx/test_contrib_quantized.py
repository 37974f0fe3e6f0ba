"""Operators of `com.microsoft` on integers against ONNX Runtime's kernels; 8-bit results may differ by one step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.onnx.node import Array, Case, assert_same, integers, normal, positive, scalar


def quantized(*shape: int, dtype: type = np.uint8, zero: int | None = 120) -> list[Array | None]:
    """A tensor with its scale and zero point."""
    low, high = (0, 256) if dtype is np.uint8 else (-128, 128)
    point = None if zero is None else scalar(zero if dtype is np.uint8 else zero - 128, dtype)
    return [integers(dtype, *shape, low=low, high=high), scalar(0.021), point]


def output(dtype: type = np.uint8, scale: float = 0.03, zero: int | None = 100) -> list[Array | None]:
    """The scale and zero point of a result."""
    return [scalar(scale), None if zero is None else scalar(zero if dtype is np.uint8 else zero - 128, dtype)]


# Weights have 7 bits: without VNNI the kernels of ONNX Runtime add two products of 8 bits in int16, and saturate.
def near(op_type: str, inputs: list[Array | None], attributes: dict[str, Any] | None = None, **more: Any) -> Case:
    return Case(op_type, inputs, attributes or {}, steps=1, **more)


PARAMETERS = frozenset((1, 2, 3, 4))
LSTM_INPUTS = [
    normal(4, 1, 3),
    integers(np.int8, 1, 3, 20, low=-60, high=60),
    integers(np.int8, 1, 5, 20, low=-60, high=60),
]

CASES: dict[str, Case] = {
    "QLinearAdd": near("QLinearAdd", [*quantized(2, 3, 4), *quantized(3, 4), *output()]),
    "QLinearAdd, int8": near(
        "QLinearAdd",
        [
            *quantized(3, 4, dtype=np.int8),
            *quantized(3, 1, dtype=np.int8),
            *output(np.int8, 0.04),
        ],
    ),
    "QLinearMul": near("QLinearMul", [*quantized(2, 3, 4), *quantized(1, 3, 1), *output()]),
    "QLinearMul, int8": near("QLinearMul", [*quantized(5, dtype=np.int8), *quantized(dtype=np.int8), *output(np.int8)]),
    "QLinearSigmoid": near("QLinearSigmoid", [*quantized(5, 7), *output(scale=0.004)], constant=PARAMETERS),
    "QLinearSigmoid, int8": near(
        "QLinearSigmoid", [*quantized(5, 7, dtype=np.int8), *output(np.int8, 0.004)], constant=PARAMETERS
    ),
    "QLinearLeakyRelu": near("QLinearLeakyRelu", [*quantized(5, 7), *output()], {"alpha": 0.3}, constant=PARAMETERS),
    "QLinearSoftmax": near(
        "QLinearSoftmax",
        [*quantized(3, 5, 4), *output(scale=1 / 256, zero=0)],
        {"axis": 1, "opset": 13},
        constant=PARAMETERS,
    ),
    "QLinearSoftmax, opset 11": near(
        "QLinearSoftmax",
        [*quantized(3, 5, 4), *output(scale=1 / 256, zero=0)],
        {"axis": 1, "opset": 11},
        constant=PARAMETERS,
    ),
    "QLinearAveragePool": near(
        "QLinearAveragePool",
        [*quantized(2, 3, 7, 6), *output()],
        {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1], "count_include_pad": 1},
    ),
    "QLinearAveragePool, channels last": near(
        "QLinearAveragePool",
        [*quantized(2, 7, 6, 3), *output()],
        {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "channels_last": 1},
    ),
    "QLinearGlobalAveragePool": near("QLinearGlobalAveragePool", [*quantized(2, 3, 7, 6), *output()]),
    "QLinearGlobalAveragePool, channels last": near(
        "QLinearGlobalAveragePool", [*quantized(2, 7, 6, 3, dtype=np.int8), *output(np.int8)], {"channels_last": 1}
    ),
    "QLinearConcat": near(
        "QLinearConcat",
        [*output(), *quantized(2, 3, 4), *quantized(2, 1, 4, zero=7), *quantized(2, 2, 4)],
        {"axis": 1},
        constant=frozenset((0, 1, 3, 4, 6, 7, 9, 10)),
    ),
    "QLinearWhere": near(
        "QLinearWhere",
        [integers(np.bool_, 3, 4, high=2), *quantized(3, 4), *quantized(4, zero=9), *output()],
        constant=frozenset((2, 3, 5, 6, 7, 8)),
    ),
    "QLinearConv": near(
        "QLinearConv",
        [
            *quantized(1, 3, 7, 6),
            integers(np.int8, 4, 3, 3, 3, low=-60, high=60),
            positive(4),
            integers(np.int8, 4, high=1),
            *output(scale=0.5),
            integers(np.int32, 4, low=-900, high=900),
        ],
        {"strides": [2, 1], "pads": [1, 0, 1, 1]},
    ),
    "QLinearConv, channels last": near(
        "QLinearConv",
        [
            *quantized(1, 7, 6, 3),
            integers(np.int8, 4, 3, 3, 3, low=-60, high=60),
            positive(),
            scalar(0, np.int8),
            *output(scale=0.5),
            integers(np.int32, 4, low=-900, high=900),
        ],
        {"channels_last": 1},
    ),
    "QGemm to floating point": Case(
        "QGemm",
        [
            *quantized(3, 4),
            integers(np.int8, 4, 5, low=-60, high=60),
            positive(5),
            integers(np.int8, 5, low=-5, high=5),
            integers(np.int32, 5, low=-900, high=900),
        ],
        {"alpha": 0.5},
    ),
    "QGemm, transposed": near(
        "QGemm",
        [
            *quantized(4, 3),
            integers(np.uint8, 5, 4),
            scalar(0.02),
            scalar(70, np.uint8),
            None,
            *output(scale=0.2),
        ],
        {"transA": 1, "transB": 1},
    ),
    "MatMulInteger16": Case(
        "MatMulInteger16",
        [integers(np.int16, 2, 3, 4, low=-9000, high=9000), integers(np.int16, 4, 5, low=-9000, high=9000)],
    ),
    "QAttention": Case(
        "QAttention",
        [
            integers(np.uint8, 2, 5, 6),
            integers(np.int8, 6, 24, low=-60, high=60),
            normal(24),
            positive(),
            positive(24),
            np.array([5, 3], np.int32),
            scalar(60, np.uint8),
            integers(np.int8, 24, low=-3, high=3),
        ],
        {"num_heads": 2},
    ),
    "QAttention, causal with past": Case(
        "QAttention",
        [
            integers(np.uint8, 2, 5, 6),
            integers(np.uint8, 6, 24),
            normal(24),
            positive(),
            positive(),
            None,
            scalar(60, np.uint8),
            scalar(50, np.uint8),
            normal(2, 2, 2, 3, 4),
        ],
        {"num_heads": 2, "unidirectional": 1},
        outputs=[True, True],
    ),
    "DynamicQuantizeLSTM": Case(
        "DynamicQuantizeLSTM",
        [
            *LSTM_INPUTS,
            normal(1, 40),
            None,
            normal(1, 1, 5),
            normal(1, 1, 5),
            None,
            positive(1),
            np.zeros(1, np.int8),
            positive(1),
            np.zeros(1, np.int8),
        ],
        {"hidden_size": 5},
        outputs=[True, True, True],
        constant=frozenset((1, 2, 8, 9, 10, 11)),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_equals_onnxruntime(name: str) -> None:
    assert_same(CASES[name])
