"""pack-sparse: weights without their zeros, decoded by what ONNX Runtime folds when it opens the model."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import fxopt
from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.backends.onnxruntime.session import make_session
from fxopt.backends.onnxruntime.sparse_forms import opening_bytes
from fxopt.backends.tvm import Tvm
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.masks import marks, stale
from fxopt.ir.onnx.export import save
from fxopt.ir.ops.linear_sparse import conv_sparse, dense, linear_sparse
from fxopt.ir.sparsity import Pattern
from fxopt.ir.views.weights import weight_of
from fxopt.passes.base import Context
from fxopt.passes.manager import PassManager
from fxopt.passes.pack_sparse import PackSparse
from fxopt.passes.sparsify import Sparsify
from fxopt.testing import PLAIN_CPU, assert_neutral, assert_no_worse
from tests.passes.helpers import refusals, run_file
from tests.passes.sparsify.models import convolutions, images, linears, model_of, prepared, rows, size_context, sparse

FOLDED = {"Add", "CumSum", "Gather", "Max", "Reshape", "Slice", "Transpose"}


def packed(graph: Graph, ctx: Context | None = None) -> Graph:
    after = graph.copy()
    PassManager([PackSparse()]).run(after, ctx or size_context())
    return after


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("pattern", ["2:4", "8x2:4", "4x1", "unstructured"])
def test_linears(pattern: str, dtype: Any, tmp_path: Path) -> None:
    """Gemm and MatMul with a bias; 33 columns do not fill the last byte of a mask."""
    features = 32 if ":" in pattern else 33
    samples = rows(2, features, torch.float32 if dtype == np.float32 else torch.float16)
    made, _ = sparse(prepared(linears(features, 48, dtype)), Sparsify(pattern, None if ":" in pattern else 0.7), samples)
    after = packed(made)
    assert [node.target is linear_sparse.target for node in after.calls()] == [True, False, True, False]
    assert after.size_bytes() < 0.75 * made.size_bytes() and list(marks(after).values()) == list(marks(made).values())
    assert_no_worse(made, after, samples)
    before = [weight_of(made, made.find(name)) for name in ("fc1", "fc2")]  # type: ignore[arg-type]
    for node, weight in zip([node for node in after.calls() if node.target is linear_sparse.target], before, strict=True):
        assert weight is not None and torch.equal(weight_of(after, node), weight)  # type: ignore[arg-type]
    check_file(after, made, samples, tmp_path)


def check_file(after: Graph, made: Graph, samples: list[list[torch.Tensor]], tmp_path: Path) -> None:
    """Valid, smaller, run as with dense weights, folded, and read again with its marks."""
    executable, before = (OnnxRuntime().compile(graph, PLAIN_CPU, threads=1) for graph in (after, made))
    for sample in samples:
        assert torch.equal(executable.run(sample)[0], before.run(sample)[0]), "other bits than with dense weights"
    path = tmp_path / "model.onnx"
    executable.save(path)
    executable.close()
    before.close()
    onnx.checker.check_model(onnx.load(path), full_check=True)
    make_session(path, 1, tmp_path / "run.onnx")
    run = Counter(node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node)
    assert not set(run) & FOLDED, run
    plain = run_file(onnx.load(path), samples[0])
    defined = made.run(samples[0])[0].double().numpy()
    assert plain is not None and np.square(plain[0] - defined).sum() < 1e-5 * np.square(defined).sum()
    again = load(path)
    assert list(marks(again).values()) == list(marks(made).values()) and not stale(again)


def test_convolutions(tmp_path: Path) -> None:
    samples = images()
    made, _ = sparse(prepared(convolutions(), 4), Sparsify("2:4"), samples)
    after = packed(made)
    (node,) = [node for node in after.calls() if node.target is conv_sparse.target]
    assert node.args[4:] == (16, "2:4", [2, 1], [0, 1, 1, 0])
    assert_no_worse(made, after, samples)
    check_file(after, made, samples, tmp_path)


def test_a_file_is_smaller(tmp_path: Path) -> None:
    samples = rows(2, 256)
    made, _ = sparse(prepared(linears(256, 512)), Sparsify("2:4"), samples)
    sizes = []
    for graph in (made, packed(made)):
        executable = OnnxRuntime().compile(graph, PLAIN_CPU, threads=1)
        executable.save(tmp_path / "model.onnx")
        executable.close()
        sizes.append((tmp_path / "model.onnx").stat().st_size)
    assert sizes[1] < 0.56 * sizes[0]


def test_models_without_marks_are_left_alone() -> None:
    graph = prepared(linears())
    assert_neutral(PackSparse(), graph, rows(1), size_context())
    assert PackSparse().opset(graph, size_context()) == 0
    made, _ = sparse(graph, Sparsify("2:4"), rows(2))
    assert PackSparse().opset(made, size_context()) == 11


def test_refuses_with_a_reason() -> None:
    made, _ = sparse(prepared(linears()), Sparsify("2:4"), rows(2))
    fast = size_context(objective="latency")
    packed(made, fast)
    assert 'it saves bytes, which objective="size" asks for, not time: 2:4 gives no time' in refusals(fast)[0]
    few, _ = sparse(prepared(linears()), Sparsify("unstructured", 0.02, "magnitude"), rows(2))
    ctx = size_context()
    assert packed(few, ctx).size_bytes() == few.size_bytes()
    assert set(refusals(ctx)) == {"2% zeros save less than the mask of their places takes"}
    row, _ = sparse(prepared(linears(b2=np.zeros((1, 40)))), Sparsify("2:4"), rows(2))
    ctx = size_context()
    packed(row, ctx)
    assert refusals(ctx) == ["its bias has shape [1, 40]; expected one axis"]


def test_refuses_what_the_backend_lacks() -> None:
    pytest.importorskip("tvm", reason="TVM is not installed: pip install 'fxopt[tvm]'")
    made, _ = sparse(prepared(linears()), Sparsify("2:4"), rows(2))
    ctx = size_context(capabilities=Tvm())
    packed(made, ctx)
    assert refusals(ctx) == ["operator linear_sparse has no kernel in the tvm backend"] * 2


def test_by_name_on_a_file_with_marks(tmp_path: Path) -> None:
    """A sparse file from an earlier run is packed without anything lossy."""
    samples = rows(2)
    made, _ = sparse(prepared(linears()), Sparsify("2:4"), samples)
    executable = OnnxRuntime().compile(made, PLAIN_CPU, threads=1)
    executable.save(tmp_path / "sparse.onnx")
    executable.close()
    result = fxopt.optimize(tmp_path / "sparse.onnx", passes=["pack-sparse"], objective="size", guard_seconds=0.2)
    assert {row.outcome for row in result.ledger.select(pass_name="pack-sparse")} == {"applied"}
    assert result.report.outcome == "optimized" and result.report.after.size_bytes < result.report.before.size_bytes
    assert torch.allclose(result(samples[0][0]), made.run(samples[0])[0], atol=1e-5)


def test_patterns_decode_to_their_own_weights() -> None:
    """The stored blocks are those of the pattern's groups of outputs."""
    made, _ = sparse(prepared(linears()), Sparsify("4x1", 0.7), rows(2))
    after = packed(made)
    node = next(iter(after.calls()))
    values, mask = (after.constant(argument) for argument in node.args[1:3])
    assert values is not None and mask is not None
    assert values.shape[1] == 4 and len(mask) == 12
    assert Pattern.parse("4x1").zeros(dense(values, mask, 32)) == pytest.approx(1 - len(values) / (12 * 32))


OPENED = """
import sys, threading, time
import onnxruntime
from benchmarks.onnx_large import memory_of

before, most = memory_of("self")[0], 0
def watch():
    global most
    while True:
        most = max(most, memory_of("self")[0])
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(most - before)
"""


def wide(pattern: str, layers: int, features: int) -> Graph:
    """A chain of square MatMuls with these zeros, packed."""
    rng = np.random.default_rng(0)
    weights = {f"w{index}": rng.standard_normal((features, features)) / 32 for index in range(layers)}
    nodes = [
        helper.make_node("MatMul", [f"h{index}" if index else "x", f"w{index}"], [f"h{index + 1}"], f"m{index}")
        for index in range(layers)
    ]
    nodes.append(helper.make_node("Identity", [f"h{layers}"], ["y"]))
    graph = prepared(model_of(nodes, weights, ["n", features], np.float32))
    step = Sparsify(pattern, None if ":" in pattern else 0.8, "magnitude")
    return packed(sparse(graph, step, rows(1, features))[0])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("pattern", ["2:4", "4x1"])
def test_memory_of_opening_is_as_said(pattern: str, tmp_path: Path) -> None:
    """In a fresh process, by the file as it is written."""
    graph = wide(pattern, 6, 1536)
    save(graph, tmp_path / "model.onnx", FORMS, external=True)
    command = [sys.executable, "-c", OPENED, str(tmp_path / "model.onnx")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == pytest.approx(opening_bytes(graph), rel=0.2)
    assert opening_bytes(graph) < (22 if pattern == "2:4" else 13) * 6 * 1536**2


def test_memory_of_opening_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = wide("2:4", 2, 128)
    executable = OnnxRuntime().compile(graph, PLAIN_CPU, threads=1)
    assert not executable.notes()
    executable.close()
    monkeypatch.setattr("fxopt.backends.onnxruntime.sparse_forms._FEW", 1000)
    monkeypatch.setenv("FXOPT_MEMORY", "500K")  # half of it is too little
    executable = OnnxRuntime().compile(graph, PLAIN_CPU, threads=1)
    note = "which takes 0.36 MB meanwhile; with dense weights the model has 0.133 MB"
    assert [note in text for text in executable.notes()] == [True] and not executable.is_timed
