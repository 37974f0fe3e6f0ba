"""One optimisation, from a graph and samples to a result with its proof: exact passes, plan, rewrite, budget, guard."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fxopt.backends.base import Backend, Executable
from fxopt.cost_model.roofline import GraphPrediction, predict, predict_graph
from fxopt.errors import FxoptError, PassError, Unsupported, VerificationError, unknown
from fxopt.groups import slow_groups
from fxopt.guard import Timing, measure
from fxopt.ir.error import OutputError, output_error
from fxopt.ir.graph import Graph, label
from fxopt.ir.interpreter import Evaluator
from fxopt.ir.ledger import Ledger, Refusal, Verdict
from fxopt.ir.shapes import infer
from fxopt.ir.target import Target
from fxopt.ir.verify import NumericCheck, check_output_types, output_types, synthetic_sample, verify_structure
from fxopt.passes.base import Candidate, Context, ExactPass, LossyPass, Pass
from fxopt.passes.manager import PassManager
from fxopt.passes.stats import Stats, collect
from fxopt.planner.plan import Plan, Price, plan
from fxopt.report.report import ErrorReport, Measurement, PassRun, Report, Summary

Progress = Callable[[str, int, int], None]
Sample = list[Any]
NO_DATA = Refusal("no data to measure the budget; give --calibration, or --calibration random")


@dataclass
class Request:
    """What the user asked for, resolved."""

    target: Target
    backend: Backend
    samples: list[Sample] = field(default_factory=list)
    passes: Sequence[Pass] | None = None
    evaluate: Callable[[Any], float] | None = None
    budget: float | None = 0.02
    objective: str = "latency"
    include: re.Pattern[str] | None = None
    exclude: re.Pattern[str] | None = None
    threads: int | None = None
    force: bool = False
    guard_seconds: float = 10.0
    dump: Path | None = None
    progress: Progress | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """The result of an optimisation."""

    graph: Graph
    executable: Executable
    report: Report
    ledger: Ledger


@dataclass
class _Lossy:
    """A rewritten graph with its plan and measured error."""

    graph: Graph
    executable: Executable
    plan: Plan
    error: ErrorReport
    loss: float  # what the budget limits


_Priced = tuple[list[Candidate], dict[Candidate, Price], dict[Candidate, LossyPass], Stats]


class Optimizer:
    """Runs one request; `baseline` is what came in, in the backend's plain form."""

    def __init__(self, graph: Graph, request: Request, baseline: Executable, evaluator: Evaluator | None) -> None:
        self.original = graph
        self.request = request
        self.baseline = baseline
        self.evaluator = evaluator
        self.ledger = Ledger()
        self.stages: dict[str, float] = {}
        self.pass_runs: list[PassRun] = []
        self.context = Context(
            request.target, self.ledger, request.backend, include=request.include, exclude=request.exclude
        )
        half = (len(request.samples) + 1) // 2
        self.calibration = request.samples[:half]
        self.verification = request.samples[half:] or request.samples
        self._references: list[list[Any]] | None = None
        self._metric_before: float | None = None
        self._remember: _Priced = ([], {}, {}, Stats())

    # ---- the flow

    def run(self) -> Outcome:
        """Exact passes, plan, rewrite, budget, guard."""
        request = self.request
        self._check_names(self.original)
        before = self._summary(self.original)
        if request.passes is not None and not request.passes:
            return self._finish(self.original, self.baseline, before, "unchanged", "no passes were asked for")
        exact = self._exact()
        lossy = self._lossy(exact)
        if not request.target.is_host:
            return self._decide_by_prediction(exact, lossy, before)
        return self._decide_by_measurement(exact, lossy, before)

    def explain(self) -> Ledger:
        """Plan and price only: nothing is rewritten lossily or measured."""
        self._check_names(self.original)
        if self.request.passes is not None and not self.request.passes:
            return self.ledger
        exact = self._exact()
        priced = self._candidates(exact)
        if priced is not None:
            candidates, prices, _, _ = priced
            self._record(plan(candidates, self.request.budget, prices, objective=self.request.objective), prices)
        return self.ledger

    def _exact(self) -> Graph:
        """The graph after the exact passes, verified."""
        from fxopt.passes.pipelines import exact_pipeline, spelling_pipeline

        wanted = {step.name: step for step in self.request.passes or () if isinstance(step, ExactPass)}
        usual = [wanted.pop(step.name, step) for step in exact_pipeline()]  # with the options that were given
        graph = self.original.copy()
        dumped = 0
        with self._stage("exact passes"):
            check = self._numeric_check()
            for steps in ([*usual, *wanted.values()], spelling_pipeline()):
                manager = PassManager(steps, dump=self.request.dump, dumped=dumped)
                manager.run(graph, self.context, check)
                dumped = manager.dumped
                self.pass_runs += [PassRun(run.name, run.changes, run.seconds) for run in manager.runs]
        for node in graph.nodes:
            node.meta.pop("stands_for", None)  # statistics are collected on this graph
        return graph

    def _numeric_check(self) -> NumericCheck | None:
        sample = self._any_sample()
        if sample is None:
            self.ledger.note("exact passes were verified by structure only: the input types are not fully known")
            return None
        try:
            return NumericCheck.of(self.original, sample, self.evaluator)
        except FxoptError:
            if self.request.samples:
                raise
        except Exception as error:
            if self.request.samples:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.ledger.note(f"exact passes were verified by structure only: a made-up sample does not run ({reason})")
            return None
        self.ledger.note("exact passes were verified by structure only: a made-up sample does not run")
        return None

    def _lossy(self, exact: Graph) -> _Lossy | None:
        """The best plan within the budget, applied; None when nothing is chosen."""
        priced = self._candidates(exact)
        return None if priced is None else self._within_budget(exact, *priced)

    def _candidates(self, exact: Graph) -> _Priced | None:
        """Candidates, prices, owners and statistics; None without data (every candidate is then refused)."""
        passes = self._lossy_passes()
        with self._stage("candidates"):
            offered = [(step, candidate) for step in passes for candidate in step.candidates(exact, self.context)]
        if not self.request.samples:
            for _, candidate in offered:
                self._refuse(candidate, candidate.refusal or NO_DATA)
            return None
        legal = [(step, candidate) for step, candidate in offered if candidate.refusal is None]
        with self._stage("calibration"):
            nodes = {node for step, candidate in legal for node in step.observed(exact, candidate)}
            stats = collect(exact, self.calibration, nodes, evaluator=self.evaluator, progress=self.request.progress)
        with self._stage("estimates"):
            candidates, prices = self._priced(exact, offered, stats)
        self._remember = candidates, prices, {candidate: step for step, candidate in offered}, stats
        return self._remember

    def _lossy_passes(self) -> list[LossyPass]:
        from fxopt.passes.pipelines import lossy_passes

        if self.request.passes is None:
            return lossy_passes()
        return [step for step in self.request.passes if isinstance(step, LossyPass)]

    def _check_names(self, graph: Graph) -> None:
        """`--include` and `--exclude` must name something."""
        for option, pattern in (("include", self.request.include), ("exclude", self.request.exclude)):
            if pattern is None:
                continue
            names = [label(node) for node in graph.calls()]
            if not any(pattern.search(name) for name in names):
                raise unknown(f"node (no node matches --{option})", pattern.pattern, names)

    def _priced(
        self, graph: Graph, offered: Sequence[tuple[LossyPass, Candidate]], stats: Stats
    ) -> tuple[list[Candidate], dict[Candidate, Price]]:
        candidates: list[Candidate] = []
        prices: dict[Candidate, Price] = {}
        target = self.request.target
        for index, (step, candidate) in enumerate(offered):
            if candidate.refusal is None and any(node not in stats for node in step.observed(graph, candidate)):
                candidate = _refused(candidate, Refusal("no calibration sample reaches it"))
            elif candidate.refusal is None:
                with _naming(step, candidate):
                    estimate = step.estimate(graph, candidate, stats)
                before, after = predict(estimate.before, target), predict(estimate.after, target)
                prices[candidate] = Price(before, after, estimate.error, estimate.saved_bytes)
            candidates.append(candidate)
            if self.request.progress is not None:
                self.request.progress("estimating", index + 1, len(offered))
        return candidates, prices

    def _within_budget(
        self,
        exact: Graph,
        candidates: list[Candidate],
        prices: dict[Candidate, Price],
        owner: dict[Candidate, LossyPass],
        stats: Stats,
    ) -> _Lossy | None:
        """Everything that pays first; while the measured loss exceeds the budget, a smaller plan."""
        budget = self.request.budget
        chosen = plan(candidates, None, prices, objective=self.request.objective)
        scale = 1.0
        for attempt in range(2 + math.ceil(math.log2(max(2, len(chosen.chosen))))):
            if not chosen.chosen:
                break
            lossy = self._applied(exact, chosen, owner, stats)
            if budget is None or lossy.loss <= budget:
                self._record(chosen, prices)
                return lossy
            lossy.executable.close()
            predicted = sum(prices[candidate].error for candidate in chosen.chosen)
            measured = lossy.loss / max(predicted, 1e-12)
            if not math.isfinite(measured):
                scale *= 4
            else:
                scale = max(scale * 1.25, measured) if attempt else measured
            chosen = plan(candidates, budget, prices, objective=self.request.objective, error_scale=scale)
            self.ledger.note(
                f"a plan with measured loss {lossy.loss:.3g} exceeds the budget {budget:g}; planned again with"
                f" {len(chosen.chosen)} changes"
            )
        over = tuple((candidate, Refusal("over budget")) for candidate in chosen.chosen)
        self._record(Plan((), (*chosen.refused, *over), 0.0, 0.0), prices)
        return None

    def _applied(self, exact: Graph, chosen: Plan, owner: dict[Candidate, LossyPass], stats: Stats) -> _Lossy:
        with self._stage("rewriting"):
            graph = exact.copy()
            for candidate in chosen.chosen:
                with _naming(owner[candidate], candidate):
                    owner[candidate].apply(graph, candidate, stats)
            graph.prune()
            self._verify(exact, graph, chosen)
            executable = self._compiled(graph)
        with self._stage("measuring the error"):
            error, loss = self._error(executable)
        return _Lossy(graph, executable, chosen, error, loss)

    def _verify(self, exact: Graph, graph: Graph, chosen: Plan) -> None:
        fresh = [node for node in graph.nodes if "val" not in node.meta]  # new constants too
        try:
            verify_structure(graph, fresh, exact.nodes)
            check_output_types(graph, output_types(exact))
        except VerificationError as error:
            names = sorted({candidate.pass_name for candidate in chosen.chosen})
            raise VerificationError(f"the changes of {', '.join(names)} broke the graph: {error}") from error

    # ---- errors

    def _error(self, executable: Executable) -> tuple[ErrorReport, float]:
        """The error report, and the loss that the budget limits."""
        if self._references is None:
            self._references = [self.baseline.run(sample) for sample in self.verification]
        results = [executable.run(sample) for sample in self.verification]
        found: OutputError = output_error(self._references, results)
        before = after = None
        loss = found.noise_to_signal
        if self.request.evaluate is not None:
            if self._metric_before is None:
                self._metric_before = float(self.request.evaluate(as_function(self.baseline)))
            before = self._metric_before
            after = float(self.request.evaluate(as_function(executable)))
            loss = before - after
        report = ErrorReport(
            found.noise_to_signal, found.relative_l2, found.cosine, before, after, len(self.verification)
        )
        return report, loss

    # ---- decisions

    def _decide_by_prediction(self, exact: Graph, lossy: _Lossy | None, before: Summary) -> Outcome:
        request = self.request
        graph = lossy.graph if lossy is not None else exact
        if lossy is None and not self._exact_changed():
            return self._finish(self.original, self.baseline, before, "nothing paid", self._why_nothing())
        after = self._summary(graph)
        assert before.predicted is not None and after.predicted is not None
        gain = before.predicted.seconds / max(after.predicted.seconds, 1e-12)
        why = f"predicted {gain:.2f}x on {request.target.name}"
        pays = gain >= 1.0
        if request.objective == "size":
            why = f"{why}, {after.size_bytes} bytes of constants instead of {before.size_bytes}"
            pays = after.size_bytes < before.size_bytes
        if not pays and not request.force:
            self._roll_back(None if lossy is None else lossy.plan.chosen, f"{why}, for the whole model")
            if lossy is None:
                return self._finish(self.original, self.baseline, before, "nothing paid", why)
            lossy.executable.close()
            return self._decide_by_prediction(exact, None, before)
        executable = lossy.executable if lossy is not None else self._compiled(exact)
        why = f"{why}, +-{100 * request.target.interval:.0f} % ({request.target.error})"
        return self._finish(graph, executable, before, "optimized", why, lossy.error if lossy else None)

    def _exact_changed(self) -> bool:
        return any(run.changes for run in self.pass_runs)

    def _compiled(self, graph: Graph) -> Executable:
        return self.request.backend.compile(graph, self.request.target, threads=self.request.threads)

    def _decide_by_measurement(self, exact: Graph, lossy: _Lossy | None, before: Summary) -> Outcome:
        request = self.request
        sample = self._timing_sample()
        if sample is None or request.force or request.objective != "latency":
            return self._without_guard(exact, lossy, before, sample)
        plain = self._compiled(exact) if self._exact_changed() else self.baseline
        share = request.guard_seconds / (2 if lossy is not None and plain is not self.baseline else 1)
        if lossy is not None:
            with self._stage("guard"):
                found = self._paying(lossy, plain, sample, exact, share)
            if found is not None and plain is not self.baseline:
                plain.close()
            if found is not None:
                lossy, timing = found
                return self._finish(
                    lossy.graph, lossy.executable, before, "optimized", _measured(timing), lossy.error, timing
                )
        if plain is self.baseline:
            return self._finish(self.original, self.baseline, before, "nothing paid", self._why_nothing())
        with self._stage("guard"):
            timing = measure(lambda: self.baseline.run(sample), lambda: plain.run(sample), share)
        if timing.low >= 1.0:
            return self._finish(exact, plain, before, "optimized", _measured(timing), None, timing)
        plain.close()
        why = f"{_measured(timing)}: not surely faster"
        self._roll_back(None, why)
        return self._finish(self.original, self.baseline, before, "nothing paid", why, timing=timing)

    def _paying(
        self, lossy: _Lossy, plain: Executable, sample: Sample, exact: Graph, seconds: float
    ) -> tuple[_Lossy, Timing] | None:
        """The lossy result if it is measured to be faster than the exact one and than what came in.

        While it is not, groups of changes that are slow by themselves are dropped.
        """
        deadline = time.perf_counter() + seconds * 2
        budget = self.request.budget
        while True:
            timing, rivals = self._against(lossy, plain, sample, seconds / 2)
            if all(rival.low >= 1.0 for rival in rivals):
                return lossy, timing
            chosen = lossy.plan.chosen
            dropped = slow_groups(exact, lossy.graph, chosen, self._representative, seconds / 2)
            kept = tuple(candidate for candidate in chosen if candidate.group not in dropped)
            lossy.executable.close()
            if not kept or len(kept) == len(chosen) or time.perf_counter() > deadline:
                worst = min(rivals, key=lambda rival: rival.low)
                self._roll_back(chosen, f"{_measured(worst)} for the whole model: not surely faster", dropped)
                return None
            self._roll_back([candidate for candidate in chosen if candidate.group in dropped], "", dropped)
            _, prices, owner, stats = self._remember
            error, gain = (sum(getattr(prices[candidate], name) for candidate in kept) for name in ("error", "gain"))
            lossy = self._applied(exact, Plan(kept, (), error, gain), owner, stats)
            if budget is not None and not lossy.loss <= budget:
                lossy.executable.close()
                self._roll_back(kept, f"over budget without the slow ones: measured loss {lossy.loss:.3g}")
                return None

    def _against(self, lossy: _Lossy, plain: Executable, sample: Sample, seconds: float) -> tuple[Timing, list[Timing]]:
        """The timing against what came in, and all timings: also that against the exact result, where there is one."""

        def run() -> object:
            return lossy.executable.run(sample)

        timing = measure(lambda: self.baseline.run(sample), run, seconds)
        if plain is self.baseline:
            return timing, [timing]
        return timing, [measure(lambda: plain.run(sample), run, seconds), timing]

    def _representative(self, graph: Graph, node_name: str) -> Callable[[], object] | None:
        """One candidate's operator alone, compiled, on a sample of its input (None when it cannot be cut out)."""
        from fxopt.groups import cut_out

        part = cut_out(graph, node_name, self._remember[3])
        if part is None:
            return None
        small, inputs = part
        executable = self._compiled(small)
        return lambda: executable.run(inputs)

    def _without_guard(self, exact: Graph, lossy: _Lossy | None, before: Summary, sample: Sample | None) -> Outcome:
        request = self.request
        if lossy is None and not self._exact_changed():
            return self._finish(self.original, self.baseline, before, "nothing paid", self._why_nothing())
        graph = lossy.graph if lossy is not None else exact
        reason = ""
        if sample is None and not request.force and request.objective == "latency":
            reason = "no input to measure with; give --calibration or example inputs, or --force"
        if request.objective == "size" and not request.force and graph.size_bytes() >= self.original.size_bytes():
            reason = "the result is not smaller"
        if reason:
            if lossy is not None:
                lossy.executable.close()
            self._roll_back(None, reason)
            return self._finish(self.original, self.baseline, before, "nothing paid", reason)
        executable = lossy.executable if lossy is not None else self._compiled(exact)
        timing = None
        if sample is not None and not request.force:
            timing = measure(
                lambda: self.baseline.run(sample), lambda: executable.run(sample), request.guard_seconds / 4
            )
        why = "not measured (--force)" if request.force else "smaller"
        return self._finish(graph, executable, before, "optimized", why, lossy.error if lossy else None, timing)

    def _any_sample(self) -> Sample | None:
        """The user's first one, or one that is made up; None when the inputs are not fully known."""
        if self.request.samples:
            return self.request.samples[0]
        return synthetic_sample(self.original.inputs, self.original.sizes)

    def _timing_sample(self) -> Sample | None:
        if self.request.samples:
            return self.request.samples[0]
        sample = self._any_sample()
        if sample is None or any(value.dtype not in (torch.float32, torch.float64) for value in sample):
            return None
        return sample

    def _why_nothing(self) -> str:
        reasons: dict[str, int] = {}
        for verdict in self.ledger.verdicts:
            if verdict.outcome in ("refused", "rolled-back"):
                reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
        if not reasons:
            return "no pass found anything to do"
        most = max(reasons, key=lambda reason: reasons[reason])
        return f"{most} ({reasons[most]} of {sum(reasons.values())} verdicts)"

    # ---- the ledger

    def _refuse(self, candidate: Candidate, reason: Refusal, error: float | None = None) -> None:
        self.ledger.add(
            Verdict(candidate.pass_name, candidate.anchor, "refused", str(reason), str(candidate.setting), error=error)
        )

    def _record(self, chosen: Plan, prices: dict[Candidate, Price]) -> None:
        for candidate in chosen.chosen:
            price = prices[candidate]
            self.ledger.add(
                Verdict(
                    candidate.pass_name,
                    candidate.anchor,
                    "applied",
                    f"predicted {price.before.seconds * 1e6:.3g} -> {price.after.seconds * 1e6:.3g} us",
                    str(candidate.setting),
                    predicted_gain=price.gain,
                    error=price.error,
                )
            )
        for candidate, reason in chosen.refused:
            self._refuse(candidate, reason, prices[candidate].error if candidate in prices else None)

    def _roll_back(self, gone: Sequence[Candidate] | None, reason: str, groups: dict[str, str] | None = None) -> None:
        """Turn "applied" into "rolled-back": of these candidates (those of a group with its own reason), or of all."""
        reasons = {
            (candidate.pass_name, candidate.anchor, str(candidate.setting)): (groups or {}).get(candidate.group, reason)
            for candidate in gone or ()
        }
        for index, verdict in enumerate(self.ledger.verdicts):
            key = (verdict.pass_name, verdict.node, verdict.setting)
            if verdict.outcome == "applied" and (gone is None or key in reasons):
                self.ledger.verdicts[index] = replace(
                    verdict, outcome="rolled-back", reason=reason if gone is None else reasons[key]
                )

    # ---- the report

    def _summary(self, graph: Graph) -> Summary:
        predicted: GraphPrediction = predict_graph(graph, self.request.target)
        counts: dict[str, int] = {}
        for node in graph.calls():
            name = getattr(node.target, "op_type", None) or str(node.target)
            counts[name] = counts.get(name, 0) + 1
        return Summary(sum(counts.values()), counts, graph.size_bytes(), int(predicted.macs), predicted.total)

    def _finish(
        self,
        graph: Graph,
        executable: Executable,
        before: Summary,
        outcome: Any,
        why: str,
        error: ErrorReport | None = None,
        timing: Timing | None = None,
    ) -> Outcome:
        request = self.request
        measured = None
        if timing is not None:
            threads = request.threads or request.target.cores
            measured = Measurement(
                self.baseline.executed_on, timing.baseline, timing.result, timing.ratio, timing.low, timing.high,
                timing.bursts, threads,
            )  # fmt: skip
        report = Report(
            target=request.target.name,
            backend=request.backend.name,
            executed_on=executable.executed_on,
            outcome=outcome,
            why=why,
            objective=request.objective,
            budget=request.budget,
            before=before,
            after=before if graph is self.original else self._summary(graph),
            measured=measured,
            error=error,
            pass_runs=self.pass_runs,
            stages=self.stages,
            versions=_versions(),
            warnings=[*request.warnings, *self.ledger.notes],
        )
        return Outcome(graph, executable, report, self.ledger)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        if self.request.progress is not None:
            self.request.progress(name, 0, 1)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begin


@contextmanager
def _naming(step: Pass, candidate: Candidate) -> Iterator[None]:
    """Errors inside name the pass and the node."""
    try:
        yield
    except Exception as error:
        raise PassError(f"pass {step.name} failed at {candidate.anchor!r}: {type(error).__name__}: {error}") from error


def as_function(executable: Executable) -> Callable[..., Any]:
    """The executable as a function of flat inputs; a single output is returned bare."""

    def call(*inputs: Any) -> Any:
        results = executable.run(inputs)
        return results[0] if len(results) == 1 else tuple(results)

    return call


def _measured(timing: Timing) -> str:
    return f"measured {timing.ratio:.2f}x ({timing.low:.2f} to {timing.high:.2f})"


def _refused(candidate: Candidate, reason: Refusal) -> Candidate:
    return Candidate(candidate.pass_name, candidate.node, candidate.anchor, candidate.setting, reason, candidate.group)


def _versions() -> dict[str, str]:
    import importlib.metadata

    import fxopt

    found = {"fxopt": fxopt.__version__}
    for name in ("torch", "onnx", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def bind_sizes(graph: Graph, sample: Sample | None, overrides: dict[str, int] | None = None) -> None:
    """Derive all types, with costs computed for the sizes of the sample."""
    sizes: dict[str, int] = {}
    if sample is not None:
        for spec, value in zip(graph.inputs, sample, strict=True):
            if not isinstance(value, torch.Tensor) or spec.shape is None:
                continue
            if value.dim() != len(spec.shape):
                raise Unsupported(f"input {spec} was given a value with {value.dim()} dimensions: {list(value.shape)}")
            for name, size in zip(spec.shape, value.shape, strict=True):
                if isinstance(name, str):
                    sizes.setdefault(name, size)
    infer(graph, {**sizes, **(overrides or {})})
