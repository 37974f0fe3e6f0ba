"""The search for the fastest plan within the budget: output errors are measured, local ones mislead."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt.ir.target import Target

torch.set_num_threads(1)

CHIP = Target(
    "chip", "cpu", "x86-64", "onnxruntime", "invented", "never measured", 0.5,
    {"float32": 1e10, "int8": 1e11}, 1e11, 1e-8, features=frozenset({"avx512_vnni"}),
)  # fmt: skip
DYNAMIC = "quantize-linear{activations=dynamic,smooth=off}"


def branches(copies: int = 1, quiet: float = 0.01) -> onnx.ModelProto:
    """y = sum of loud_i(x) + quiet * sum of quiet_i(x * c), where x * c has one large feature that has no weight.

    That feature makes the local errors of the quiet branches large; their share of the output makes them small.
    """
    random = np.random.default_rng(0)
    large = np.ones(16, np.float32)
    large[0] = 10.0
    constants = {"c": large, "share": np.float32(quiet)}
    nodes = [helper.make_node("Mul", ["x", "c"], ["xc"], name="widen")]
    totals = {}
    for kind, source in (("loud", "x"), ("quiet", "xc")):
        for index in range(copies):
            name = f"{kind}{index}"
            weight = random.standard_normal((16, 16)).astype(np.float32)
            weight[:, 0] *= kind == "loud"
            constants[f"w_{name}"] = weight
            nodes.append(helper.make_node("Gemm", [source, f"w_{name}"], [name], name=name, transB=1))
        names = [f"{kind}{index}" for index in range(copies)]
        nodes.append(helper.make_node("Sum", names, [f"{kind}_sum"], name=f"{kind}_sum"))
        totals[kind] = f"{kind}_sum"
    nodes.append(helper.make_node("Mul", [totals["quiet"], "share"], ["small"], name="shrink"))
    nodes.append(helper.make_node("Add", [totals["loud"], "small"], ["y"], name="total"))
    body = helper.make_graph(
        nodes,
        "branches",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 16, generator=generator) for _ in range(8)]


def optimized(model: onnx.ModelProto, budget: float | None) -> fxopt.Optimized:
    return fxopt.optimize(model, CHIP, calibration=batches(), passes=[DYNAMIC], budget=budget)


def nodes(result: fxopt.Optimized, outcome: str) -> set[str]:
    return {row.node for row in result.ledger.select(pass_name="quantize-linear") if row.outcome == outcome}


def test_the_layer_that_the_outputs_depend_on_is_left_out() -> None:
    everything = optimized(branches(), None)
    local = {row.node: row.error for row in everything.ledger.select(pass_name="quantize-linear")}
    assert local["quiet0"] > 10 * local["loud0"]  # type: ignore[operator]
    noise = everything.report.error
    assert noise is not None
    result = optimized(branches(), noise.noise_to_signal / 5)
    assert nodes(result, "applied") == {"quiet0"} and nodes(result, "refused") == {"loud0"}
    measured = {row.node: row.error for row in result.ledger.select(pass_name="quantize-linear")}
    assert measured["quiet0"] < measured["loud0"] / 10  # type: ignore[operator]
    assert measured["loud0"] == pytest.approx(noise.noise_to_signal, rel=0.2)
    assert result.report.error is not None and result.report.error.noise_to_signal <= noise.noise_to_signal / 5


def test_the_ledger_says_what_was_measured() -> None:
    result = optimized(branches(), 1e-5)
    assert (
        "over budget: what each of 2 changes alone adds to the error of the outputs was measured: 2 partial runs on 4"
        " calibration samples" in result.ledger.notes
    )
    (refused,) = [row for row in result.ledger.select(pass_name="quantize-linear") if row.outcome == "refused"]
    assert re.fullmatch(r"over budget: alone it adds [\d.e-]+ to the noise", refused.reason)


def test_many_changes_are_measured_in_groups_and_twice_the_same() -> None:
    """80 changes in 64 runs; half of the loud ones have to go, no quiet one does."""
    model = branches(40)
    noise = optimized(model, None).report.error
    assert noise is not None
    one, two = (optimized(model, noise.noise_to_signal / 2) for _ in range(2))
    assert one.ledger.verdicts == two.ledger.verdicts and one.ledger.notes == two.ledger.notes
    assert any("what each of 80 changes alone" in note and "64 partial runs" in note for note in one.ledger.notes)
    applied, refused = nodes(one, "applied"), nodes(one, "refused")
    assert all(name.startswith("loud") for name in refused)
    assert 15 <= len(refused) <= 25 and len(applied) == 80 - len(refused)
    assert one.report.error is not None
    assert 0.8 * noise.noise_to_signal / 2 < one.report.error.noise_to_signal <= noise.noise_to_signal / 2
