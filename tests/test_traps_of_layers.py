"""More of the known traps: layers that quantisers and fusions make slower, wrong, or leave alone without a word.

As in `test_traps.py`: what is written is never slower than fp32, and the ledger names the trap.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import fxopt
from fxopt.backends.onnxruntime.backend import OnnxRuntime
from fxopt.backends.onnxruntime.providers import PROVIDERS
from fxopt.backends.onnxruntime.session import make_session
from fxopt.guard import measure
from fxopt.passes.quantize_linear import QuantizeLinear
from tests.test_traps import (
    ATTEMPTS,
    IDS,
    SLACK,
    Feed,
    inverted_residuals,
    normal,
    optimized,
    plain_cnn,
    ratio,
    reasons,
    samples,
    tied,
    write,
)


def transposed_linears(path: Path) -> Path:
    """GPT-2's Conv1D: Gemm with the weight as [in, out], one row at a time; the head reads the table transposed."""
    weights = {
        "table": normal(IDS, 256) * 0.3, "w1": normal(256, 1024) * 0.06, "b1": normal(1024), "b2": normal(256),
        "w2": normal(1024, 256, seed=1) * 0.03, "flat": np.array([1, 256]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["e"], "embedding"),
        helper.make_node("Reshape", ["e", "flat"], ["r"]),
        helper.make_node("Gemm", ["r", "w1", "b1"], ["h"], "c_fc"),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("Gemm", ["a", "w2", "b2"], ["c"], "c_proj"),
        helper.make_node("Transpose", ["table"], ["t"], "table_transposed", perm=[1, 0]),
        helper.make_node("MatMul", ["c", "t"], ["y"], "head"),
    ]
    return write(path, nodes, weights, {"x": [1]}, 2, True)


def residual_norms(path: Path, is_pre: bool) -> Path:
    """Four blocks x + relu(linear(.)), with the normalisation before the linear (ViT) or behind the sum (BERT)."""
    nodes: list[Any] = []
    weights: Feed = {}
    x = "x"
    for index in range(4):
        names = [f"{part}{index}" for part in ("w", "g", "b")]
        values = (normal(384, 384, seed=index) * 0.05, normal(384, seed=index) + 2, normal(384, seed=index + 9))
        weights.update(zip(names, values, strict=True))
        w, g, b = names
        total = "y" if is_pre and index == 3 else f"s{index}"
        norm = [f"n{index}"] if is_pre or index < 3 else ["y"]
        inner = helper.make_node("LayerNormalization", [x if is_pre else total, g, b], norm, f"norm{index}")
        block = [
            helper.make_node("MatMul", [norm[0] if is_pre else x, w], [f"m{index}"], f"fc{index}"),
            helper.make_node("Relu", [f"m{index}"], [f"r{index}"]),
            helper.make_node("Add", [x, f"r{index}"], [total], f"sum{index}"),
        ]
        nodes += [inner, *block] if is_pre else [*block, inner]
        x = total if is_pre else norm[0]
    return write(path, nodes, weights, {"x": [1, 128, 384]}, 3, False)


def masked_attention(path: Path) -> Path:
    """Attention with a mask of the lowest float, as exporters write it, and its four linears."""
    weights: Feed = {f"w{name}": normal(256, 256, seed=ord(name)) * 0.06 for name in "qkvo"}
    weights |= {"heads": np.array([1, 64, 4, 64]), "whole": np.array([1, 64, 256]), "root": np.float32(0.125)}
    weights["mask"] = np.triu(np.full((64, 64), np.finfo(np.float32).min), 1).astype(np.float32)
    nodes = []
    for name in "qkv":
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        nodes += [
            helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}1"], f"{name}_proj"),
            helper.make_node("Reshape", [f"{name}1", "heads"], [f"{name}2"]),
            helper.make_node("Transpose", [f"{name}2"], [name], perm=perm),
        ]
    nodes += [
        helper.make_node("MatMul", ["q", "k"], ["scores"], "scores"),
        helper.make_node("Mul", ["scores", "root"], ["scaled"], "scale"),
        helper.make_node("Add", ["scaled", "mask"], ["masked"], "add_mask"),
        helper.make_node("Softmax", ["masked"], ["p"], "softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["o1"], "context"),
        helper.make_node("Transpose", ["o1"], ["o2"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["o2", "whole"], ["o3"]),
        helper.make_node("MatMul", ["o3", "wo"], ["y"], "o_proj"),
    ]
    return write(path, nodes, weights, {"x": [1, 64, 256]}, 3, False)


@pytest.mark.slow
def test_dynamic_depthwise_convolutions(tmp_path: Path) -> None:
    """ConvInteger on depthwise convolutions: MobileNetV2 0.09."""
    path = inverted_residuals(tmp_path / "model.onnx")
    result, written, operators = optimized(path, passes=[QuantizeLinear(activations="dynamic")])
    assert "ConvInteger" not in operators
    for node in ("^conv0_0$", "^conv0_1$"):
        assert "a convolution has no dynamic form that pays; use activations=static" in reasons(result, node)
    assert ratio(path, written) >= SLACK


@pytest.mark.slow
def test_linears_written_as_gemm_are_not_left_out(tmp_path: Path) -> None:
    """MatMulNBitsQuantizer on GPT-2: quantises nothing, says nothing, 1.0."""
    path = transposed_linears(tmp_path / "model.onnx")
    result, written, operators = optimized(path, passes=[QuantizeLinear(bits=4)], budget=None, force=True)
    done = {row.node for row in result.ledger.select(outcome="applied")}
    assert {"c_fc", "c_proj", "head"} <= done and operators["MatMulNBits"] == 3
    assert ratio(path, written) >= SLACK


@pytest.mark.slow
def test_a_tied_table_is_kept_and_named(tmp_path: Path) -> None:
    """The table in 8 bits, dequantised as a whole for the head at every run: 0.88 to 0.98 of a decoder."""
    path = tied(tmp_path / "model.onnx")
    result, written, operators = optimized(path, passes=["quantize-embedding"], objective="size")
    assert operators["DequantizeLinear"] == operators["Cast"] == 0
    assert "the table is also taken by table_transposed, which needs it in floats" in reasons(result, "^embedding$")
    assert ratio(path, written) >= SLACK


@pytest.mark.slow
@pytest.mark.parametrize("is_pre", [True, False], ids=["before", "behind"])
def test_residual_sums_and_normalisations_stay_apart(is_pre: bool, tmp_path: Path) -> None:
    """SkipLayerNormalization: ViT-S 0.87, and 14 % of the float time of MiniLM, 31 % of that in 8 bits."""
    path = residual_norms(tmp_path / "model.onnx", is_pre)
    avoided = OnnxRuntime().prefers("SkipLayerNormalization")
    result, written, operators = optimized(path, passes=["avoid-slow-fusions"])
    if avoided:
        assert operators["SkipLayerNormalization"] == 0
    make_session(path, 1, tmp_path / "plain.onnx")
    plain = [node.op_type for node in onnx.load(tmp_path / "plain.onnx").graph.node]
    if avoided and "SkipLayerNormalization" in plain:
        changes = [run for run in result.report.pass_runs if run.name == "avoid-slow-fusions"]
        assert sum(run.changes for run in changes) == plain.count("SkipLayerNormalization")
    assert ratio(path, written) >= SLACK


@pytest.mark.slow
def test_static_ranges_leave_the_mask_alone(tmp_path: Path) -> None:
    """Everything static, the sum with a mask of -3.4e38 too: cosine .35, and slower than dynamic."""
    path = masked_attention(tmp_path / "model.onnx")
    step = QuantizeLinear(activations="static", smooth="off")
    result, written, operators = optimized(path, passes=[step], budget=None, force=True)
    quantized = {row.node for row in result.ledger.select(outcome="applied", pass_name="quantize-linear")}
    assert quantized == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not {"QLinearAdd", "QLinearMul", "QLinearSoftmax", "QLinearMatMul"} & set(operators)
    for node in ("^scores$", "^context$"):
        assert not list(result.ledger.select(node=node, outcome="applied", pass_name="quantize-linear"))
    wanted, given = (make_session(file, 1).run(None, samples(path, 6)[5])[0].ravel() for file in (path, written))
    assert wanted @ given / np.linalg.norm(wanted) / np.linalg.norm(given) > 0.995
    assert ratio(path, written) >= SLACK


@pytest.mark.slow
def test_small_weights_of_convolutions_run_as_floats(tmp_path: Path) -> None:
    """int4 weights behind DequantizeLinear: converted at every call, 0.13 to 0.5 of the convolution."""
    path = plain_cnn(tmp_path / "model.onnx")
    result, written, operators = optimized(path, passes=[QuantizeLinear(bits=4)], objective="size", budget=None)
    assert {row.node for row in result.ledger.select(outcome="applied")} == {"conv0", "conv1", "conv2"}
    assert written.stat().st_size < 0.2 * path.stat().st_size
    assert not {"DequantizeLinear", "Cast", "Mul", "BitShift"} & set(operators)
    assert ratio(path, written) >= SLACK


@pytest.mark.slow
@pytest.mark.skipif(bool(PROVIDERS["openvino"].missing), reason=f"openvino {PROVIDERS['openvino'].missing}")
def test_a_provider_that_gains_nothing(tmp_path: Path) -> None:
    """OpenVINO's provider with the Q/DQ of transformers: .95 to 1.10; what is used is what was measured."""
    path = masked_attention(tmp_path / "model.onnx")
    step = QuantizeLinear(activations="static", smooth="off")
    result = fxopt.optimize(path, calibration=samples(path), threads=1, passes=[step], budget=None, guard_seconds=4.0)
    assert any("OpenVINO" in note for note in result.report.warnings)
    feed = samples(path, 1)[0]
    session = make_session(path, 1)
    x = [torch.from_numpy(value) for value in feed.values()]
    best = max(measure(lambda: session.run(None, feed), lambda: result(*x), 1.5).ratio for _ in range(ATTEMPTS))
    assert best >= SLACK
