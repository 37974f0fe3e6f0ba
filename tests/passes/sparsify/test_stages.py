"""sparsify in the engine: planned before what quantises, under one budget, kept only where it buys something."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import fxopt
from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.onnxruntime.session import OnnxExecutable
from fxopt.errors import InvalidOption, VerificationError
from fxopt.ir.builder import constant_before
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Verdict
from fxopt.ir.masks import marks, stale
from fxopt.ir.ops.linear_sparse import linear_sparse
from fxopt.ir.target import SparseKernel
from fxopt.passes.base import Candidate, Context, ExactPass, LossyPass
from fxopt.passes.pipelines import stages
from fxopt.passes.quantize_embedding import QuantizeEmbedding
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.sparsify import Sparsify
from fxopt.passes.stats import Stats
from tests.passes.sparsify.models import linears, rows
from tests.test_engine import HOST, Machine

torch.set_num_threads(1)
SKIPS = dataclasses.replace(
    HOST, sparse_kernels=(SparseKernel("4x1", "float32", ((0.3, 1.5), (0.5, 2.0), (0.7, 3.0))),)
)  # fmt: skip
DENSE = dataclasses.replace(HOST, name="plain")


def calibration(count: int = 8) -> list[torch.Tensor]:
    return [sample[0] for sample in rows(count)]


def optimized(model: Any = None, target: Any = SKIPS, **options: Any) -> fxopt.Optimized:
    return fxopt.optimize(model or linears(), target, **{"calibration": calibration(), "budget": None, **options})


def verdicts(result: fxopt.Optimized, name: str = "sparsify", **wanted: Any) -> list[Verdict]:
    return list(result.ledger.select(pass_name=name, **wanted))


@pytest.fixture
def skipping(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime as if it had a kernel for blocks."""
    monkeypatch.setattr(
        OnnxRuntime, "skips_zeros", lambda self, target, dtype, pattern, shape=None: "" if dtype == "float32" else "no"
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine on which a float product takes what its weight has other than zeros, and an integer one a third."""
    made, original = Machine(), OnnxExecutable.run
    known: dict[Path, float] = {}
    made.zeros_count = True  # type: ignore[attr-defined]

    def seconds(path: Path) -> float:
        graph = onnx.load(path).graph
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        total = 0.0
        for node in graph.node:
            weight = next((arrays[name] for name in node.input if arrays.get(name, np.zeros(0)).ndim == 2), None)
            if weight is not None:
                is_float = weight.dtype == np.float32
                share = np.mean(weight != 0) if is_float or not made.zeros_count else 1.0  # type: ignore[attr-defined]
                total += 1e-2 * (share if is_float else share / 3)
        return 1e-5 + float(total)

    def run(self: OnnxExecutable, inputs: Any) -> Any:
        if self.path not in known:
            known[self.path] = seconds(self.path)
        made.now += known[self.path]
        return original(self, inputs)

    monkeypatch.setattr("fxopt.guard.time", made)
    monkeypatch.setattr(OnnxExecutable, "run", run)
    return made


# ---- stages


def test_stages_follow_what_passes_say() -> None:
    names = [[step.name for step in stage] for stage in stages([QuantizeLinear(), QuantizeEmbedding(), Sparsify()])]
    assert names == [["quantize-embedding", "sparsify"], ["quantize-linear"]]
    assert [len(stage) for stage in stages([QuantizeLinear(), QuantizeLinear(bits=4)])] == [2]
    assert stages([]) == []


def test_passes_that_wait_for_each_other() -> None:
    @dataclass(frozen=True)
    class One(LossyPass):
        after = ("other",)

    @dataclass(frozen=True)
    class Other(LossyPass):
        after = ("one",)

    with pytest.raises(InvalidOption, match=r"the passes \['one', 'other'\] must each come after another one of them"):
        stages([One(), Other()])


# ---- one stage


def test_zeros_that_pay_are_kept(machine: Machine, skipping: None) -> None:
    result = optimized(passes=["sparsify"])
    assert result.report.outcome == "optimized" and result.report.measured is not None
    assert result.report.measured.ratio == pytest.approx(3 / 1.6, rel=0.01)
    applied = verdicts(result, outcome="applied")
    assert [row.node for row in applied] == ["fc1_bias", "fc2"]
    assert {row.setting for row in applied} == {"sparsify{pattern=4x1,sparsity=0.7,method=sparsegpt}"}
    assert all(row.error is not None and row.error > 0 and row.predicted_gain for row in applied)
    assert list(marks(result.graph)) == ["fc1", "fc2"] and not stale(result.graph)


@pytest.mark.parametrize("budget", [0.5, 0.05, 1e-6])
def test_the_budget_chooses_the_share_of_zeros(machine: Machine, skipping: None, budget: float) -> None:
    result = optimized(passes=["sparsify"], budget=budget)
    if result.report.outcome == "optimized":
        assert result.report.error is not None and 0 < result.report.error.noise_to_signal <= budget
    else:
        assert not marks(result.graph)
    shares = [re.search(r"sparsity=([\d.]+)", row.setting) for row in verdicts(result, outcome="applied")]
    assert sum(float(found[1]) for found in shares if found) < 1.4 or budget == 0.5, "less than without a budget"


def test_what_nothing_skips_is_refused(machine: Machine) -> None:
    result = optimized(target=DENSE, passes=["sparsify-24"])
    assert result.report.outcome == "nothing paid" and not marks(result.graph)
    reasons = {row.reason for row in verdicts(result, outcome="refused")}
    assert any(reason.startswith("2:4 gives no time on plain: no x86 instruction skips zeros") for reason in reasons)
    assert "2:4 gives no time" in result.report.why


def test_statistics_that_do_not_do_refuse_the_layer_alone(machine: Machine, skipping: None) -> None:
    """The second layer's inputs are never anything but zero: it stays dense, the first one does not."""
    model = linears(b1=np.full(48, -1e3))
    result = optimized(model, passes=["sparsify"], budget=None)
    assert {row.node: row.outcome for row in verdicts(result) if "0.7" in row.setting and row.node == "fc2"} == {"fc2": "refused"}
    assert any("nothing tells which weights matter" in row.reason for row in verdicts(result, outcome="refused"))


def test_a_method_that_fails_on_one_layer_declines_it(
    machine: Machine, skipping: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fxopt.passes.sparsify as module

    def failing(weight: torch.Tensor, *rest: Any) -> Any:
        if weight.shape[0] == 40:
            raise ValueError("the second moments of the activations are not finite or not positive")
        return original(weight, *rest)

    original = module.sparsegpt
    monkeypatch.setattr(module, "sparsegpt", failing)
    result = optimized(passes=["sparsify{sparsity=0.7}"])
    (row,) = [row for row in verdicts(result) if row.node == "fc2"]
    assert (row.outcome, row.reason) == ("refused", "the second moments of the activations are not finite or not positive")
    assert [row.node for row in verdicts(result, outcome="applied")] == ["fc1_bias"]


def test_without_data_nothing_is_pruned(machine: Machine, skipping: None) -> None:
    result = optimized(calibration=None, budget=0.02, passes=["sparsify"])
    assert {row.outcome for row in verdicts(result)} == {"refused"} and not marks(result.graph)
    assert any(row.reason.startswith("no data to measure the budget") for row in verdicts(result))


# ---- two stages


def test_both_stages_in_one_call_are_kept_where_both_pay(machine: Machine, skipping: None) -> None:
    machine.zeros_count = False  # type: ignore[attr-defined]  # 8-bit kernels skip zeros here, too
    result = optimized(passes=["sparsify{sparsity=0.7}", "quantize-linear{activations=static,smooth=off}"])
    assert {row.node for row in verdicts(result, outcome="applied")} == {"fc1_bias", "fc2"}
    assert {row.node for row in verdicts(result, "quantize-linear", outcome="applied")} == {"fc1_bias", "fc2", "head"}
    assert list(marks(result.graph)) == ["fc1_bias", "fc2"] and not stale(result.graph)
    assert any("linear_w8a8" in str(node.target) for node in result.graph.calls())


def test_zeros_that_buy_nothing_are_undone(machine: Machine, skipping: None) -> None:
    """In 8 bits this machine multiplies zeros: the same without them is as fast."""
    result = optimized(passes=["sparsify{sparsity=0.7}", "quantize-linear{activations=static,smooth=off}"])
    undone = [row for row in verdicts(result) if row.node in ("fc1_bias", "fc2")]
    assert {row.outcome for row in undone} == {"rolled-back"}
    assert all(re.match(r"it buys nothing: measured 1\.00x .* over the same without it: not surely faster", row.reason) for row in undone)
    kept = verdicts(result, "quantize-linear")
    assert {row.node for row in kept if row.outcome == "applied"} == {"fc1_bias", "fc2", "head"}
    assert len([row for row in kept if row.outcome == "applied"]) == 3, "each verdict once"
    assert not marks(result.graph) and result.report.outcome == "optimized"
    plain = optimized(passes=["quantize-linear{activations=static,smooth=off}"])
    x = calibration()[0]
    assert torch.equal(result(x), plain(x)), "what goes out is what the later stage alone makes"


@pytest.mark.slow
def test_the_order_of_the_names_does_not_matter(machine: Machine, skipping: None) -> None:
    machine.zeros_count = False  # type: ignore[attr-defined]
    names = ["sparsify{sparsity=0.7}", "quantize-linear{activations=static,smooth=off}"]
    x = calibration()[0]
    assert torch.equal(optimized(passes=names)(x), optimized(passes=names[::-1])(x))


@pytest.mark.slow
def test_a_budget_is_shared(machine: Machine, skipping: None) -> None:
    machine.zeros_count = False  # type: ignore[attr-defined]
    for budget in (0.4, 0.05):
        result = optimized(passes=["sparsify", "quantize-linear{activations=static,smooth=off}"], budget=budget)
        assert result.report.error is not None and result.report.error.noise_to_signal <= budget
        assert verdicts(result, "quantize-linear", outcome="applied"), "the early stage leaves something"


def test_nothing_of_the_early_stage_leaves_the_later_one_alone(machine: Machine, skipping: None) -> None:
    names = ["sparsify{pattern=16x1,sparsity=0.9}", "quantize-linear{activations=static,smooth=off}"]
    result = optimized(passes=names)
    assert not verdicts(result, outcome="applied") and not verdicts(result, outcome="rolled-back")
    assert len(verdicts(result, "quantize-linear", outcome="applied")) == 3


def test_a_gpu_is_decided_by_prediction() -> None:
    """In half precision 2:4 is predicted to pay, and a later stage is compared without it."""
    half = [value.half() for value in rows(1, 64, n=3072)[0]]
    options = {"calibration": half * 2, "budget": None}
    alone = fxopt.optimize(linears(64, 128, np.float16), "a100", passes=["sparsify-24"], **options)
    assert [row.node for row in verdicts(alone, outcome="applied")] == ["fc1_bias"]
    assert next(alone.graph.calls()).target is linear_sparse.target
    assert re.match(r"predicted 1\.\d\dx on a100, \+-50 %", alone.report.why)
    after, before = alone.report.after.predicted, alone.report.before.predicted
    assert after is not None and before is not None and 1.0 < before.seconds / after.seconds < 1.38
    few = [value[:1] for value in half]
    one = fxopt.optimize(linears(64, 128, np.float16), "a100", passes=["sparsify-24"], calibration=few * 2, budget=None)
    assert one.report.outcome == "nothing paid" and "too few rows at a time, 1: 2:4" in one.report.why


# ---- bytes


def test_size_stores_weights_without_zeros(machine: Machine, tmp_path: Path) -> None:
    result = optimized(target=DENSE, passes=["sparsify-24"], objective="size")
    assert result.report.outcome == "optimized"
    packed = {row.node: row.reason for row in verdicts(result, "pack-sparse", outcome="applied")}
    gone = "removed; the result is the same"  # the product, whose bias the packed form takes
    assert packed == {"fc1": gone, "fc1_bias": "exact rewrite", "fc2": "exact rewrite"}
    assert all(row.reason.startswith("saves ") for row in verdicts(result, outcome="applied"))
    assert result.report.after.size_bytes < 0.65 * result.report.before.size_bytes
    result.save(tmp_path / "small.onnx")
    again = fxopt.load(tmp_path / "small.onnx")
    x = calibration()[0]
    assert torch.equal(again(x), result(x)) and len(marks(again.graph)) == 2 and not stale(again.graph)
    result.save(tmp_path / "folder")
    assert len(marks(fxopt.load(tmp_path / "folder").graph)) == 2


def test_zeros_that_save_nothing_behind_codes_are_undone(machine: Machine) -> None:
    names = ["sparsify{pattern=2:4}", "quantize-linear{activations=static,smooth=off}"]
    result = optimized(target=DENSE, passes=names, objective="size")
    undone = [row for row in verdicts(result) if row.node in ("fc1_bias", "fc2")]
    assert {row.outcome for row in undone} == {"rolled-back"}
    assert all(re.fullmatch(r"it buys nothing: (\d+) bytes of constants with it, \1 without it", row.reason) for row in undone)
    assert len(verdicts(result, "quantize-linear", outcome="applied")) == 3 and not marks(result.graph)


def test_unstructured_zeros_are_what_bytes_want(machine: Machine) -> None:
    result = optimized(target=DENSE, passes=["sparsify"], objective="size", budget=0.2)
    settings = {row.setting for row in verdicts(result, outcome="applied")}
    assert settings and all("pattern=1x1" in setting for setting in settings)


# ---- masks in the engine


@dataclass(frozen=True)
class Fill(ExactPass):
    """Fill the zeros of fc2, behind the plan."""

    def run(self, graph: Graph, ctx: Context) -> int:
        """In place of the tidying passes."""
        node = graph.find("fc2")
        if node is None or "sparsity" not in node.meta:
            return 0
        old: Any = node.args[1]
        weight = graph.constant(old)
        assert weight is not None
        node.replace_input_with(old, constant_before(graph, node, weight + 1e-3, "filled", ("fc2",)))
        return 1


def test_a_pass_behind_the_plan_may_not_fill_zeros(
    machine: Machine, skipping: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxopt.rewriting.tidying_pipeline", lambda: [Fill()])
    with pytest.raises(VerificationError, match="pass fill broke the graph: node 'fc2' lost zeros of its weight: 0.0% of its 4x1"):
        optimized(passes=["sparsify{sparsity=0.7}"])


def test_a_candidate_may_not_fill_zeros(machine: Machine, skipping: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., None] = Sparsify.apply

    def apply(self: Sparsify, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        original(self, graph, candidate, stats)
        Fill().run(graph, Context(DENSE))

    monkeypatch.setattr(Sparsify, "apply", apply)
    with pytest.raises(VerificationError, match="the changes of sparsify broke the graph: node 'fc2' lost zeros"):
        optimized(passes=["sparsify{sparsity=0.7}"])


# ---- explain


def test_explain_says_why_and_why_not(skipping: None) -> None:
    ledger = fxopt.explain(linears(), SKIPS, calibration=calibration(), passes=["sparsify", "quantize-linear"], budget=1.0)
    found = {(row.node, row.outcome) for row in ledger.select(pass_name="sparsify")}
    assert ("fc1_bias", "applied") in found and ("head", "refused") in found
    assert {row.node for row in ledger.select(pass_name="quantize-linear")} == {"fc1_bias", "fc2", "head"}


def test_explain_on_the_command_line(cli: Any, tmp_path: Path) -> None:
    """A pass that is not among the usual ones is asked when it is named."""
    onnx.save(linears(), tmp_path / "model.onnx")
    ran = cli("explain", tmp_path / "model.onnx", "--pass", "sparsify-24", "--calibration", "random", "--input-shape", "x:8,32")
    assert ran.code == 0 and "2:4 gives no time on host" in ran.text and "heads stay dense" in ran.text
    listed = cli("passes")
    assert "sparsify-24" in listed.text and "Short for sparsify{pattern=2:4}." in listed.text
    wrong = cli("explain", tmp_path / "model.onnx", "--pass", "sparsify-25")
    assert wrong.code == 2 and "did you mean 'sparsify-24'" in wrong.text
