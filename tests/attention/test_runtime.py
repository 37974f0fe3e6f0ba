"""What ONNX Runtime makes of the fused graph: its optimised model is dumped, and holds the kernels that are meant."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt.backends.onnxruntime.backend import version

HEADS, WIDTH, INNER = 4, 32, 64
pytestmark = pytest.mark.skipif(version() < (1, 32), reason="Attention is fused for ONNX Runtime 1.32 and later")


def normal(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32) / 4


def encoder() -> onnx.ModelProto:
    """One layer: attention over three projections, residual sums with layer norms, a feed-forward network with GELU."""
    weights = {"g": normal(WIDTH), "c": normal(WIDTH), "scale": np.float32((WIDTH // HEADS) ** -0.5)}
    weights["split"] = np.array([0, 0, HEADS, WIDTH // HEADS], np.int64)
    weights["join"] = np.array([0, 0, WIDTH], np.int64)
    nodes: list[Any] = []

    def node(op_type: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], name=output, **attributes))
        return output

    def linear(x: str, name: str, rows: int, columns: int) -> str:
        weights[f"w{name}"], weights[f"b{name}"] = normal(rows, columns), normal(columns)
        return node("Add", [node("MatMul", [x, f"w{name}"], f"{name}_product"), f"b{name}"], name)

    def heads(x: str, perm: list[int]) -> str:
        return node("Transpose", [node("Reshape", [x, "split"], f"{x}_4")], f"{x}_t", perm=perm)

    q, k, v = (linear("x", name, WIDTH, WIDTH) for name in "qkv")
    scores = node("MatMul", [heads(q, [0, 2, 1, 3]), heads(k, [0, 2, 3, 1])], "scores")
    masked = node("Add", [node("Mul", [scores, "scale"], "scaled"), "mask"], "masked")
    mixed = node("MatMul", [node("Softmax", [masked], "weights"), heads(v, [0, 2, 1, 3])], "mixed")
    joined = node("Reshape", [node("Transpose", [mixed], "turned", perm=[0, 2, 1, 3]), "join"], "joined")
    first = node("Add", [linear(joined, "o", WIDTH, WIDTH), "x"], "first")
    h = node("LayerNormalization", [first, "g", "c"], "h")
    inner = node("Gelu", [linear(h, "up", WIDTH, INNER)], "inner")
    second = node("Add", [linear(inner, "down", INNER, WIDTH), h], "second")
    node("LayerNormalization", [second, "g", "c"], "y")
    values = {"x": ["b", "n", WIDTH], "mask": ["b", 1, 1, "n"], "y": ["b", "n", WIDTH]}
    x, mask, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items())
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    body = helper.make_graph(nodes, "encoder", [x, mask], [y], constants)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def kernels(model: Path, folder: Path) -> Counter[str]:
    """The operators of the graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def test_the_kernels_of_an_encoder(tmp_path: Path) -> None:
    path = tmp_path / "before.onnx"
    onnx.save(encoder(), path)
    mask = np.zeros((2, 1, 1, 6), np.float32)
    mask[1, ..., -2:] = np.finfo(np.float32).min
    feed = {"x": normal(2, 6, WIDTH), "mask": mask}
    result = fxopt.optimize(
        path, "host", passes=["fuse-attention-heads"], calibration=[feed], force=True, budget=None, threads=1
    )
    result.save(tmp_path / "after.onnx")
    before, after = kernels(path, tmp_path), kernels(tmp_path / "after.onnx", tmp_path)
    assert (before["Softmax"], before["SkipLayerNormalization"], before["Attention"]) == (1, 2, 0)
    assert (after["Softmax"], after["SkipLayerNormalization"], after["Attention"]) == (0, 0, 1)
    assert after["BiasGelu"] == 1, "ONNX Runtime joins the bias and GELU by itself"
    assert after["LayerNormalization"] == 2 and after["Sum"] == 2
    assert not after["Transpose"] and not after["Reshape"]
    assert after.total() < before.total()
    runs = [
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for file in (path, tmp_path / "after.onnx")
    ]
    assert np.allclose(*runs, atol=2e-6)
