"""What the engine decides: prices, budget, guard, roll-back. Times come from a made-up machine, so that they are sure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
import fxopt.guard as guard
from fxopt.backends.onnxruntime.session import OnnxExecutable
from fxopt.errors import UnknownName, VerificationError
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Verdict
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.target import Cost, Target
from fxopt.passes.base import Candidate, Context, Estimate, ExactPass, LossyPass, Setting
from fxopt.passes.stats import Stats
from tests.conftest import mlp

torch.set_num_threads(1)

HOST = Target(
    "made-up", "cpu", "x86-64", "onnxruntime", "invented", "never measured", 0.3,
    {"float32": 1e10, "int8": 1e11}, 1e11, 1e-8, features=frozenset({"avx2"}), is_host=True,
)  # fmt: skip
CHIP = Target(
    "chip", "cuda", "sm_00", "eager", "invented", "never measured", 0.5,
    {"float32": 1e10, "int8": 1e11}, 1e11, 1e-8,
)  # fmt: skip
INTEGER = ("DynamicQuantizeLinear", "MatMulIntegerToFloat", "QuantizeLinear", "DequantizeLinear")
Seconds = Callable[[str, list[int]], float]


class Machine:
    """Stands for the `time` module of the guard: an ONNX model takes the sum of what its nodes take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds: Seconds = lambda op_type, weight: 1e-3
        self.known: dict[Path, float] = {}
        self.timed: list[Path] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self, path: Path) -> None:
        if path not in self.known:
            graph = onnx.load(path).graph
            shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
            self.known[path] = 1e-5 + sum(
                self.seconds(
                    node.op_type, next((shapes[name] for name in node.input if len(shapes.get(name, ())) > 1), [])
                )
                for node in graph.node
            )
        self.now += self.known[path]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine on which operators take what `machine.seconds` says (every one a millisecond by default)."""
    made = Machine()
    original = OnnxExecutable.run

    def run(self: OnnxExecutable, inputs: Any) -> Any:
        made.run(self.path)
        return original(self, inputs)

    monkeypatch.setattr(guard, "time", made)
    monkeypatch.setattr(OnnxExecutable, "run", run)
    return made


def per_operator(default: float = 0.0, **seconds: float) -> Seconds:
    """Milliseconds by operator type."""
    return lambda op_type, weight: 1e-3 * seconds.get(op_type, default)


INTEGERS_PAY = per_operator(Gemm=10, MatMul=10, MatMulInteger=1, DynamicQuantizeLinear=1)


def with_identity(features: int = 16, hidden: int = 32) -> onnx.ModelProto:
    """The perceptron with an Identity behind fc1."""
    model = mlp(features, hidden)
    model.graph.node.insert(1, helper.make_node("Identity", ["h"], ["same"], name="identity"))
    model.graph.node[2].input[0] = "same"
    onnx.checker.check_model(model, full_check=True)
    return model


def batches(count: int = 8, rows: int = 4, features: int = 16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, features, generator=generator) for _ in range(count)]


def optimized(model: Any, target: Any = HOST, **options: Any) -> fxopt.Optimized:
    return fxopt.optimize(model, target, **{"calibration": batches(), **options})


def rows(result: fxopt.Optimized | fxopt.Ledger, name: str = "quantize-linear", **wanted: Any) -> list[Verdict]:
    ledger = result if isinstance(result, fxopt.Ledger) else result.ledger
    return list(ledger.select(pass_name=name, **wanted))


def op_types(result: fxopt.Optimized) -> list[str]:
    return [getattr(node.target, "op_type", str(node.target)) for node in result.graph.calls()]


def saved(result: fxopt.Optimized, folder: Path) -> onnx.ModelProto:
    result.save(folder / "saved.onnx")
    return onnx.load(folder / "saved.onnx")


# ---- nothing to do, nothing asked for


def test_no_passes(machine: Machine, tmp_path: Path) -> None:
    model = with_identity()
    result = optimized(model, passes=[])
    assert (result.report.outcome, result.report.why) == ("unchanged", "no passes were asked for")
    assert saved(result, tmp_path) == model
    assert not result.ledger.verdicts and result.report.before == result.report.after and result.unmet == ""


def test_without_data_nothing_lossy_is_done(machine: Machine) -> None:
    machine.seconds = per_operator(default=1)
    result = optimized(with_identity(), calibration=None)
    refused = rows(result)
    assert {row.node for row in refused} == {"fc1", "fc2"}
    assert {(row.outcome, row.reason) for row in refused} == {
        ("refused", "no data to measure the budget; give --calibration, or --calibration random"),
        ("refused", "16 inputs are fewer than one group of 32; try group=16"),
    }
    assert result.report.outcome == "optimized" and op_types(result) == ["Gemm", "Relu", "Gemm"]
    assert result.report.error is None


# ---- exact passes and the guard


def test_an_exact_result_is_kept_when_it_is_faster(machine: Machine, tmp_path: Path) -> None:
    machine.seconds = per_operator(default=1)
    result = optimized(with_identity(), passes=["remove-identities"])
    assert result.report.outcome == "optimized"
    assert result.report.measured is not None and result.report.measured.ratio == pytest.approx(4 / 3, rel=0.01)
    assert "measured 1.33x" in result.report.why
    assert [node.op_type for node in saved(result, tmp_path).graph.node] == ["Gemm", "Relu", "Gemm"]
    assert [row.outcome for row in rows(result, "remove-identities")] == ["applied"]
    x = batches()[0]
    assert torch.equal(result(x), fxopt.optimize(with_identity(), passes=[])(x))


def test_an_exact_result_that_is_slower_is_rolled_back(machine: Machine, tmp_path: Path) -> None:
    """On this machine the Identity makes the model faster."""
    machine.seconds = lambda op_type, weight: {"Gemm": 1e-2, "Identity": -5e-3}.get(op_type, 0.0)
    model = with_identity()
    result = optimized(model, passes=["remove-identities"])
    assert result.report.outcome == "nothing paid"
    assert re.fullmatch(r"measured 0\.75x \(0\.75 to 0\.75\): not surely faster", result.report.why)
    assert saved(result, tmp_path) == model
    (row,) = rows(result, "remove-identities")
    assert row.outcome == "rolled-back" and "not surely faster" in row.reason
    assert result.report.after == result.report.before


def test_nothing_found_to_do(machine: Machine, tmp_path: Path) -> None:
    result = optimized(mlp(), passes=["remove-identities"])
    assert (result.report.outcome, result.report.why) == ("nothing paid", "no pass found anything to do")
    assert saved(result, tmp_path) == mlp()


def test_force_skips_the_guard(machine: Machine) -> None:
    machine.seconds = lambda op_type, weight: {"Gemm": 1e-2, "Identity": -5e-3}.get(op_type, 0.0)
    result = optimized(with_identity(), passes=["remove-identities"], force=True)
    assert (result.report.outcome, result.report.why) == ("optimized", "not measured (--force)")
    assert "Identity" not in op_types(result) and result.report.measured is None


def test_the_sizes_that_were_given_are_those_that_are_timed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.seconds = per_operator(default=1)
    seen: list[tuple[int, ...]] = []
    original = OnnxExecutable.run

    def run(self: OnnxExecutable, inputs: Any) -> Any:
        seen.append(tuple(inputs[0].shape))
        return original(self, inputs)

    monkeypatch.setattr(OnnxExecutable, "run", run)
    optimized(with_identity(), calibration=None, input_shapes={"x": (7, 16)})
    assert set(seen) == {(7, 16)}


def test_a_model_that_cannot_be_measured_stays_as_it_is(machine: Machine, tmp_path: Path) -> None:
    model = with_identity()
    model.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    result = optimized(model, calibration=None)
    assert result.report.outcome == "nothing paid"
    assert result.report.why == "no input to measure with; give --calibration or example inputs, or --force"
    assert saved(result, tmp_path) == model
    assert not list(result.ledger.select(outcome="applied"))


def test_a_required_speed_up(machine: Machine) -> None:
    machine.seconds = per_operator(default=1)
    assert optimized(with_identity(), require_speedup=1.2).unmet == ""
    assert optimized(with_identity(), require_speedup=3).unmet == "a speed-up of 3 was required; measured 1.33"
    assert "nothing was measured" in optimized(mlp(), require_speedup=3, passes=[]).unmet


def test_a_required_pass(machine: Machine) -> None:
    machine.seconds = per_operator(default=1)
    assert optimized(with_identity(), require_passes=["remove_identities"]).unmet == ""
    assert optimized(mlp(), require_passes=["remove-identities"]).unmet == (
        "pass remove-identities was required and changed nothing"
    )


# ---- prices


@pytest.mark.parametrize("target", ["host", "a100"])
def test_a_small_linear_is_refused_by_its_price(target: str) -> None:
    result = optimized(mlp(), target, passes=["quantize-linear"], guard_seconds=0.2)
    refused = rows(result)
    assert {row.outcome for row in refused} == {"refused"} and {row.node for row in refused} == {"fc1", "fc2"}
    priced = [row for row in refused if "fp8" not in row.setting]
    pattern = r"does not pay: predicted [\d.e-]+ us, now [\d.e-]+ us \((launch|memory|compute)-bound\)"
    assert priced and all(re.fullmatch(pattern, row.reason) for row in priced)
    assert result.report.outcome == "nothing paid" and "does not pay" in result.report.why
    assert all(row.error is not None and row.error < 0.1 for row in priced)
    others = {row.reason for row in refused if row not in priced}
    assert others == ({"a100 has no fp8: compute capability 8.0, it begins with 8.9"} if target == "a100" else set())


def test_a_large_linear_is_accepted_on_a_gpu_by_prediction() -> None:
    result = fxopt.optimize(mlp(1024, 1024), "a100", calibration=batches(2, 128, 1024))
    applied = {row.node for row in rows(result, outcome="applied")}
    assert applied == {"fc1"}  # fc2 is [8, 1024]
    assert result.report.outcome == "optimized"
    assert re.match(r"predicted \d+\.\d\dx on a100, \+-50 %", result.report.why)
    assert result.report.measured is None and result.report.executed_on == "eager (reference)"
    assert result.report.error is not None and 0 < result.report.error.noise_to_signal < 0.02
    after, before = result.report.after.predicted, result.report.before.predicted
    assert after is not None and before is not None and after.seconds < before.seconds


def test_no_error_is_made_for_less_than_a_hundredth_of_the_time() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 8192), torch.nn.Linear(8192, 256))
    data = [torch.randn(512, 256) for _ in range(2)]
    found = fxopt.optimize(
        model.eval(), "a100", example_inputs=(data[0],), calibration=data, include="^linear$", passes=["quantize-linear"]
    )
    (undone,) = rows(found, outcome="rolled-back")
    wanted = r"predicted 1\.00x on a100, of which lossy changes give 1\.00\dx: too little, for the whole model"
    assert undone.node == "linear" and re.fullmatch(wanted, undone.reason)
    assert found.report.outcome == "nothing paid" and found.report.why.startswith(undone.reason)
    assert torch.equal(found(data[0]), model(data[0]))


# ---- lossy passes on this machine


def test_integers_that_pay_are_kept(machine: Machine, tmp_path: Path) -> None:
    machine.seconds = INTEGERS_PAY
    result = optimized(mlp(), passes=["quantize-linear{activations=dynamic}"])
    assert result.report.outcome == "optimized"
    assert {row.node for row in rows(result, outcome="applied")} == {"fc1", "fc2"}
    assert all("val" in node.meta for node in result.graph.nodes if node.op != "output")
    made = saved(result, tmp_path)
    assert [node.op_type for node in made.graph.node].count("MatMulIntegerToFloat") == 2
    assert {entry.key: entry.value for entry in made.metadata_props} == {
        "fxopt.version": fxopt.__version__, "fxopt.target": "made-up", "fxopt.passes": "quantize-linear",
        "fxopt.instruction_sets": "avx2", "fxopt.runtime": "cpu",
    }  # fmt: skip
    x = batches()[0]
    original = fxopt.optimize(mlp(), passes=[])(x)
    noise = (result(x) - original).square().sum() / (original - original.mean()).square().sum()
    assert 0 < noise < 0.02
    assert result.report.error is not None and result.report.error.samples == 4  # half of them


@pytest.mark.parametrize("budget", [1e-3, 2e-4, 6e-5, 1e-5, 1e-9, 0.0])
def test_what_is_kept_is_within_the_budget(machine: Machine, budget: float) -> None:
    machine.seconds = INTEGERS_PAY
    result = optimized(mlp(16, 64), passes=["quantize-linear{smooth=off}"], budget=budget)
    applied = rows(result, outcome="applied")
    measured = result.report.error
    if applied:
        assert measured is not None and 0 < measured.noise_to_signal <= budget
    else:
        assert result.report.outcome == "nothing paid" and result.report.error is None
    refused = rows(result, outcome="refused")
    assert all(
        re.search("exceeds what is left of the budget|over budget|gives more per error", row.reason) for row in refused
    )
    assert {row.node for row in (*applied, *refused)} == {"fc1", "fc2"}
    if budget <= 1e-5:
        assert not applied


def test_a_larger_budget_keeps_at_least_as_much(machine: Machine) -> None:
    machine.seconds = INTEGERS_PAY
    kept = [
        len(rows(optimized(mlp(16, 64), passes=["quantize-linear{smooth=off}"], budget=budget), outcome="applied"))
        for budget in (0.0, 1e-4, 3e-4, 1e-2)
    ]
    assert kept == sorted(kept) and kept[0] == 0 and kept[-1] == 2


def test_no_budget_takes_everything(machine: Machine) -> None:
    machine.seconds = INTEGERS_PAY
    result = optimized(mlp(), passes=[Coarse()], budget=None)
    assert len(rows(result, "coarse", outcome="applied")) == 2
    assert result.report.error is not None and result.report.error.noise_to_signal > 0.02
    assert not rows(optimized(mlp(), passes=[Coarse()], budget=0.02), "coarse", outcome="applied")


def test_the_budget_note_tells_what_was_measured(machine: Machine) -> None:
    machine.seconds = INTEGERS_PAY
    result = optimized(mlp(), passes=[Coarse()], budget=0.02)
    assert any(
        re.fullmatch(r"a plan with measured loss [\d.]+ exceeds the budget 0\.02; planned again with \d changes", note)
        for note in result.ledger.notes
    )


# ---- the user's metric


def test_the_metric_decides_instead_of_the_noise(machine: Machine) -> None:
    machine.seconds = INTEGERS_PAY
    calls: list[torch.Tensor] = []

    def steady(model: Callable[..., Any]) -> float:
        calls.append(model(batches()[0]))
        return 0.75

    result = optimized(mlp(), passes=[Coarse()], evaluate=steady, budget=0.0)
    assert len(rows(result, "coarse", outcome="applied")) == 2 and calls[0].shape == (4, 8)
    assert result.report.error is not None
    assert (result.report.error.metric_before, result.report.error.metric_after) == (0.75, 0.75)


def test_a_drop_of_the_metric_is_undone(machine: Machine) -> None:
    machine.seconds = INTEGERS_PAY
    right = fxopt.optimize(mlp(), passes=[])(batches()[0])

    def exact(model: Callable[..., Any]) -> float:
        return float(torch.allclose(model(batches()[0]), right, atol=1e-6))

    result = optimized(mlp(), passes=["quantize-linear"], evaluate=exact, budget=0.5)
    assert result.report.outcome == "nothing paid" and not rows(result, outcome="applied")
    assert any("measured loss 1 exceeds the budget 0.5" in note for note in result.ledger.notes)


@pytest.mark.parametrize("metric", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_no_number_is_never_within_the_budget(machine: Machine, metric: float) -> None:
    machine.seconds = INTEGERS_PAY
    answers = iter([1.0] + [metric] * 99)
    result = optimized(mlp(), passes=["quantize-linear"], evaluate=lambda model: next(answers), budget=0.5)
    if metric != float("inf"):
        assert result.report.outcome == "nothing paid" and not rows(result, outcome="applied")


# ---- plug-ins


@dataclass(frozen=True)
class Coarse(LossyPass):
    """Round the weights of every Gemm to few levels; says that this pays, and that its error is small."""

    levels: int = 2
    inserted: str = ""  # an operator that is put behind, for nothing
    rank: int | None = None

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        for node in graph.calls():
            if getattr(node.target, "op_type", "") == "Gemm":
                name = getattr(node.meta["onnx"], "name", "")
                refusal = ctx.excluded(name)
                shape = "x".join(map(str, graph.constant(node.args[1]).shape))  # type: ignore[union-attr]
                yield Candidate(self.name, node.name, name, Setting.of(self.name), refusal, f"coarse {shape}")

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[Any, ...]:
        return (graph.find(candidate.node).args[0],)  # type: ignore[union-attr]

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        return Estimate(1e-6, Cost(1e9, 1e3), Cost(1e6, 1e3), 10)

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        node = graph.find(candidate.node)
        assert node is not None
        weight = graph.constant(node.args[1])
        assert weight is not None
        scale = weight.abs().max() / self.levels
        codes = graph.add_constant(torch.round(weight / scale) * scale, "coarse")
        made = graph.call(
            node.target, (node.args[0], codes, *node.args[2:]), dict(node.kwargs), before=node, made_by=self.name
        )
        last = made
        if self.inserted:
            last = graph.call(OnnxOp("", self.inserted, 13), (made,), before=node, made_by=self.name)
        if self.rank is not None:
            axes = graph.add_constant(torch.tensor([0]), "axes")
            last = graph.call(OnnxOp("", "Unsqueeze", 13), (made, axes), before=node, made_by=self.name)
        graph.replace(node, last)


def test_a_lossy_pass_that_makes_the_model_slower_is_rolled_back(machine: Machine, tmp_path: Path) -> None:
    machine.seconds = per_operator(Gemm=1, Relu=1, Ceil=20)
    model = mlp()
    result = optimized(model, passes=[Coarse(inserted="Ceil")], budget=None)
    verdicts = rows(result, "coarse")
    assert [row.node for row in verdicts] == ["fc1", "fc2"] and {row.outcome for row in verdicts} == {"rolled-back"}
    assert all(re.search(r"measured .*0\.\d+x", row.reason) for row in verdicts)
    assert all(row.predicted_gain is not None and row.predicted_gain > 0 for row in verdicts)
    assert result.report.outcome == "nothing paid" and "x" in result.report.why
    assert saved(result, tmp_path) == model


def test_what_is_lost_by_a_lossy_pass_leaves_the_exact_result(machine: Machine) -> None:
    machine.seconds = per_operator(Gemm=1, Relu=1, Identity=1, Ceil=20)
    result = optimized(with_identity(), passes=[Coarse(inserted="Ceil")], budget=None)
    assert result.report.outcome == "optimized" and op_types(result) == ["Gemm", "Relu", "Gemm"]
    assert {row.outcome for row in rows(result, "coarse")} == {"rolled-back"}
    assert [row.outcome for row in rows(result, "remove-identities")] == ["applied"]
    assert result.report.error is None


def test_a_group_that_is_slow_alone_is_dropped_and_another_kept(machine: Machine) -> None:
    """Integers pay for fc1 [32, 16] only: its weight is stored as [16, 32]."""

    def seconds(op_type: str, weight: list[int]) -> float:
        return 1e-3 * (
            10 if op_type == "Gemm" else (1 if weight == [16, 32] else 90) if op_type == "MatMulIntegerToFloat" else 0
        )

    machine.seconds = seconds
    result = optimized(mlp(), passes=["quantize-linear{activations=dynamic,smooth=off}"])
    assert result.report.outcome == "optimized"
    assert result.report.measured is not None and result.report.measured.ratio == pytest.approx(20 / 11, rel=0.01)
    first, second = rows(result, node="fc1"), rows(result, node="fc2")
    assert [row.outcome for row in first] == ["applied"]
    assert [row.outcome for row in second] == ["rolled-back"]
    assert re.fullmatch(
        r"measured alone, linear_w8a8 8x32 runs at 0\.\d+x: slower than what it replaces", second[0].reason
    )
    assert "Gemm" in op_types(result)
    measured = result.report.error
    assert measured is not None and measured.noise_to_signal > 0


def cnn(first: int = 8, second: int = 6) -> onnx.ModelProto:
    """x [n, 3, 8, 8] -> Conv -> Relu -> Conv -> y."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.normal(size=(first, 3, 3, 3)).astype(np.float32) / 5,
        "w2": random.normal(size=(second, first, 3, 3)).astype(np.float32) / 8,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["y"], name="conv2", pads=[1, 1, 1, 1]),
    ]
    body = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", second, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def images(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("slow", [[8, 3, 3, 3], [6, 8, 3, 3]], ids=["conv1 with its relu", "conv2"])
def test_a_slow_group_of_convolutions_is_dropped(machine: Machine, slow: list[int]) -> None:
    """The integer form of one convolution is slow; weights are behind a DequantizeLinear there."""

    def seconds(op_type: str, weight: list[int]) -> float:
        if op_type == "DequantizeLinear" and weight:
            return 0.09 if weight == slow else -0.009
        return 0.01 if op_type == "Conv" else 0.0

    machine.seconds = seconds
    result = optimized(cnn(), calibration=images(), passes=["quantize-linear"])
    assert result.report.outcome == "optimized"
    outcomes = {row.node: row.outcome for row in rows(result) if row.outcome != "refused"}
    expected = {"conv1": "rolled-back", "conv2": "applied"}
    if slow == [6, 8, 3, 3]:
        expected = {"conv1": "applied", "conv2": "rolled-back"}
    assert outcomes == expected
    (dropped,) = rows(result, outcome="rolled-back")
    assert dropped.reason.startswith("measured alone, conv_w8a8 ")


def test_a_lossy_pass_that_changes_a_shape_is_caught(machine: Machine) -> None:
    with pytest.raises(
        VerificationError, match=r"output 'y' was float32\['4', '8'\] and became float32\['1', '4', '8'\]"
    ):
        optimized(mlp(), passes=[Coarse(rank=1)], budget=None, include="fc2")


def test_a_lossy_pass_that_fails_is_named(machine: Machine) -> None:
    @dataclass(frozen=True)
    class Broken(Coarse):
        def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
            raise ZeroDivisionError("by accident")

    with pytest.raises(fxopt.FxoptError, match="pass broken failed at 'fc1': ZeroDivisionError: by accident"):
        optimized(mlp(), passes=[Broken()], budget=None)


def test_an_exact_plug_in_runs_with_the_exact_passes(machine: Machine) -> None:
    @dataclass(frozen=True)
    class DoubleNegation(ExactPass):
        def run(self, graph: Graph, ctx: Context) -> int:
            node = graph.find("act")
            if node is None or node.args[0].target is not OnnxOp("", "Gemm", 13):  # type: ignore[union-attr]
                return 0
            inner = graph.call(OnnxOp("", "Neg", 13), (node.args[0],), before=node, made_by=self.name)
            node.args = (graph.call(OnnxOp("", "Neg", 13), (inner,), before=node, made_by=self.name),)
            return 1

    machine.seconds = lambda op_type, weight: {"Gemm": 1e-2, "Neg": -1e-3}.get(op_type, 0.0)
    result = optimized(mlp(), passes=[DoubleNegation()])
    assert op_types(result) == ["Gemm", "Neg", "Neg", "Relu", "Gemm"]
    assert "double-negation" in {run.name for run in result.report.pass_runs}


# ---- include and exclude


def test_exclude(machine: Machine) -> None:
    machine.seconds = INTEGERS_PAY
    result = optimized(mlp(), passes=["quantize-linear"], exclude="^fc1$")
    assert {row.node for row in rows(result, outcome="applied")} == {"fc2"}
    assert {row.reason for row in rows(result, node="fc1")} == {"excluded by --exclude ^fc1$"}


def test_include(machine: Machine) -> None:
    machine.seconds = INTEGERS_PAY
    result = optimized(mlp(), passes=["quantize-linear"], include="fc1")
    assert {row.node for row in rows(result, outcome="applied")} == {"fc1"}
    assert {row.reason for row in rows(result, node="fc2")} == {"not in --include fc1"}


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_names_nothing_is_an_error(machine: Machine, option: str) -> None:
    with pytest.raises(UnknownName, match=rf"no node matches --{option}.*'fc11'.*fc1"):
        optimized(mlp(), **{option: "fc11"})


# ---- size


def test_the_objective_size(machine: Machine, tmp_path: Path) -> None:
    """Slower is fine then; what must improve is the size."""
    machine.seconds = per_operator(MatMulInteger=90, Gemm=1)
    result = optimized(mlp(64, 256), calibration=batches(features=64), passes=["quantize-linear"], objective="size")
    assert result.report.outcome == "optimized" and result.report.objective == "size"
    assert result.report.after.size_bytes < 0.4 * result.report.before.size_bytes
    assert saved(result, tmp_path).ByteSize() < 0.5 * mlp(64, 256).ByteSize()


def test_the_objective_size_without_gain(machine: Machine, tmp_path: Path) -> None:
    """An Identity has no constants."""
    result = optimized(with_identity(), passes=["remove-identities"], objective="size")
    assert (result.report.outcome, result.report.why) == ("nothing paid", "the result is not smaller")
    assert saved(result, tmp_path) == with_identity()
    assert not list(result.ledger.select(outcome="applied"))


# ---- absent targets


def test_a_prediction_that_does_not_improve_is_undone(tmp_path: Path) -> None:
    """The pass says it pays, the whole model is predicted to be slower: the ledger may not say "applied"."""
    model = mlp(512, 512)
    result = fxopt.optimize(model, CHIP, calibration=batches(2, 4, 512), passes=[Coarse(inserted="Ceil")], budget=None)
    assert result.report.outcome == "nothing paid" and re.match(r"predicted 0\.\d+x on chip", result.report.why)
    assert {row.outcome for row in rows(result, "coarse")} == {"rolled-back"}
    assert all(
        re.fullmatch(r"predicted 0\.\d+x on chip, for the whole model", row.reason) for row in rows(result, "coarse")
    )
    assert saved(result, tmp_path) == model


def test_force_keeps_what_is_predicted_to_be_slower() -> None:
    result = fxopt.optimize(
        mlp(512, 512), CHIP, calibration=batches(2, 4, 512), passes=[Coarse(inserted="Ceil")], budget=None, force=True
    )
    assert result.report.outcome == "optimized" and "Ceil" in op_types(result)
    assert {row.outcome for row in rows(result, "coarse")} == {"applied"}


# ---- the report


def test_the_report_is_complete(machine: Machine) -> None:
    machine.seconds = INTEGERS_PAY
    result = optimized(with_identity())
    report = result.report
    assert {
        "exact passes",
        "candidates",
        "calibration",
        "estimates",
        "rewriting",
        "measuring the error",
        "guard",
    } <= set(report.stages)
    assert {run.name: run.changes for run in report.pass_runs}["remove-identities"] == 0 or any(
        run.name == "remove-identities" and run.changes == 1 for run in report.pass_runs
    )
    assert report.measured is not None and report.measured.bursts >= 5
    assert report.measured.low <= report.measured.ratio <= report.measured.high
    assert report.versions["fxopt"] == fxopt.__version__ and report.before.operators == 4
    assert report.executed_on.startswith("onnxruntime CPU")


def test_progress_is_told(machine: Machine) -> None:
    machine.seconds = INTEGERS_PAY
    told: list[tuple[str, int, int]] = []
    optimized(with_identity(), progress=lambda *state: told.append(state))
    assert {"exact passes", "calibrating", "estimating", "rewriting", "guard"} <= {name for name, _, _ in told}
    assert all(0 <= done <= total for _, done, total in told)


def test_dumps_of_all_pipelines_are_numbered_through(machine: Machine, tmp_path: Path) -> None:
    machine.seconds = INTEGERS_PAY
    optimized(with_identity(), dump=tmp_path / "dump")
    names = sorted(path.name for path in (tmp_path / "dump").glob("*.py"))
    assert names[:2] == ["00-input.py", "01-remove-identities.py"]
    assert [name[:2] for name in names] == [f"{index:02d}" for index in range(len(names))]


def test_explain_decides_like_optimize_and_measures_nothing(machine: Machine) -> None:
    machine.seconds = INTEGERS_PAY
    options: dict[str, Any] = {"calibration": batches(), "passes": ["quantize-linear"], "exclude": "fc1"}
    ledger = fxopt.explain(mlp(), HOST, **options)
    result = optimized(mlp(), **options)
    assert [(row.node, row.outcome, row.setting) for row in rows(ledger)] == [
        (row.node, row.outcome, row.setting) for row in rows(result)
    ]


def test_a_model_over_half_of_the_memory_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never loaded whole: one representative of each kind of change is timed, and the report says so."""
    monkeypatch.setenv("FXOPT_MEMORY", "1M")
    calibration = [{"x": torch.randn(2, 1024, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]
    result = fxopt.optimize(
        mlp(1024, 1024), "host", calibration=calibration, passes=["quantize-linear{bits=4,method=rtn}"], budget=None,
        guard_seconds=1.0, threads=1,
    )  # fmt: skip
    texts = [result.report.why, *result.ledger.notes, *(row.reason for row in rows(result))]
    assert any(re.search(r"sampled, \d of \d changes: the model exceeds half of the memory", text) for text in texts)
