"""Models with large external weights at a newer opset: nothing of the weights' size is in memory."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import fxopt
from benchmarks.onnx_large import watched
from fxopt.backends.onnxruntime.backend import version
from fxopt.frontends.convert_graph import converted
from fxopt.frontends.convert_opset import opset_of
from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import save
from fxopt.ir.onnx.external_writer import refer

WIDTH = 1024  # a weight has 4 MiB
SHAPE = [1, "n", WIDTH]


def written(path: Path, layers: int, opset: int = 11) -> None:
    """Layers of MatMul and Softmax over the last two axes, which is another operator since opset 13."""
    rng = np.random.default_rng(0)
    nodes, weights, data = [], [], Path(f"{path}.data")
    block = (rng.standard_normal((WIDTH, WIDTH), np.float32) / 32).astype(np.float32)
    with data.open("wb") as file:
        for index in range(layers):
            tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            refer(tensor, data.name, file.tell(), block.nbytes)
            file.write(np.roll(block, index, axis=0).tobytes())
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"h{index}", f"w{index}"], [f"a{index}"], f"matmul{index}"))
            nodes.append(helper.make_node("Softmax", [f"a{index}"], [f"h{index + 1}"], f"softmax{index}", axis=1))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in ("h0", f"h{layers}")]
    body = helper.make_graph(nodes, "large", values[:1], values[1:], weights)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())


def test_external_weights_stay_references(tmp_path: Path) -> None:
    """They are shared and mapped, and the converted file has data of its own."""
    written(tmp_path / "in.onnx", 2)
    graph = load(tmp_path / "in.onnx")
    made, result = converted(graph, 23)
    assert len(result.changed) == 2 and result.error == 0.0
    assert {value.data_ptr() for value in graph.root.buffers()} <= {value.data_ptr() for value in made.root.buffers()}
    assert made.model is not None and made.model.external
    (tmp_path / "elsewhere").mkdir()
    save(made, tmp_path / "elsewhere" / "out.onnx")
    found = onnx.load(tmp_path / "elsewhere" / "out.onnx")
    onnx.checker.check_model(found, full_check=True)
    assert opset_of(found) == 23
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "in.onnx").graph.initializer}
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in found.graph.initializer}
    for name, value in before.items():
        assert np.array_equal(value, after[name])


def attention(path: Path, opset: int) -> None:
    """Attention as it is written before opset 23, and a sum as before 13; the projections are in external data."""
    axes = "<axes = [1]> (z)" if opset < 13 else "(z, one)"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : {opset}]> g (float[2, n, 64] x) => (float[2, 1, 64] y)
        <float[64, 64] wq = {{0}}, float[64, 64] wk = {{0}}, float[64, 64] wv = {{0}},
         int64[4] split = {{0, 0, 4, 16}}, int64[3] join = {{0, 0, 64}}, int64[1] one = {{1}}, float scale = {{0.25}}> {{
            q0 = MatMul (x, wq)  q1 = Reshape (q0, split)  q = Transpose <perm = [0, 2, 1, 3]> (q1)
            k0 = MatMul (x, wk)  k1 = Reshape (k0, split)  k = Transpose <perm = [0, 2, 3, 1]> (k1)
            v0 = MatMul (x, wv)  v1 = Reshape (v0, split)  v = Transpose <perm = [0, 2, 1, 3]> (v1)
            s0 = MatMul (q, k)  s = Mul (s0, scale)  p = Softmax <axis = -1> (s)
            a = MatMul (p, v)  t = Transpose <perm = [0, 2, 1, 3]> (a)  z = Reshape (t, join)
            y = ReduceSum {axes} }}"""
    )
    rng = np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("w"):
            tensor.CopyFrom(numpy_helper.from_array(rng.standard_normal((64, 64), np.float32), tensor.name))
    onnx.save(proto, path, save_as_external_data=True, location="weights", size_threshold=1024)


@pytest.mark.skipif(version() < (1, 32), reason="Attention is fused for ONNX Runtime 1.32 and later")
@pytest.mark.parametrize("memory", ["20K", "10G"])
@pytest.mark.parametrize("opset", [12, 18])
def test_attention_is_fused_in_large_models(
    opset: int, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is too large to be loaded whole is converted to the opset that has Attention, too."""
    attention(tmp_path / "in.onnx", opset)
    monkeypatch.setenv("FXOPT_MEMORY", memory)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = onnx.load(tmp_path / "in.onnx")
    result = fxopt.optimize(tmp_path / "in.onnx", "x86-avx512-vnni", force=True)
    how = "1 node rewritten; verified" if opset == 12 else "every operator stays what it is"
    assert any(f"converted from opset {opset} to 23: {how}" in note for note in result.report.warnings)
    result.save(tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx")
    assert (opset_of(before), opset_of(after)) == (opset, 23)
    assert "Attention" in {node.op_type for node in after.graph.node}
    x = np.random.default_rng(1).standard_normal((2, 5, 64), np.float32)
    results = [
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for model in (before, after)
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("external", "most"), [(True, 60 << 20), (False, 700 << 20)])
def test_memory_of_the_command(external: bool, most: int, tmp_path: Path) -> None:
    """Beside what a small model takes; weights inside the file are read as bytes and as a message, and then kept once."""
    layers = 75
    peaks = {}
    for name, count in (("small", 1), ("large", layers)):
        path = tmp_path / f"{name}.onnx"
        written(path, count)
        if not external:
            onnx.save(onnx.load(path), path)
        command = [sys.executable, "-m", "fxopt", "convert", str(path)]
        ran = watched([*command, "-o", str(tmp_path / f"{name}-out.onnx"), "--opset", "23"], dict(os.environ))
        assert ran.code == 0, ran.output
        peaks[name] = ran.peak
    assert re.search(rf"opset 11 to 23: {layers} nodes rewritten; verified, noise to signal 0", ran.output), ran.output
    bytes_ = sum(path.stat().st_size for path in tmp_path.glob("large-out.onnx*"))
    assert layers * 4 * WIDTH * WIDTH <= bytes_ < layers * 4 * WIDTH * WIDTH + 200_000
    assert (tmp_path / "large-out.onnx.data").exists() == external
    assert peaks["large"] - peaks["small"] < most, f"{peaks} for {4 * layers} MiB of weights"
