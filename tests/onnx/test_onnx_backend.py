"""The ONNX backend interface, as a caller of `onnx.backend` uses it (the suite: test_backend_suite.py)."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper

from fxopt import onnx_backend
from fxopt.errors import InvalidInput, InvalidModel

X = np.float32([[1, -2], [-3, 4]])
WORDS = np.array(["a b", "c"], object)


def model(text: str, opsets: str = '"" : 20, "com.microsoft" : 1') -> ModelProto:
    return onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{opsets}]> {text}")


def doubled() -> ModelProto:
    return model("g (float[n, 2] x, float[2] w) => (float[n, 2] y, float[n, 2] z) { y = Add(x, w) z = Mul(y, w) }")


def tokens() -> ModelProto:
    """Strings that only ONNX Runtime splits, between two operators with references."""
    return model("""
        g (string[n] x) => (string[n, m] z) {
            [before] a = Identity(x)
            [split] b = com.microsoft.Tokenizer <mark = 0, mincharnum = 1, pad_value = "#", separators = [" "]> (a)
            [after] z = Identity(b)
        }
    """)


def test_outputs_have_names_and_order() -> None:
    prepared = onnx_backend.prepare(doubled())
    weight = np.float32([1, 2])
    found: Any = prepared.run([X, weight])
    np.testing.assert_array_equal(found.y, X + weight)
    np.testing.assert_array_equal(found["z"], (X + weight) * weight)
    assert isinstance(found, tuple) and found[1] is found.z
    by_name = prepared.run({"w": weight, "x": X})
    assert all(np.array_equal(one, other) for one, other in zip(found, by_name, strict=True))
    assert prepared.fallback_nodes == []


def test_what_leaves_torch_is_named() -> None:
    prepared = onnx_backend.prepare(tokens())
    (found,) = prepared.run([WORDS])
    assert found.tolist() == [["a", "b"], ["c", "#"]]
    assert prepared.fallback_nodes == ["split"]
    prepared.run([WORDS])
    assert prepared.fallback_nodes == ["split"]  # of the last run, once each


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([X], "1 inputs given"),
        ({"x": X}, r"inputs \['x'\] given, the model takes \['x', 'w'\]"),
        ({"x": X, "v": X[0]}, r"the model takes \['x', 'w'\]"),
    ],
)
def test_wrong_inputs(inputs: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        onnx_backend.run_model(doubled(), inputs)


@pytest.mark.parametrize("source", ["message", "path"])
def test_run_model(source: str, tmp_path: Path) -> None:
    made: Any = doubled()
    if source == "path":
        made = tmp_path / "model.onnx"
        onnx.save(doubled(), made)
    assert np.array_equal(onnx_backend.run_model(made, [X, X[0]])[0], X + X[0])


def test_unknown_options_and_devices() -> None:
    assert onnx_backend.supports_device("CPU") and not onnx_backend.supports_device("TPU:0")
    with pytest.raises(InvalidInput, match="device 'TPU' is not there"):
        onnx_backend.prepare(doubled(), "TPU")
    for call in (
        lambda: onnx_backend.prepare(doubled(), speed=2),
        lambda: onnx_backend.run_model(doubled(), [X, X[0]], speed=2),
        lambda: onnx_backend.is_compatible(doubled(), speed=2),
        lambda: onnx_backend.prepare(doubled()).run([X, X[0]], speed=2),
        lambda: onnx_backend.run_node(helper.make_node("Relu", ["x"], ["y"]), [X], speed=2),
    ):
        with pytest.raises(InvalidInput, match=r"unknown options \['speed'\]"):
            call()


def test_is_compatible() -> None:
    assert onnx_backend.is_compatible(doubled())
    assert not onnx_backend.is_compatible(doubled(), "TPU")
    broken = doubled()
    broken.graph.node[0].input[0] = "nobody"
    assert not onnx_backend.is_compatible(broken)
    with pytest.raises(InvalidModel, match="'nobody', which nothing before it computes"):
        onnx_backend.prepare(broken)
    with pytest.raises(InvalidInput, match="dict given; expected an onnx.ModelProto or the path"):
        onnx_backend.prepare({})


@pytest.mark.parametrize(
    ("node", "opset", "expected"),
    [
        (helper.make_node("Softmax", ["x"], ["y"]), None, [[0.5, 0.5], [0.5, 0.5]]),  # along the last axis
        (helper.make_node("Softmax", ["x"], ["y"], axis=0), 11, [[0.25, 0.25], [0.25, 0.25]]),  # of all from there on
        (helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx"), None, [[1, 1], [1, 1]]),
        (helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[1.0], scale=[2.0]), None, [[0, 0]] * 2),
        (helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft", alpha=0.5), 1, [[1, 1], [1, 1]]),
    ],
)
def test_run_node(node: onnx.NodeProto, opset: int | None, expected: list[list[float]]) -> None:
    options = {} if opset is None else {"opset_version": opset}
    inputs = [np.ones((2, 2), np.float32)]
    (found,) = onnx_backend.run_node(node, inputs, **options)
    np.testing.assert_allclose(found, expected)


def test_the_opset_of_a_node_is_that_of_its_domain() -> None:
    with pytest.raises(InvalidModel, match="version -1 of the operator set 'ai.onnx.ml'"):
        onnx_backend.run_node(helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml"), [X], opset_version=-1)


def test_inputs_that_do_not_fit() -> None:
    made = model("g (float[n, 3] x, float[3, 4] w) => (float[n, 4] y) { y = MatMul(x, w) }")
    with pytest.raises(InvalidInput, match=r"input 'x' has shape \[2, 2\], expected \[n, 3\] \(RuntimeError: "):
        onnx_backend.run_model(made, [X, np.ones((3, 4), np.float32)])
    with pytest.raises(InvalidInput, match="node MatMul does not run on these inputs: RuntimeError"):
        onnx_backend.run_node(made.graph.node[0], [X, np.ones((3, 4), np.float32)])


def test_the_inputs_of_a_node_are_those_it_names() -> None:
    with pytest.raises(InvalidInput, match=r"2 inputs given, node Relu takes 1: \['x'\]"):
        onnx_backend.run_node(helper.make_node("Relu", ["x"], ["y"]), [X, X])


@pytest.mark.slow
def test_the_suite_takes_the_module() -> None:
    """`onnx.backend.test.BackendTest` with the module itself as the backend."""
    from onnx.backend.test import BackendTest

    suite = BackendTest(onnx_backend, __name__).include("test_(gemm|if|strsplit).*_cpu$").test_suite
    result = unittest.TextTestRunner(verbosity=0).run(suite)
    assert result.wasSuccessful() and result.testsRun - len(result.skipped) > 10
