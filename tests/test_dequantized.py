"""A quantised model in one call: made floats of, or quantised anew, judged against the model that came in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import fxopt
from fxopt.ir.error import noise_to_signal, output_error
from fxopt.ir.views.quantized import quantized_operators
from tests.conftest import Ran
from tests.quantised_files import float_model, quantised, samples
from tests.test_engine import CHIP, HOST, Machine, machine, op_types, per_operator, rows

__all__ = ["machine"]  # a fixture

QUANTISED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
)
NOTE = "the model was converted by dequantize; error and time are measured against it as it came in"
INTEGERS_SLOW = per_operator(**dict.fromkeys(QUANTISED, 10.0))
FLOATS_SLOW = per_operator(Conv=10.0, MatMul=10.0, Gemm=10.0)
KINDS = ["QDQ-channel-s", "QOperator-tensor-u", "dynamic-s", "nbits-QOperator-symmetric"]


def data(count: int = 6) -> list[torch.Tensor]:
    return [torch.from_numpy(x) for x in samples(count, seed=8)]


def optimized(kind: str, target: Any = HOST, **options: Any) -> fxopt.Optimized:
    return fxopt.optimize(quantised(kind), target, **{"calibration": data(), "passes": ["dequantize"], **options})


def noise(result: fxopt.Optimized, kind: str) -> float:
    """The error against the model that came in, on the samples that did not calibrate."""
    before = fxopt.optimize(quantised(kind), HOST, passes=[])
    pairs = [([before(x)], [result(x)]) for x in data()[3:]]
    return float(output_error([was for was, _ in pairs], [now for _, now in pairs]).noise_to_signal)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_floats_are_kept_where_they_are_faster(machine: Machine, kind: str) -> None:
    machine.seconds = INTEGERS_SLOW
    result = optimized(kind)
    assert result.report.outcome == "optimized"
    assert not set(op_types(result)) & set(QUANTISED)
    assert result.report.error is not None
    assert result.report.error.noise_to_signal == pytest.approx(noise(result, kind), rel=1e-3)
    assert 0 < result.report.error.noise_to_signal < 0.02
    assert NOTE in result.ledger.notes
    assert {row.outcome for row in rows(result, "dequantize")} == {"applied"}


def test_floats_that_are_slower_are_rolled_back(machine: Machine) -> None:
    machine.seconds = FLOATS_SLOW
    result = optimized("QOperator-channel-s")
    assert result.report.outcome == "nothing paid"
    assert "QLinearConv" in op_types(result)
    assert {row.outcome for row in rows(result, "dequantize")} == {"rolled-back"}
    assert all("not surely faster" in row.reason for row in rows(result, "dequantize"))
    forced = optimized("QOperator-channel-s", force=True)
    assert "Conv" in op_types(forced) and forced.report.outcome == "optimized"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [1, -1])
def test_quantised_anew_in_one_call(machine: Machine, kind: str, order: int) -> None:
    """The order of the names does not matter: what is converted comes first."""
    passes = ["dequantize", "quantize-linear{activations=static,smooth=off}"][::order]
    result = optimized(kind, passes=passes, budget=None, force=True)
    applied = rows(result, outcome="applied")
    assert applied and not any("quantised already" in row.reason for row in rows(result))
    assert any("w8a8" in name for name in op_types(result))
    assert not set(op_types(result)) & set(QUANTISED)
    assert result.report.error is not None
    assert result.report.error.noise_to_signal == pytest.approx(noise(result, kind), rel=1e-3)
    assert NOTE in result.ledger.notes


def test_without_dequantize_nothing_is_quantised_twice(machine: Machine) -> None:
    result = optimized("QDQ-channel-s", passes=None)
    found = rows(result)
    assert len(found) == 5 and all(row.reason.startswith("quantised already: int8 weights") for row in found)
    assert result.report.outcome == "nothing paid" and result.report.why.startswith("quantised already: int8 weights")
    assert len(list(quantized_operators(result.graph))) == 5


def test_over_budget(machine: Machine) -> None:
    machine.seconds = INTEGERS_SLOW
    result = optimized("QOperator-tensor-s", budget=1e-9)
    assert result.report.outcome == "nothing paid"
    assert all(
        row.outcome == "rolled-back" and "against the model that came in" in row.reason
        for row in rows(result, "dequantize")
    )


def test_a_plan_over_budget_leaves_the_floats(machine: Machine) -> None:
    machine.seconds = INTEGERS_SLOW
    free = optimized("QOperator-tensor-s")
    assert free.report.error is not None
    budget = 1.001 * free.report.error.noise_to_signal
    result = optimized("QOperator-tensor-s", passes=["dequantize", "quantize-linear{bits=2,group=16}"], budget=budget)
    assert result.report.outcome == "optimized" and "Conv" in op_types(result)
    assert result.report.error is not None and result.report.error.noise_to_signal <= budget


def test_without_data_only_without_a_budget(machine: Machine) -> None:
    result = optimized("QOperator-tensor-s", calibration=None, force=True)
    assert result.report.outcome == "nothing paid"
    assert {row.reason for row in rows(result, "dequantize")} == {
        "no data to measure the budget; give --calibration, or --calibration random, or --budget none"
    }
    result = optimized("QOperator-tensor-s", calibration=None, force=True, budget=None)
    assert result.report.outcome == "optimized" and result.report.error is None
    assert not set(op_types(result)) & set(QUANTISED)


def test_a_target_that_is_not_here() -> None:
    fast_floats = replace(CHIP, peak={"float32": 1e12, "int8": 1e9})
    result = optimized("QOperator-tensor-s", fast_floats)
    assert result.report.outcome == "optimized" and not set(op_types(result)) & set(QUANTISED)
    slow_floats = replace(CHIP, peak={"float32": 1e6, "int8": 1e12})
    result = optimized("QOperator-tensor-s", slow_floats)
    assert result.report.outcome == "nothing paid" and "QLinearConv" in op_types(result)
    assert {row.outcome for row in rows(result, "dequantize")} == {"rolled-back"}
    assert all(row.reason.startswith("predicted 0.") for row in rows(result, "dequantize"))


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_what_fxopt_has_quantised(machine: Machine, tmp_path: Path, activations: str) -> None:
    """A file that fxopt wrote is recognised, and becomes the float model with rounded weights."""
    quantise = [f"quantize-linear{{activations={activations},smooth=off}}"]
    options: dict[str, Any] = {"calibration": data(), "force": True, "budget": None}
    first = fxopt.optimize(float_model(), HOST, passes=quantise, **options)
    first.save(tmp_path / "first.onnx")
    count = len(rows(first, outcome="applied"))
    assert count >= 2
    views = list(quantized_operators(fxopt.capture(tmp_path / "first.onnx")))
    assert len(views) == count and all("int8 weights, symmetric per channel" in str(view) for view in views)
    result = fxopt.optimize(tmp_path / "first.onnx", HOST, passes=["dequantize"], **options)
    assert not set(op_types(result)) & set(QUANTISED)
    original = fxopt.optimize(float_model(), HOST, passes=[])
    x = data()[0]
    distances = [noise_to_signal(original(x), model(x)) for model in (result, first)]
    assert distances[0] < 1e-3 and distances[0] < 1.5 * distances[1]


def test_floats_of_a_large_model_lie_on_disk(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxopt.engine

    stored: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        stored.append(value)
        return value

    monkeypatch.setattr(fxopt.engine, "spilled", keep)
    monkeypatch.setenv("FXOPT_MEMORY", "100M")
    optimized("QOperator-tensor-s", force=True)
    assert not stored
    monkeypatch.setenv("FXOPT_MEMORY", "40K")
    optimized("QOperator-tensor-s", force=True)
    assert len(stored) >= 5


def test_nothing_to_convert(machine: Machine) -> None:
    result = fxopt.optimize(
        "examples/models/digits-cnn.onnx", HOST, calibration="random", passes=["dequantize"], force=True
    )
    assert not rows(result, "dequantize") and NOTE not in result.ledger.notes


def test_explain_prices_the_converted_model(machine: Machine) -> None:
    ledger = fxopt.explain(quantised("dynamic-s"), HOST, calibration=data(), passes=["dequantize", "quantize-linear"])
    assert rows(ledger, "dequantize", outcome="applied")
    assert not any("quantised already" in row.reason for row in rows(ledger))


def test_on_the_command_line(cli: Callable[..., Ran], tmp_path: Path) -> None:
    source, target, batches = (tmp_path / name for name in ("in.onnx", "out.onnx", "data.npz"))
    onnx.save(quantised("QDQ-channel-s"), source)
    np.savez(batches, x=np.concatenate(samples(8)))
    done = cli("optimize", source, "-o", target, "--passes", "dequantize", "--force", "--calibration", batches)
    assert done.code == 0 and NOTE in done.text, done.text
    assert not {node.op_type for node in onnx.load(target).graph.node} & set(QUANTISED)
    text = "int8 weights, symmetric per channel; uint8 activations with fixed ranges (QDQ)"
    assert f"quantised already: 5 operators with {text}" in cli("inspect", source).text
    found = json.loads(cli("inspect", source, "--json", "-").out)
    assert found["quantized"] == dict.fromkeys(["conv", "conv2", "gemm", "linear", "head"], text)
    assert "quantised already: int8 weights" in cli("explain", source, "--node", "^gemm$").text
