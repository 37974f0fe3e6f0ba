"""quantize-linear with weights of few bits: it fires, it refuses with a reason, its numbers are those it announces."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

import fxopt
from fxopt.backends.onnxruntime.backend import OnnxRuntime
from fxopt.errors import InvalidInput, InvalidOption
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.sequential import SequentialRun
from fxopt.passes.stats import Stats, collect
from tests.conftest import mlp
from tests.passes.test_quantize_linear import AVX2, samples
from tests.passes.test_quantize_linear import mlp as matmul_mlp

STEPS = [
    QuantizeLinear(bits=bits, group=16, symmetric=symmetric, method=method)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for method in ("gptq", "rtn")
    if bits != 8
] + [QuantizeLinear(bits=8, activations="int8", group=16)]


def rewritten(model: onnx.ModelProto, step: QuantizeLinear) -> tuple[Graph, Graph, list[Any], Stats]:
    """The graph before and after the pass, its candidates and statistics."""
    graph = load(model)
    infer(graph, {"n": 3, "batch": 3})
    context = Context(AVX2, capabilities=OnnxRuntime())
    candidates = [found for found in step.candidates(graph, context) if found.refusal is None]
    stats = collect(graph, samples(graph), {node for found in candidates for node in step.observed(graph, found)})
    after = graph.copy()
    walk = SequentialRun(after, samples(graph))
    for found in candidates:
        node = step.moments(after, found)
        if node is not None:
            stats.moments = {node.name: walk.moments(node)}
        step.apply(after, found, stats)
    after.prune()
    return graph, after, candidates, stats


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_every_form_runs_in_onnx_runtime_as_defined(step: QuantizeLinear) -> None:
    graph, after, candidates, stats = rewritten(mlp(features=40, hidden=48), step)
    assert [str(node.target) for node in after.calls()].count("fxopt.linear_nbits.default") == len(candidates) == 2
    executable = OnnxRuntime().compile(after, AVX2, threads=1)
    x = samples(graph)[0]
    reference, found, before = after.run(x)[0], executable.run(x)[0], graph.run(x)[0]
    executable.close()
    assert (found - reference).abs().max() <= 2e-2 * reference.abs().max()  # a half may be rounded to the other side
    noise = (reference - before).square().sum() / (before - before.mean()).square().sum()
    assert 0 < noise < {2: 1.0, 3: 0.2, 4: 0.05, 8: 1e-3}[step.bits or 8]
    assert all(step.estimate(graph, item, stats).error < 1 for item in candidates)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_four_bits_save_seven_eighths(activations: str) -> None:
    step = QuantizeLinear(bits=4, group=32, activations=activations)
    model = mlp(features=64, hidden=256)
    graph, after, candidates, stats = rewritten(model, step)
    saved = sum(step.estimate(graph, found, stats).saved_bytes for found in candidates)
    assert saved == graph.size_bytes() - after.size_bytes()
    assert saved > 0.8 * graph.size_bytes()


def test_gptq_is_nearer_than_rounding() -> None:
    """On correlated inputs; the second layer sees what the first one became."""
    model = mlp(features=64, hidden=64)
    results = {}
    mix = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    batches = [{"x": torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)) @ mix} for seed in range(8)]
    for method in ("rtn", "gptq"):
        result = fxopt.optimize(
            model, "host", calibration=batches, budget=None, force=True, objective="size",
            passes=[QuantizeLinear(bits=3, group=16, method=method, activations="float")],
        )  # fmt: skip
        assert result.report.error is not None
        assert {row.outcome for row in result.ledger.select(pass_name="quantize-linear")} == {"applied"}
        results[method] = result.report.error.noise_to_signal
    assert results["gptq"] < 0.5 * results["rtn"]


def test_the_work_is_bound_by_the_weights() -> None:
    """One row at a time waits for the weights: fewer bits are faster. Many rows do not."""
    from fxopt.cost_model.roofline import predict
    from fxopt.cost_model.targets import get_target

    target = get_target("x86-avx2")
    step = QuantizeLinear(bits=4)
    graph = load(mlp(features=2048, hidden=2048))
    for rows, pays in ((1, True), (512, False)):
        infer(graph, {"batch": rows})
        candidate = next(iter(step.candidates(graph, Context(target))))
        x = [[torch.randn(rows, 2048)]]
        estimate = step.estimate(graph, candidate, collect(graph, x, step.observed(graph, candidate)))
        gain = predict(estimate.before, target).seconds / predict(estimate.after, target).seconds
        assert (gain > 2) is pays


@pytest.mark.parametrize(
    ("options", "model", "reason"),
    [
        ({"group": 32}, mlp(features=16), "16 inputs are fewer than one group of 32"),
        ({"group": 40}, mlp(features=80, hidden=80), "a power of two of at least 16, not 40; try group=32"),
        ({"group": 0}, mlp(features=80, hidden=80), "not 80; try group=64"),
        ({"bits": 2, "activations": "float", "group": 16}, mlp(), "25 times as long"),
        ({"group": 16}, mlp(), ""),
    ],
)
def test_reasons(options: dict[str, Any], model: onnx.ModelProto, reason: str) -> None:
    graph = load(model)
    infer(graph, {"batch": 2})
    step = QuantizeLinear(**{"bits": 4, **options})
    found = next(iter(step.candidates(graph, Context(AVX2, capabilities=OnnxRuntime()))))
    assert (found.refusal is None) == (not reason)
    assert reason in str(found.refusal)


def test_weights_that_are_not_finite_have_no_error_to_plan_with() -> None:
    weight = np.ones((16, 24), np.float32)
    weight[3, 4] = np.inf
    graph = load(matmul_mlp(weight=weight))
    infer(graph, {"n": 3})
    step = QuantizeLinear(bits=4, group=16)
    candidate = next(iter(step.candidates(graph, Context(AVX2))))
    stats = collect(graph, samples(graph), step.observed(graph, candidate))
    assert np.isnan(step.estimate(graph, candidate, stats).error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5; expected 2, 3, 4 or 8"),
        ({"bits": 4, "activations": "static"}, "activations='static' with bits=4; expected one of"),
        ({"method": "awq"}, "method='awq'"),
        ({"group": 8}, "group=8; expected at least 16"),
        ({"group": -1}, "group=-1"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message.replace("'", ".")):
        QuantizeLinear(**options)


# ---- the walk over the graph as it is rewritten


def test_moments_are_those_of_the_values() -> None:
    graph = load(mlp())
    walk = SequentialRun(graph, samples(graph))
    values: dict[str, list[torch.Tensor]] = {}
    for sample in samples(graph):
        graph.run(sample, observer=lambda node, value: values.setdefault(node.name, []).append(value))
    for name in ("x", "act"):
        node = graph.find(name)
        assert node is not None
        rows = torch.cat(values[node.name]).double()
        torch.testing.assert_close(walk.moments(node), 2 / len(rows) * rows.t() @ rows)


def test_later_values_come_from_what_was_rewritten() -> None:
    graph = load(mlp())
    walk = SequentialRun(graph, samples(graph))
    x, first, act = graph.placeholders[0], graph.find("fc1"), graph.find("act")
    assert first is not None and act is not None
    walk.moments(x)
    double = graph.add_constant(torch.tensor(2.0), "two")
    from fxopt.ir.onnx.op import OnnxOp

    with graph.fx.inserting_after(first):
        made = graph.fx.call_function(OnnxOp("", "Mul", 14), (first, double))
    first.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    expected = torch.cat([graph.run([value])[0] for [value] in samples(graph)])
    found = torch.cat(walk.advance(graph.result_nodes[0]))
    torch.testing.assert_close(found, expected)
    assert not any(first in values for values in walk.values)  # nobody needs it any more


def test_nan_in_the_samples() -> None:
    graph = load(mlp())
    walk = SequentialRun(graph, [[torch.full((2, 16), float("nan"))]])
    with pytest.raises(InvalidInput, match="infinite or NaN"):
        walk.moments(graph.placeholders[0])
