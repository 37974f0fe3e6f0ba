"""The first versions of operators (opsets 1 to 9), which no evaluator runs any more, against their formulas in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fxopt.errors import MissingReference
from fxopt.ir.onnx.op import OnnxOp

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RANDOM.standard_normal(shape)


def run(op_type: str, version: int, *inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
    """The outputs as arrays."""
    given = [torch.from_numpy(np.array(value)) for value in inputs]
    if outputs > 1:
        attributes["_outputs"] = outputs
    results = OnnxOp("", op_type, version)(*given, **attributes)
    return [np.asarray(result) for result in results] if outputs > 1 else np.asarray(results)


X, B = normal(2, 3, 4, 5), normal(3, 4)
ALIGNED = B[:, :, None]  # axis=1: the axes of B are the second and third of X
ARITHMETIC = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
COMPARISONS = {"Equal": np.equal, "Less": np.less, "Greater": np.greater}
LOGIC = {"And": np.logical_and, "Or": np.logical_or, "Xor": np.logical_xor}


@pytest.mark.parametrize("version", [1, 6])
@pytest.mark.parametrize("op_type", ARITHMETIC)
def test_arithmetic_aligns_at_an_axis(op_type: str, version: int) -> None:
    expected = ARITHMETIC[op_type](X, ALIGNED)
    np.testing.assert_allclose(run(op_type, version, X, B, broadcast=1, axis=1), expected, 1e-15)
    np.testing.assert_allclose(run(op_type, version, X, B, broadcast=1, axis=-3), expected, 1e-15)
    np.testing.assert_allclose(run(op_type, version, X, X[0, 0], broadcast=1), ARITHMETIC[op_type](X, X[0, 0]), 1e-15)


def test_power_logic_and_comparisons_align_at_an_axis() -> None:
    np.testing.assert_allclose(run("Pow", 1, abs(X), B, broadcast=1, axis=1), abs(X) ** ALIGNED, 1e-13)
    for op_type, function in COMPARISONS.items():
        a, b = np.round(X), np.round(B)
        assert np.array_equal(run(op_type, 1, a, b, broadcast=1, axis=1), function(a, b[:, :, None]))
    for op_type, function in LOGIC.items():
        assert np.array_equal(run(op_type, 1, X > 0, B > 0, broadcast=1, axis=1), function(X > 0, ALIGNED > 0))


@pytest.mark.parametrize("version", [1, 6])
def test_reductions_over_inputs(version: int) -> None:
    parts = [normal(2, 3) for _ in range(3)]
    for op_type, function in {"Sum": np.sum, "Mean": np.mean, "Max": np.max, "Min": np.min}.items():
        np.testing.assert_allclose(run(op_type, version, *parts), function(parts, axis=0), 1e-15)


@pytest.mark.parametrize("version", [1, 6])
def test_gemm(version: int) -> None:
    a, b, c = normal(3, 4), normal(5, 4), normal(5)
    y = run("Gemm", version, a, b, c, transB=1, broadcast=1, alpha=0.5, beta=2.0)
    np.testing.assert_allclose(y, 0.5 * a @ b.T + 2 * c, 1e-13)


def test_shapes_are_attributes() -> None:
    x = np.arange(24.0).reshape(2, 3, 4)
    assert np.array_equal(run("Reshape", 1, x, shape=[0, -1, 2]), x.reshape(2, 6, 2))
    assert np.array_equal(run("Squeeze", 1, x[:1, :, :1], axes=[0, 2]), x[0, :, 0])
    assert np.array_equal(run("Unsqueeze", 1, x, axes=[0, 4]), x[None, ..., None])
    assert np.array_equal(run("Slice", 1, x, starts=[0, -3], ends=[-1, 1000], axes=[1, 2]), x[:, :-1, -3:])
    assert np.array_equal(run("Slice", 1, x, starts=[1], ends=[2]), x[1:2])
    assert np.array_equal(run("Concat", 1, x, x), np.concatenate([x, x], 1))
    assert np.array_equal(run("Concat", 4, x, x, axis=2), np.concatenate([x, x], 2))
    assert np.array_equal(run("Tile", 1, x, np.array(3.0), np.array(1.0)), np.tile(x, (1, 3, 1)))
    for version in (1, 2):
        parts = run("Split", version, x, outputs=2, axis=2, split=[1, 3])
        assert np.array_equal(parts[0], x[..., :1]) and np.array_equal(parts[1], x[..., 1:])
        assert np.array_equal(run("Split", version, x, outputs=2, axis=2)[1], x[..., 2:])
    assert np.array_equal(run("Split", 1, x, np.array([1.0, 3.0]), outputs=2, axis=2)[1], x[..., 1:])


def test_pads_are_attributes() -> None:
    x = normal(2, 3)
    assert np.array_equal(
        run("Pad", 1, x, paddings=[0, 1, 2, 0], value=0.5), np.pad(x, [(0, 2), (1, 0)], constant_values=0.5)
    )
    assert np.array_equal(
        run("Pad", 1, x, paddings=[0, 1, 0, 0], mode="reflect"), np.pad(x, [(0, 0), (1, 0)], "reflect")
    )
    assert np.array_equal(run("Pad", 2, x, pads=[1, 0, 0, -1]), np.pad(x, [(1, 0), (0, 0)])[:, :2])


def test_scales_are_attributes() -> None:
    x = normal(1, 2, 3, 2)
    assert np.array_equal(run("Upsample", 1, x, height_scale=2.0, width_scale=3.0), x.repeat(2, 2).repeat(3, 3))
    assert np.array_equal(run("Upsample", 7, x, scales=[1.0, 1.0, 2.0, 3.0]), x.repeat(2, 2).repeat(3, 3))


def test_top_k_with_a_number() -> None:
    values, indices = run("TopK", 1, np.array([[3.0, 1.0, 2.0]]), outputs=2, k=2)
    assert (values.tolist(), indices.tolist()) == ([[3.0, 2.0]], [[0, 2]])


def test_casts_name_their_type() -> None:
    assert run("Cast", 1, np.array([1.7, -1.7]), to="INT64").tolist() == [1, -1]
    assert run("Cast", 6, np.array([1.7, 0.0]), to=9).tolist() == [True, False]


def test_softmax_over_a_flattened_matrix() -> None:
    flat = np.exp(X.reshape(6, 20))
    expected = (flat / flat.sum(1, keepdims=True)).reshape(X.shape)
    np.testing.assert_allclose(run("Softmax", 1, X, axis=2), expected, 1e-12)
    np.testing.assert_allclose(run("LogSoftmax", 1, X, axis=2), np.log(expected), 1e-12)
    hard = run("Hardmax", 1, X, axis=2).reshape(6, 20)
    assert hard.argmax(1).tolist() == flat.argmax(1).tolist() and hard.sum() == 6


def test_bounds_of_clip() -> None:
    x = np.array([-5.0, 0.5, 5.0, math.inf], np.float32)
    assert run("Clip", 1, x, min=-1.0, max=1.0).tolist() == [-1.0, 0.5, 1.0, 1.0]
    assert run("Clip", 1, x, min=-1.0).tolist() == [-1.0, 0.5, 5.0, math.inf]
    assert run("Clip", 6, x, min=-1.0).tolist() == [-1.0, 0.5, 5.0, float(np.finfo(np.float32).max)]


def test_activations() -> None:
    x = normal(2, 3, 4)
    np.testing.assert_allclose(run("LeakyRelu", 1, x, alpha=0.1), np.where(x < 0, 0.1 * x, x), 1e-15)
    np.testing.assert_allclose(run("Elu", 1, x, alpha=2.0), np.where(x < 0, 2 * np.expm1(x), x), 1e-13)
    np.testing.assert_allclose(run("HardSigmoid", 1, x, alpha=0.3), np.clip(0.3 * x + 0.5, 0, 1), 1e-15)
    np.testing.assert_allclose(
        run("Selu", 1, x), np.where(x <= 0, 1.0507 * (1.6732 * np.exp(x) - 1.6732), 1.0507 * x), 1e-6
    )
    for version in (1, 6):
        slope = normal(3)
        np.testing.assert_allclose(run("PRelu", version, x, slope), np.where(x < 0, slope[:, None] * x, x), 1e-15)
        np.testing.assert_allclose(run("PRelu", version, x, slope[:1]), np.where(x < 0, slope[0] * x, x), 1e-15)


def test_pools() -> None:
    x = normal(1, 2, 4, 4)
    blocks = x.reshape(1, 2, 2, 2, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(1, 2, 2, 2, 4)
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    np.testing.assert_allclose(run("MaxPool", 1, x, **window), blocks.max(-1), 1e-15)
    np.testing.assert_allclose(run("AveragePool", 1, x, **window), blocks.mean(-1), 1e-13)
    np.testing.assert_allclose(run("LpPool", 1, x, **window, p=3.0), (abs(blocks) ** 3).sum(-1) ** (1 / 3), 1e-13)
    np.testing.assert_allclose(run("LpPool", 1, x)[..., 0, 0], np.sqrt((x**2).sum((2, 3))), 1e-13)
    total = (abs(x) ** 3).sum((2, 3), keepdims=True) ** (1 / 3)
    np.testing.assert_allclose(run("GlobalLpPool", 1, x, p=3.0), total, 1e-13)
    edge = run("AveragePool", 1, np.ones((1, 1, 2, 2)), kernel_shape=[2, 2], pads=[1, 1, 1, 1])
    assert edge.min() == 1.0  # padding does not count


STATISTICS = [normal(3), normal(3), normal(3), abs(normal(3)) + 0.1]  # scale, bias, mean, variance


def along(vector: Array) -> Array:
    return vector[:, None, None]


@pytest.mark.parametrize("version", [1, 6])
def test_batch_normalization_at_inference(version: int) -> None:
    scale, bias, mean, var = map(along, STATISTICS)
    expected = (X - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(run("BatchNormalization", version, X, *STATISTICS, is_test=1), expected, 1e-12)
    with pytest.raises(MissingReference, match="is_test=0 trains"):
        run("BatchNormalization", version, X, *STATISTICS)


def test_batch_normalization_per_element() -> None:
    scale, bias, mean, var = normal(3, 4, 5), normal(3, 4, 5), normal(3, 4, 5), abs(normal(3, 4, 5)) + 0.1
    expected = (X - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(run("BatchNormalization", 7, X, scale, bias, mean, var, spatial=0), expected, 1e-12)


@pytest.mark.parametrize("version", [1, 6, 7, 9])
def test_batch_normalization_trains_with_five_outputs(version: int) -> None:
    scale, bias, mean, var = STATISTICS
    own_mean, own_var = X.mean((0, 2, 3)), X.var((0, 2, 3))
    results = run("BatchNormalization", version, X, scale, bias, mean, var, outputs=5, momentum=0.75)
    normed = (X - along(own_mean)) / np.sqrt(along(own_var) + 1e-5) * along(scale) + along(bias)
    running = [0.75 * old + 0.25 * new for old, new in ((mean, own_mean), (var, own_var))]
    for result, expected in zip(results, [normed, *running, own_mean, own_var], strict=True):
        np.testing.assert_allclose(result, expected, 1e-11)


def test_normalizations() -> None:
    scale, bias = STATISTICS[:2]
    mean, var = X.mean((2, 3), keepdims=True), X.var((2, 3), keepdims=True)
    expected = (X - mean) / np.sqrt(var + 1e-5) * along(scale) + along(bias)
    np.testing.assert_allclose(run("InstanceNormalization", 1, X, scale, bias), expected, 1e-11)
    unit = X / np.sqrt((X**2).sum(1, keepdims=True))
    np.testing.assert_allclose(run("LpNormalization", 1, X, axis=1), unit, 1e-13)
    groups = normal(2, 4, 3)
    split = groups.reshape(2, 2, 6)
    normed = ((split - split.mean(2, keepdims=True)) / np.sqrt(split.var(2, keepdims=True) + 1e-5)).reshape(2, 4, 3)
    per_group = normed * np.array([2.0, 2.0, 3.0, 3.0])[:, None] + np.array([0.0, 0.0, 1.0, 1.0])[:, None]
    np.testing.assert_allclose(
        run("GroupNormalization", 18, groups, np.array([2.0, 3.0]), np.array([0.0, 1.0]), num_groups=2),
        per_group,
        1e-11,
    )


@pytest.mark.parametrize("version", [1, 6, 7, 10])
def test_dropout_at_inference(version: int) -> None:
    y, mask = run("Dropout", version, X, outputs=2, **({"is_test": 1} if version < 7 else {}))
    assert np.array_equal(y, X) and mask.all()
    assert mask.dtype == (np.bool_ if version >= 10 else X.dtype)


def test_reductions_with_attributes() -> None:
    functions: dict[str, Any] = {
        "ReduceSum": np.sum,
        "ReduceMean": np.mean,
        "ReduceMax": np.max,
        "ReduceMin": np.min,
        "ReduceProd": np.prod,
        "ReduceSumSquare": lambda x, **options: np.sum(x * x, **options),
        "ReduceL1": lambda x, **options: np.sum(abs(x), **options),
        "ReduceL2": lambda x, **options: np.sqrt(np.sum(x * x, **options)),
        "ReduceLogSum": lambda x, **options: np.log(np.sum(x, **options)),
        "ReduceLogSumExp": lambda x, **options: np.log(np.sum(np.exp(x), **options)),
    }
    for op_type, function in functions.items():
        x = abs(X) if op_type == "ReduceLogSum" else X
        y = run(op_type, 1, x, axes=[1, 3], keepdims=0)
        np.testing.assert_allclose(y, function(x, axis=(1, 3)), 1e-12)
        np.testing.assert_allclose(run(op_type, 1, x), function(x, axis=None, keepdims=True), 1e-12)
    assert np.array_equal(run("ArgMax", 1, X, axis=2, keepdims=0), X.argmax(2))
    assert np.array_equal(run("ArgMin", 1, X, axis=1), X.argmin(1)[:, None])


def test_indices() -> None:
    x = np.zeros((3, 3))
    y = run("Scatter", 9, x, np.array([[1, 0, 2]]), np.array([[1.0, 2.0, 3.0]]))
    assert y.tolist() == [[0.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 3.0]]
    assert np.array_equal(run("Gather", 1, X, np.array([1, 0]), axis=1), X[:, [1, 0]])
    assert run("OneHot", 9, np.array([0, 2]), np.array(3), np.array([0, 1])).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert run("Expand", 8, np.array([[1], [2]]), np.array([2, 3])).tolist() == [[1, 1, 1], [2, 2, 2]]


@pytest.mark.parametrize(("op_type", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_recurrent_layers_of_version_1(op_type: str, gates: int) -> None:
    """The same as the newest version, which is compared with ONNX Runtime, but for `output_sequence`."""
    inputs = [normal(4, 2, 3), normal(1, gates * 5, 3), normal(1, gates * 5, 5)]
    newest = {"RNN": 14, "GRU": 14, "LSTM": 14}[op_type]
    old = run(op_type, 1, *inputs, outputs=2, hidden_size=5, output_sequence=1)
    for result, expected in zip(old, run(op_type, newest, *inputs, outputs=2, hidden_size=5), strict=True):
        np.testing.assert_allclose(result, expected, 1e-14)
