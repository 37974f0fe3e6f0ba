"""quantize-linear in float8: offered where the target has it, refused with a reason elsewhere, chosen by its error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.cost_model.roofline import predict
from fxopt.cost_model.targets import get_target
from fxopt.errors import InvalidOption
from fxopt.ir.error import noise_to_signal
from fxopt.ir.graph import Graph
from fxopt.ir.ops.linear_fp8 import linear_fp8
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.target import Cost, Target
from fxopt.passes.base import Candidate, Context, parse_pass
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.stats import collect
from fxopt.testing import PLAIN_CPU
from tests.passes.helpers import torch_graph


class Net(torch.nn.Module):
    """Linear 256 -> 512, ReLU, linear 512 -> 256, and a last one of 256 -> `last`."""

    def __init__(self, last: int = 256) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = [(512, 256), (256, 512), (last, 256)]
        self.weights = torch.nn.ParameterList([torch.randn(a, b, generator=generator) / b**0.5 for a, b in sizes])
        self.bias = torch.nn.Parameter(torch.randn(512, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 256]."""
        linear = torch.nn.functional.linear
        return linear(linear(torch.relu(linear(x, self.weights[0], self.bias)), self.weights[1]), self.weights[2])


def inputs(outliers: bool = False, count: int = 2) -> list[torch.Tensor]:
    """Normal rows; with outliers one element of each row, never in the same place, is 200 times as large."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        x = torch.randn(128, 256, generator=generator)
        if outliers:
            x[torch.arange(128), torch.randperm(256, generator=generator)[:128]] *= 200
        found.append(x)
    return found


def offered(step: QuantizeLinear, target: Target, **options: Any) -> tuple[Graph, list[Candidate]]:
    """The graph of the network and what the pass offers."""
    graph = torch_graph(Net(), inputs()[0])
    return graph, list(step.candidates(graph, Context(target, **options)))


def settings(found: list[Candidate]) -> set[str]:
    """What is offered, without what is refused."""
    return {str(candidate.setting) for candidate in found if candidate.refusal is None}


INT8 = {f"quantize-linear{{activations={kind},sums=32}}" for kind in ("dynamic", "static")}
FP8 = {f"quantize-linear{{format=fp8,activations={kind}}}" for kind in ("dynamic", "static")}


@pytest.mark.parametrize(("name", "known"), [("h100", INT8 | FP8), ("h200", INT8 | FP8), ("a100", INT8)])
def test_formats_are_those_that_the_target_lists(name: str, known: set[str]) -> None:
    _, found = offered(QuantizeLinear(smooth="off"), get_target(name))
    assert settings(found) == known
    refused = {str(candidate.refusal) for candidate in found if candidate.refusal is not None}
    assert refused == (set() if known >= FP8 else {"a100 has no fp8: compute capability 8.0, it begins with 8.9"})


def test_one_format_alone() -> None:
    h100 = get_target("h100")
    assert settings(offered(QuantizeLinear(format="int8", smooth="off"), h100)[1]) == INT8
    assert settings(offered(QuantizeLinear(format="fp8"), h100)[1]) == FP8
    dynamic = QuantizeLinear(format="fp8", activations="dynamic")
    assert settings(offered(dynamic, h100)[1]) == {"quantize-linear{format=fp8,activations=dynamic}"}
    without = replace(h100, name="odd", peak={"float32": 1e13, "float8": 1e15})
    _, found = offered(QuantizeLinear(), without)
    assert settings(found) == FP8 and "odd lists no rate of int8" in {str(item.refusal) for item in found}


@pytest.mark.parametrize("target", [PLAIN_CPU, get_target("x86-avx512-vnni"), get_target("aarch64")])
def test_nothing_changes_on_a_cpu(target: Target) -> None:
    auto, int8 = (offered(QuantizeLinear(format=kind), target)[1] for kind in ("auto", "int8"))
    assert auto == int8 and not any("fp8" in str(candidate.setting) for candidate in auto)


def test_refusals() -> None:
    h100, fp8 = get_target("h100"), QuantizeLinear(format="fp8")

    def reasons(target: Target, step: QuantizeLinear = fp8, **options: Any) -> set[str]:
        return {str(candidate.refusal) for candidate in offered(step, target, **options)[1] if candidate.refusal}

    assert reasons(PLAIN_CPU) == {"plain-cpu has no float8 arithmetic"}
    assert reasons(PLAIN_CPU, capabilities=OnnxRuntime()) == {"ONNX Runtime on the CPU has no fp8 kernel"}
    assert reasons(h100, QuantizeLinear(smooth="on", rounding="gptq")) == {
        "only the int8 form has smooth=on, rounding=gptq"
    }
    graph = torch_graph(Net(last=10), inputs()[0])
    (last,) = (item for item in fp8.candidates(graph, Context(h100)) if item.refusal is not None)
    assert str(last.refusal) == "float8 products take multiples of 16; the weight is (10, 256)"
    broken = Net()
    broken.weights[2].data[0, 0] = float("inf")
    graph = torch_graph(broken, inputs()[0])
    reasons_of_it = {str(item.refusal) for item in fp8.candidates(graph, Context(h100))}
    assert "the weight holds infinite or NaN values" in reasons_of_it
    image = torch_graph(torch.nn.Conv2d(16, 16, 3), torch.randn(2, 16, 8, 8))
    (only,) = fp8.candidates(image, Context(h100))
    assert str(only.refusal) == "convolutions have no float8 form; use format=int8 or auto"


def test_options() -> None:
    from fxopt.catalog import find_pass

    for text, message in [
        ("format=fp9", r"format='fp9'; expected one of \('auto', 'int8', 'fp8'\)"),
        ("format=fp8,bits=4", "expected bits=8"),
        ("format=fp8,activations=float", "expected bits=8"),
        ("format=fp8,smooth=on", "has no smooth=on; use format=int8"),
    ]:
        with pytest.raises(InvalidOption, match=message):
            parse_pass(f"quantize-linear{{{text}}}", find_pass)
    assert offered(QuantizeLinear(bits=None, format="fp8"), get_target("h100"))[1] == []


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("outliers", [False, True])
def test_estimates_are_what_the_operator_does(kind: str, outliers: bool) -> None:
    """Of each linear alone, on rows that did not calibrate, within a quarter."""
    step = QuantizeLinear(format="fp8", activations=kind)
    graph, found = offered(step, get_target("h100"))
    stats = collect(
        graph, [[x] for x in inputs(outliers)], {node for one in found for node in step.observed(graph, one)}
    )
    fresh = inputs(outliers, 3)[2]
    first = found[0]
    estimate = step.estimate(graph, first, stats)
    view = graph.find(first.node)
    assert view is not None
    step.apply(graph, first, stats)
    (node,) = (node for node in graph.calls() if node.target is linear_fp8.target)
    codes, scales = (graph.constant(node.args[i]) for i in (1, 2))
    assert codes is not None and scales is not None
    weights = Net()
    reference = torch.nn.functional.linear(fresh, weights.weights[0], weights.bias)
    result = linear_fp8(fresh, codes, scales, weights.bias.detach(), node.args[4])
    ratio = noise_to_signal(reference.detach(), result) / estimate.error
    assert ratio < 1.25
    assert ratio > 0.75 or (outliers and kind == "static"), "a range of half of the calls may cut outliers of the rest"
    assert estimate.saved_bytes == 3 * 512 * 256 - 4 * 512
    assert (estimate.before.dtype, estimate.after.dtype) == ("float32", "float8")
    assert estimate.before.bytes - estimate.after.bytes == 3 * 512 * 256 - 128 * 256


def test_prices_know_the_size_of_weights_and_the_rate_of_float8() -> None:
    """Few rows wait for the weight: a quarter of float32's bytes, half of float16's; many rows for the products."""
    h100 = get_target("h100")
    weight = torch.empty(8192, 8192, device="meta")
    codes, scales = weight.to(torch.float8_e4m3fn), torch.empty(8192, device="meta")

    def seconds(rows: int, dtype: torch.dtype) -> tuple[float, float]:
        x = torch.empty(rows, 8192, dtype=dtype, device="meta")
        flops = 2.0 * rows * 8192 * 8192
        moved = (x.numel() * 2 + weight.numel()) * x.itemsize
        before = Cost(flops, moved, str(dtype).removeprefix("torch."), "linear")
        after = linear_fp8.cost_of(x, codes, scales, None, None)
        return predict(before, h100).seconds, predict(after, h100).seconds

    for rows, dtype, low, high in [
        (1, torch.float32, 3.0, 4.0), (1, torch.float16, 1.6, 2.0), (16384, torch.float16, 1.8, 2.0)
    ]:  # fmt: skip
        before, after = seconds(rows, dtype)
        assert low < before / after < high


class Wide(torch.nn.Module):
    """One linear whose product takes far longer than its launch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4096, 256, generator=torch.Generator().manual_seed(2)) / 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., 256]."""
        return torch.nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("outliers", [False, True])
def test_the_planner_chooses_by_error(outliers: bool, tmp_path: Path) -> None:
    """Both formats have one price: fp8 follows outliers, int8 has the finer steps without them."""
    data = [x.repeat(8, 1) for x in inputs(outliers)]
    result = fxopt.optimize(
        Wide().eval(), "h100", example_inputs=(data[0],), calibration=data, passes=["quantize-linear"], budget=0.02
    )
    (applied,) = result.ledger.select(outcome="applied")
    assert ("format=fp8" in applied.setting) == outliers
    (made,) = (node.target for node in result.graph.calls())
    expected = {linear_fp8.target} if outliers else {linear_w8a8.target, linear_w8a8_dynamic.target}
    assert made in expected
    others = {row.setting for row in result.ledger.select(outcome="refused")}
    assert any("format=fp8" in setting for setting in others)
    result.save(tmp_path / "saved")
    with pytest.warns(UserWarning, match="compiled for h100, running the reference"):
        assert torch.equal(fxopt.load(tmp_path / "saved")(data[0]), result(data[0]))


def test_explain_names_the_formats() -> None:
    data = inputs()
    for target, reason in (("h100", "within the budget"), ("a100", "a100 has no fp8: compute capability 8.0")):
        ledger = fxopt.explain(
            Net().eval(), target, example_inputs=(data[0],), calibration=data, passes=["quantize-linear"]
        )
        rows = [row for row in ledger.verdicts if "format=fp8" in row.setting]
        assert len(rows) >= 3 and all(row.reason for row in rows)
        assert target == "h100" or all(reason in row.reason for row in rows)
