"""Zeros stay zeros: through every form of quantising, own kernels, other exact passes, the backend's file and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.cost_model.targets import get_target
from fxopt.frontends.onnx import load
from fxopt.ir.masks import marks, stale, verify_masks
from fxopt.ir.sparsity import Pattern
from fxopt.ir.views.weights import weight_of
from fxopt.passes.base import Context
from fxopt.passes.fuse_int8 import FuseInt8
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import exact_pipeline, spelling_pipeline, tidying_pipeline
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.sparsify import Sparsify
from fxopt.rewriting import keeping_masks
from fxopt.testing import PLAIN_CPU
from tests.passes.sparsify.models import convolutions, images, linears, noise, prepared, rows, sparse

EIGHT = [
    QuantizeLinear(activations=activations, smooth=smooth, rounding=rounding)
    for activations, smooth in (("dynamic", "off"), ("static", "off"), ("static", "on"))
    for rounding in ("nearest", "gptq")
]
FEW = [
    QuantizeLinear(bits=2, group=16),
    QuantizeLinear(bits=3, group=16, symmetric=False, act_order=False),
    QuantizeLinear(bits=4, group=16, symmetric=False, method="rtn"),
    QuantizeLinear(bits=8, activations="int8", group=16, symmetric=False),
]
PATTERNS = {"2:4": Sparsify("2:4"), "4x1": Sparsify("4x1", 0.6)}
CPU = Context(PLAIN_CPU, capabilities=OnnxRuntime())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("step", [*EIGHT, *FEW], ids=str)
def test_quantised_linears(pattern: str, step: QuantizeLinear, tmp_path: Path) -> None:
    graph, samples = prepared(linears()), rows()
    made, _ = sparse(graph, PATTERNS[pattern], samples)
    after, chosen = sparse(made, step, samples, CPU)
    assert [item.anchor for item in chosen] == ["fc1_bias", "fc2", "head"]
    found = {node.name: weight_of(after, node) for node in after.calls() if "sparsity" in node.meta}
    weights = [weight for weight in found.values() if weight is not None]
    assert len(weights) == 2
    for weight, name in zip(weights, ("fc1", "fc2"), strict=True):
        before = weight_of(made, made.find(name))  # type: ignore[arg-type]
        assert before is not None and not bool(((weight != 0) & (before == 0)).any()), "a zero was filled"
        assert Pattern.parse(pattern).violation(weight) == ""
    limit = 0.5 if step.bits == 2 else 0.1
    assert noise(made, after, samples) < limit
    executable = OnnxRuntime().compile(after, PLAIN_CPU, threads=1)
    found_here, defined = executable.run(samples[0])[0], after.run(samples[0])[0]
    assert float((found_here - defined).square().sum() / defined.square().sum()) < 1e-3
    executable.save(tmp_path / "model.onnx")
    executable.close()
    again = load(tmp_path / "model.onnx")
    assert len(marks(again)) == 2 and not stale(again)


@pytest.mark.parametrize(
    "step", [QuantizeLinear(activations="static"), QuantizeLinear(activations="static", rounding="gptq"),
             QuantizeLinear(bits=4, group=16), QuantizeLinear(bits=3, group=0, symmetric=False)], ids=str,
)  # fmt: skip
def test_quantised_convolutions(step: QuantizeLinear, tmp_path: Path) -> None:
    graph, samples = prepared(convolutions(), 4), images()
    made, _ = sparse(graph, Sparsify("2:4"), samples)
    after, _ = sparse(made, step, samples, CPU)
    assert len(marks(after)) == 1
    executable = OnnxRuntime().compile(after, PLAIN_CPU, threads=1)
    executable.save(tmp_path / "model.onnx")
    executable.close()
    again = load(tmp_path / "model.onnx")
    assert len(marks(again)) == 1 and not stale(again)


def test_float8() -> None:
    graph, samples = prepared(linears(32, 64)), rows()
    made, _ = sparse(graph, Sparsify("2:4"), samples)
    h100 = Context(get_target("h100"))
    after, chosen = sparse(made, QuantizeLinear(format="fp8"), samples, h100)
    assert chosen and list(marks(after).values()) == list(marks(made).values())


def test_own_kernels_on_codes() -> None:
    graph, samples = prepared(linears()), rows()
    made, _ = sparse(graph, Sparsify("4x1", 0.6), samples)
    after, _ = sparse(made, QuantizeLinear(activations="static", smooth="on"), samples, CPU)
    assert keeping_masks(FuseInt8(), after, CPU) == 3
    assert len(marks(after)) == 2
    for node in after.calls():
        assert ("sparsity" in node.meta) <= (weight_of(after, node) is not None)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_exact_passes(pattern: str) -> None:
    graph, samples = prepared(linears()), rows()
    made, _ = sparse(graph, PATTERNS[pattern], samples)
    for steps in (exact_pipeline(), spelling_pipeline(), tidying_pipeline()):
        PassManager(steps).run(made, CPU)
    verify_masks(made)
    assert len(marks(made)) == 2


def test_gptq_fills_what_is_not_promised() -> None:
    """Zeros without a mark are numbers like others: that is why there are marks."""
    graph, samples = prepared(linears()), rows()
    made, _ = sparse(graph, Sparsify("2:4"), samples)
    for node in made.nodes:
        node.meta.pop("sparsity", None)
    after, _ = sparse(made, QuantizeLinear(bits=4, group=16), samples, CPU)
    weight = weight_of(after, next(iter(after.calls())))
    assert weight is not None and Pattern.parse("2:4").violation(weight) != ""


def test_rounding_to_nearest_is_the_same_with_and_without_marks() -> None:
    graph, samples = prepared(linears()), rows()
    made, _ = sparse(graph, Sparsify("2:4"), samples)
    plain = made.copy()
    for node in plain.nodes:
        node.meta.pop("sparsity", None)
    step = QuantizeLinear(bits=4, group=16, method="rtn")
    results = [sparse(found, step, samples, CPU)[0].run(samples[0])[0] for found in (made, plain)]
    assert torch.equal(*results)


def test_diagonal_moments_with_marks_round_to_nearest() -> None:
    """Nothing can be compensated, and zeros are zeros already."""
    from fxopt.passes.quantize_linear.gptq import gptq, nearest
    from fxopt.passes.quantize_linear.grids import group_grid

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 32, generator=generator)
    weight = weight * Pattern.parse("2:4").mask(weight.square(), 0)
    for symmetric in (True, False):
        grid = group_grid(weight, 4, 16, symmetric)
        moments = torch.diag(torch.rand(32, generator=generator, dtype=torch.float64) + 0.1)
        assert torch.equal(gptq(weight, moments, grid, kept=weight != 0).codes, nearest(weight, grid))
        full = torch.tensor(np.cov(np.random.default_rng(0).normal(size=(32, 200))) + 0.3)
        codes = gptq(weight, full, grid, kept=weight != 0).codes
        values = grid.values(codes.double(), grid.groups(32))
        assert bool((values[weight == 0] == 0).all())
