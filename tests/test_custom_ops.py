"""Own kernels behind `custom_ops`: asked for, measured, written beside the file, and needed to load it."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt import own_kernels
from fxopt.cost_model.host import instruction_sets
from fxopt.errors import InvalidModel, InvalidOption, MissingDependency
from fxopt.guard import Timing

WIDTH = 64
has_compiler = all(importlib.util.find_spec(name) for name in ("tvm", "ziglang")) and "avx2" in instruction_sets()
needs_compiler = pytest.mark.skipif(not has_compiler, reason="needs fxopt[tvm] and a CPU with AVX2")


def network(zeros: float = 0.0) -> onnx.ModelProto:
    """x -> MatMul, Add, Gelu -> MatMul, Add -> Sum with x -> LayerNormalization; a share of 4x1 blocks is zero."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.normal(size=(WIDTH, 4 * WIDTH)) / 8, "b1": random.normal(size=4 * WIDTH),
        "w2": random.normal(size=(4 * WIDTH, WIDTH)) / 16, "b2": random.normal(size=WIDTH),
        "g": random.uniform(0.5, 2, WIDTH), "h": random.normal(size=WIDTH),
    }  # fmt: skip
    for name in ("w1", "w2") if zeros else ():
        inner, outputs = weights[name].shape
        weights[name] = weights[name] * np.repeat(random.random((inner, outputs // 4)) >= zeros, 4, 1)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"]),
        helper.make_node("Add", ["m1", "b1"], ["a1"], name="up"),
        helper.make_node("Gelu", ["a1"], ["act"]),
        helper.make_node("MatMul", ["act", "w2"], ["m2"]),
        helper.make_node("Add", ["m2", "b2"], ["a2"], name="down"),
        helper.make_node("Add", ["a2", "x"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "g", "h"], ["y"]),
    ]
    shape = ["n", 32, WIDTH]
    body = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def samples() -> list[dict[str, Any]]:
    return [{"x": np.random.default_rng(seed).normal(size=(2, 32, WIDTH)).astype(np.float32)} for seed in range(6)]


def optimized(model: onnx.ModelProto | None = None, **options: Any) -> Any:
    passes = ["quantize-linear{activations=static,smooth=off}"]
    return fxopt.optimize(
        model or network(), calibration=samples(), passes=passes, threads=1, custom_ops=True, **options
    )


def test_where_there_are_none() -> None:
    with pytest.raises(InvalidOption, match="backend eager takes no custom operators; expected onnxruntime"):
        optimized(backend="eager")
    with pytest.raises(InvalidOption, match="made for and measured on this machine"):
        fxopt.optimize(network(), "x86-avx2", calibration=samples(), custom_ops=True)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tvm" else found(name))
    if "avx2" not in instruction_sets():
        pytest.skip("own kernels need AVX2")
    with pytest.raises(MissingDependency, match=r"custom_ops needs tvm.* to compile kernels; .*fxopt\[tvm\]"):
        optimized()


@pytest.mark.slow
@needs_compiler
def test_the_file_and_its_library(tmp_path: Path) -> None:
    import onnxruntime

    result = optimized(force=True)
    rows = list(result.ledger.select(pass_name="fuse-int8"))
    assert {(row.node, row.outcome) for row in rows} == {("up", "applied"), ("down", "applied")}
    path = tmp_path / "model.onnx"
    result.save(path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.onnx", "model.so"}
    x = samples()[0]["x"]
    here = result(torch.from_numpy(x)).numpy()
    expected = np.asarray(fxopt.optimize(network(), passes=[])(torch.from_numpy(x)))
    assert np.square(here - expected).sum() / np.square(expected).sum() < 4e-3  # with seven-bit codes, too
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(tmp_path / "model.so"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"x": x})[0], here)
    loaded = fxopt.load(path)
    assert np.array_equal(loaded(torch.from_numpy(x)).numpy(), here)
    in_torch = loaded.graph.run([torch.from_numpy(x)])[0].numpy()
    assert np.square(here - in_torch).sum() / np.square(here).sum() < 1e-4
    loaded.save(tmp_path / "again.onnx")
    assert np.array_equal(fxopt.load(tmp_path / "again.onnx")(torch.from_numpy(x)).numpy(), here)


@pytest.mark.slow
@needs_compiler
def test_a_file_without_its_library(tmp_path: Path) -> None:
    optimized(force=True).save(tmp_path / "model.onnx")
    (tmp_path / "model.so").rename(tmp_path / "kernels.so")
    with pytest.raises(InvalidModel, match=r"needs the library model\.so .* copy both files"):
        fxopt.load(tmp_path / "model.onnx")
    shutil.move(tmp_path / "model.onnx", tmp_path / "kernels.onnx")
    fxopt.load(tmp_path / "kernels.onnx")  # both have a new name


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("ratio", "outcome"), [(0.9, "rolled-back"), (1.2, "applied")])
def test_what_is_not_faster_is_not_used(ratio: float, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(1.0, 1.0 / ratio, ratio, ratio * 0.99, ratio * 1.01, 3)
    monkeypatch.setattr(own_kernels, "measure", lambda *_: timing)
    monkeypatch.setattr("fxopt.decisions.measure", lambda *_: Timing(1.0, 0.5, 2.0, 1.9, 2.1, 3))
    result = optimized()
    assert result.report.outcome == "optimized"
    assert {row.outcome for row in result.ledger.select(pass_name="fuse-int8")} == {outcome}
    (reason,) = {row.reason for row in result.ledger.select(pass_name="fuse-int8")}
    assert reason.startswith(f"measured {ratio:.2f}x") and ("not surely faster" in reason) == (outcome != "applied")
    assert any("linear_u8s8" in str(node.target) for node in result.graph.calls()) == (outcome == "applied")


@pytest.mark.slow
@needs_compiler
def test_zero_blocks_are_left_out(tmp_path: Path) -> None:
    """Sparse kernels with the same sums as the dense ones; between them codes lie as panels."""
    model = network(0.8)
    result = optimized(model, force=True)
    rows = {row.node: row for row in result.ledger.select(pass_name="sparse-int8")}
    assert {(name, row.outcome) for name, row in rows.items()} == {("up", "applied"), ("down", "applied")}
    for row in rows.values():
        assert re.match(r"(79|80|81) % of the 4x1 blocks are zero: sparse kernel; not measured", row.reason)
    path = tmp_path / "model.onnx"
    result.save(path)
    own = [node for node in onnx.load(path).graph.node if node.op_type == "SparseLinearInt8"]
    layouts = [{each.name: each.i for each in node.attribute} for node in own]
    assert [(found["x_panels"], found["codes_panels"]) for found in layouts] == [(0, 1), (1, 0)]
    x = torch.from_numpy(np.random.default_rng(9).normal(size=(5, 32, WIDTH)).astype(np.float32))
    here = result(x)
    loaded = fxopt.load(path)
    assert torch.equal(loaded(x), here)
    in_torch = loaded.graph.run([x])[0]
    assert (here - in_torch).square().sum() / here.square().sum() < 1e-4


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif("avx512_vnni" not in instruction_sets(), reason="sparsify knows figures of AVX-512 VNNI")
def test_zeros_of_sparsify_are_left_out() -> None:
    feeds = [{"x": np.random.default_rng(seed).normal(size=(4, 32, WIDTH)).astype(np.float32)} for seed in range(6)]
    result = fxopt.optimize(
        network(), calibration=feeds, threads=1, custom_ops=True, force=True, budget=5.0,
        passes=["sparsify{sparsity=0.7}", "quantize-linear{activations=static,smooth=off}"],
    )  # fmt: skip
    for name in ("sparsify", "quantize-linear", "sparse-int8"):
        assert {row.node for row in result.ledger.select(pass_name=name, outcome="applied")} == {"up", "down"}


@pytest.mark.slow
@needs_compiler
def test_few_zero_blocks_are_not() -> None:
    result = optimized(network(0.04), force=True)
    rows = list(result.ledger.select(pass_name="sparse-int8"))
    assert {(row.node, row.outcome) for row in rows} == {("up", "refused"), ("down", "refused")}
    assert all(
        re.search(r"^\d % of the 4x1 blocks are zero: below the break-even of \d+ % for", r.reason) for r in rows
    )


@pytest.mark.slow
@needs_compiler
def test_slow_sparse_kernels_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = iter([Timing(1.0, 0.8, 1.2, 1.19, 1.21, 3), Timing(1.0, 1.1, 0.9, 0.89, 0.91, 3)])
    monkeypatch.setattr(own_kernels, "measure", lambda *_: next(timings))
    monkeypatch.setattr("fxopt.decisions.measure", lambda *_: Timing(1.0, 0.5, 2.0, 1.9, 2.1, 3))
    result = optimized(network(0.8))
    assert {row.outcome for row in result.ledger.select(pass_name="fuse-int8")} == {"applied"}
    reasons = {(row.outcome, row.reason.split("; ")[1]) for row in result.ledger.select(pass_name="sparse-int8")}
    assert reasons == {("rolled-back", "measured 0.90x (0.89 to 0.91) over what it replaces: not surely faster")}
    assert not any("sparse" in str(node.target) for node in result.graph.calls())


@pytest.mark.slow
@needs_compiler
def test_sparse_kernels_where_dense_ones_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = iter([Timing(1.0, 1.1, 0.9, 0.89, 0.91, 3), Timing(1.0, 0.5, 2.0, 1.9, 2.1, 3)])
    monkeypatch.setattr(own_kernels, "measure", lambda *_: next(timings))
    monkeypatch.setattr("fxopt.decisions.measure", lambda *_: Timing(1.0, 0.5, 2.0, 1.9, 2.1, 3))
    result = optimized(network(0.8))
    (why,) = {row.reason for row in result.ledger.select(pass_name="fuse-int8", outcome="applied")}
    assert why.startswith("in the same library as sparse kernels (measured 0.90x") and "not surely faster" in why
    assert {row.node for row in result.ledger.select(pass_name="sparse-int8", outcome="applied")} == {"up", "down"}
    assert sum("sparse_linear" in str(node.target) for node in result.graph.calls()) == 2


@pytest.mark.slow
@needs_compiler
def test_nothing_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.decisions.measure", lambda *_: Timing(1.0, 0.5, 2.0, 1.9, 2.1, 3))
    result = fxopt.optimize(
        network(), calibration=samples(), passes=["quantize-linear{activations=dynamic,smooth=off}"], custom_ops=True
    )
    assert {row.reason for row in result.ledger.select(pass_name="fuse-int8", outcome="refused")} == {
        "the range of its input is found at run time"
    }
    assert any("no 8-bit linear with a calibrated range" in note for note in result.ledger.notes)
