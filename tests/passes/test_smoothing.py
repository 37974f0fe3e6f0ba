"""Smoothing: exact before rounding, better after it, folded into the norm where nothing else uses it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.fold_norm_scale import FoldNormScale
from fxopt.passes.quantize_linear.smoothing import STRENGTHS, factors, siblings
from tests.passes.test_quantize_linear import AVX2


def block(residual: bool = False, weight: bool = True, bias: bool = True, mul: bool = False) -> onnx.ModelProto:
    """x [n, 4, 32] -> LayerNormalization with outliers -> two linears; with `residual` the norm has a third user."""
    random = np.random.default_rng(0)
    scale = np.ones(32, np.float32)
    scale[[3, 17]] = 60.0  # two features are outliers
    constants = {"g": scale, "b": random.normal(size=32).astype(np.float32), "c": np.float32(2) * scale}
    norm_inputs = ["x", "g", "b"] if bias else ["x", "g"]
    nodes = [helper.make_node("LayerNormalization", norm_inputs, ["n"], name="norm", axis=-1)]
    taken = "n"
    if mul:
        nodes.append(helper.make_node("Mul", ["n", "c"], ["scaled"], name="factor"))
        taken = "scaled"
    for name in ("q", "k"):
        constants[f"w{name}"] = (random.normal(size=(32, 24)) / 8).astype(np.float32)
        constants[f"b{name}"] = random.normal(size=24).astype(np.float32)
        nodes.append(helper.make_node("MatMul", [taken, f"w{name}"], [f"{name}_product"], name=f"{name}_matmul"))
        nodes.append(helper.make_node("Add", [f"{name}_product", f"b{name}"], [name], name=name))
    outputs = ["q", "k"]
    if residual:
        nodes.append(helper.make_node("Neg", ["n"], ["r"], name="neg"))
        outputs.append("r")
    body = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 32])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, None]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def batches(count: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(3, 4, 32, generator=generator)} for _ in range(count)]


def optimised(model: onnx.ModelProto, **options: Any) -> Any:
    text = ",".join(f"{key}={value}" for key, value in options.items())
    return fxopt.optimize(
        model, "host", calibration=batches(), passes=[f"quantize-linear{{{text}}}"], budget=None, force=True,
        objective="size",
    )  # fmt: skip


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("residual", [True, False])
def test_outliers_no_longer_drown_the_rest(activations: str, residual: bool) -> None:
    plain, smooth = (optimised(block(residual), activations=activations, smooth=smooth) for smooth in ("off", "on"))
    errors = [found.report.error.noise_to_signal for found in (plain, smooth)]
    assert 0 < errors[1] < 0.3 * errors[0]
    types = [getattr(node.target, "op_type", str(node.target)) for node in smooth.graph.calls()]
    assert types.count("Mul") == (1 if residual else 0)  # shared by both linears; folded where nothing else needs it
    applied = list(smooth.ledger.select(pass_name="quantize-linear", outcome="applied"))
    assert len(applied) == 2 and all("smooth=True" in row.setting for row in applied)


def test_both_are_offered_and_the_better_one_is_taken() -> None:
    found = optimised(block(), activations="dynamic")
    settings = {row.setting for row in found.ledger.select(pass_name="quantize-linear", outcome="applied")}
    assert len(settings) == 1 and "smooth=True" in settings.pop()


def test_siblings_share_the_factors() -> None:
    graph = load(block())
    infer(graph, {"n": 3})
    norm = graph.find("norm")
    assert norm is not None
    assert sorted(view.node.name for view in siblings(graph, norm)) == ["k", "q"]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_product_is_unchanged_in_exact_arithmetic(strength: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 32, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, 32)
    weights = [torch.randn(8, 32, generator=generator) for _ in range(3)]
    s = factors(x.abs().amax(0), weights, strength)
    assert s.shape == (32,) and s.min() >= 0.05 and s.max() <= 20
    for weight in weights:
        wide = weight.double()
        torch.testing.assert_close((x / s) @ (wide * s).t(), x @ wide.t(), rtol=1e-9, atol=1e-9)
    spread = [(value.amax(0) / value.amin(0)).max() for value in (x.abs() + 1, (x / s).abs() + 1)]
    assert spread[1] < spread[0]


def test_features_that_are_always_zero() -> None:
    largest = torch.tensor([0.0, 1.0, 4.0])
    s = factors(largest, [torch.tensor([[0.0, 1.0, 0.5]])], 0.5)
    assert bool(torch.isfinite(s).all()) and bool((s > 0).all())


# ---- fold-norm-scale


def folded(model: onnx.ModelProto) -> tuple[Graph, Graph, int]:
    graph = load(model)
    infer(graph, {"n": 3})
    after = graph.copy()
    return graph, after, FoldNormScale().run(after, Context(AVX2))


@pytest.mark.parametrize("bias", [True, False])
def test_a_factor_is_folded_into_the_norm(bias: bool) -> None:
    before, after, changes = folded(block(mul=True, bias=bias))
    assert changes == 1
    assert "Mul" not in [getattr(node.target, "op_type", "") for node in after.calls()]
    x = batches(1)[0]["x"]
    wide = before.run([x], widen=True)
    for exact, old, new in zip(wide, before.run([x]), after.run([x]), strict=True):
        assert (new - exact).abs().max() <= 2 * (old - exact).abs().max() + 1e-12
    assert FoldNormScale().run(after, Context(AVX2)) == 0


def test_a_norm_with_other_users_keeps_its_factor() -> None:
    assert folded(block(mul=True, residual=True))[2] == 0


def test_an_excluded_factor_is_left_alone() -> None:
    import re

    graph = load(block(mul=True))
    infer(graph, {"n": 3})
    assert FoldNormScale().run(graph, Context(AVX2, exclude=re.compile("factor"))) == 0
