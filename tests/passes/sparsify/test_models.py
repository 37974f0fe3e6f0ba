"""sparsify on the repository's models, and together with own kernels."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from examples.calibration import calibration_inputs
from fxopt.cost_model.host import detect_host
from fxopt.cost_model.sparse_kernels import OWN_INT8
from fxopt.guard import Timing
from fxopt.ir.masks import marks, stale
from fxopt.ir.ops.sparse_linear_u8s8 import sparse_linear_u8s8
from fxopt.ir.views.weights import weight_of
from tests.passes.sparsify.models import linears, rows

MODELS = Path(__file__).parents[3] / "examples" / "models"
needs_compiler = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("tvm", "ziglang")), reason="own kernels are compiled"
)
FASTER = Timing(1.0, 0.5, 2.0, 1.9, 2.1, 3)


def batches(name: str, count: int = 16) -> list[dict[str, torch.Tensor]]:
    return [{key: torch.from_numpy(value[None]) for key, value in zip(data, row, strict=True)}
            for data in (calibration_inputs(name),) for row in list(zip(*data.values(), strict=True))[:count]]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("digits-vit", 0.1), ("byte-lm", 0.2)])
def test_two_of_four_of_a_trained_model_is_smaller(name: str, limit: float, tmp_path: Path) -> None:
    result = fxopt.optimize(
        MODELS / f"{name}.onnx", calibration=batches(name), passes=["sparsify-24"], objective="size", budget=limit,
        threads=1, guard_seconds=0.5,
    )  # fmt: skip
    assert result.report.outcome == "optimized" and result.report.error is not None
    assert 0 < result.report.error.noise_to_signal <= limit
    applied = list(result.ledger.select(pass_name="sparsify", outcome="applied"))
    assert len(applied) == {"digits-vit": 24, "byte-lm": 18}[name]
    result.save(tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < 0.65 * (MODELS / f"{name}.onnx").stat().st_size
    again = fxopt.load(tmp_path / "small.onnx")
    assert len(marks(again.graph)) == len(applied) and not stale(again.graph)


def test_this_machine_refuses_2_4_for_time() -> None:
    result = fxopt.optimize(
        MODELS / "digits-cnn.onnx", calibration=batches("digits-cnn", 2), passes=["sparsify-24"], guard_seconds=0.1
    )
    verdicts = list(result.ledger.select(pass_name="sparsify"))
    assert {row.outcome for row in verdicts} == {"refused"} and not marks(result.graph)
    reasons = " ".join(row.reason for row in verdicts)
    assert "its kernel is 3x3" in reasons and "heads stay dense" in reasons


def both(monkeypatch: pytest.MonkeyPatch) -> fxopt.Optimized:
    """Zeros and 8 bits on own kernels, everything measured to be faster."""
    for place in ("fxopt.own_kernels.measure", "fxopt.decisions.measure"):
        monkeypatch.setattr(place, lambda *_: FASTER)
    target = dataclasses.replace(detect_host(1), sparse_kernels=OWN_INT8)
    samples = [sample[0] for sample in rows(4, 256, n=128)]
    passes = ["sparsify{sparsity=0.7}", "quantize-linear{activations=static,smooth=off}"]
    return fxopt.optimize(
        linears(256, 512), target, calibration=samples, passes=passes, budget=None, custom_ops=True, threads=1
    )


@pytest.mark.slow
@needs_compiler
def test_blocks_run_on_own_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = both(monkeypatch)
    applied = list(result.ledger.select(pass_name="sparsify", outcome="applied"))
    assert applied and {"pattern=4x1" in row.setting and "kernel=int8" in row.setting for row in applied} == {True}
    found: list[Any] = [node for node in result.graph.calls() if node.target is sparse_linear_u8s8.target]
    assert found and len(marks(result.graph)) == len(applied)
    for node in result.graph.calls():
        mark, weight = node.meta.get("sparsity"), weight_of(result.graph, node)
        assert mark is None or (weight is not None and mark.violation(weight) == "")
    result.save(tmp_path / "own.onnx")
    again = fxopt.load(tmp_path / "own.onnx")
    assert len(marks(again.graph)) == len(applied) and not stale(again.graph)


@pytest.mark.slow
@needs_compiler
def test_zeros_that_no_own_kernel_skips_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.own_sparse.places", lambda *_: [])
    result = both(monkeypatch)
    undone = [row for row in result.ledger.select(pass_name="sparsify") if row.outcome == "rolled-back"]
    assert {row.reason for row in undone} == {
        "it buys nothing: no own kernel that skips its zeros was measured to be faster"
    }
    assert not marks(result.graph) and list(result.ledger.select(pass_name="fuse-int8", outcome="applied"))
