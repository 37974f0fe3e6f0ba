"""One optimisation, from a graph and samples to a result with its proof: exact passes, plan, rewrite, budget, guard.

Converting passes, where the user asked for some, come first; error and time are still those against what came in.

Longer than most files here: it is the one place where the order of an optimisation can be read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx

from fxopt.backends.base import Executable
from fxopt.budget import within_budget
from fxopt.cost_model.roofline import predict, predict_graph
from fxopt.decisions import Decision
from fxopt.elsewhere import fastest
from fxopt.errors import FxoptError, PassError, VerificationError, unknown
from fxopt.guard import Timing
from fxopt.inputs import bind_sizes
from fxopt.ir.error import OutputError, output_error
from fxopt.ir.graph import Graph, label
from fxopt.ir.interpreter import Evaluator
from fxopt.ir.ledger import Ledger, Refusal
from fxopt.ir.memory import is_large, limit, spilled
from fxopt.ir.target import Cost, Prediction
from fxopt.ir.verify import NumericCheck, check_output_types, output_types, synthetic_sample, verify_structure
from fxopt.passes.base import Candidate, Context, ConvertingPass, ExactPass, LossyPass, Pass
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import tidying_pipeline
from fxopt.passes.sequential import SequentialRun
from fxopt.passes.stats import Stats, collect
from fxopt.planner.plan import Plan, Price, pays, plan
from fxopt.report.report import ErrorReport, Measurement, PassRun, Report, Summary
from fxopt.report.summary import summary, versions
from fxopt.request import Lossy, Outcome, Request, Sample
from fxopt.verdicts import record, refuse, roll_back

_QUANTISES = 13  # the opset since which DequantizeLinear takes scales per channel
NO_DATA = Refusal("no data to measure the budget; give --calibration, or --calibration random")


_Priced = tuple[list[Candidate], dict[Candidate, Price], dict[Candidate, LossyPass], Stats]


class Optimizer:
    """Runs one request; `baseline` is what came in, in the backend's plain form."""

    def __init__(self, graph: Graph, request: Request, baseline: Executable, evaluator: Evaluator | None) -> None:
        self.original = graph
        self.start = graph  # what exact passes may not change: the original, or what converting passes made of it
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
        self.priced: _Priced = ([], {}, {}, Stats())

    # ---- the flow

    def run(self) -> Outcome:
        """Exact passes, plan, rewrite, budget, guard."""
        request = self.request
        self._check_names(self.original)
        before = self.summary(self.original)
        if request.passes is not None and not request.passes:
            return self.finish(self.original, self.baseline, before, "unchanged", "no passes were asked for")
        exact = self._exact()
        lossy = self._lossy(exact)
        if not request.target.is_host:
            return Decision(self).by_prediction(exact, lossy, before)
        return fastest(self, Decision(self).by_measurement(exact, lossy, before))

    def explain(self) -> Ledger:
        """Plan and price only: nothing is rewritten lossily or measured."""
        self._check_names(self.original)
        if self.request.passes is not None and not self.request.passes:
            return self.ledger
        exact = self._exact()
        priced = self._candidates(exact)
        if priced is not None:
            candidates, prices, _, _ = priced
            record(self.ledger, plan(candidates, self.request.budget, prices, objective=self.request.objective), prices)
        return self.ledger

    def _exact(self) -> Graph:
        """The graph after the exact passes, verified."""
        from fxopt.passes.pipelines import exact_pipeline, spelling_pipeline

        wanted = {step.name: step for step in self.request.passes or () if isinstance(step, ExactPass)}
        usual = [wanted.pop(step.name, step) for step in exact_pipeline()]  # with the options that were given
        self.start, dumped = self._converted()
        graph = self._modern(self.start.copy())
        with self.stage("exact passes"):
            check = self._numeric_check()
            for steps in ([*usual, *wanted.values()], spelling_pipeline()):
                graph = self._at_opset(graph, max(step.opset(graph, self.context) for step in steps))
                manager = PassManager(steps, dump=self.request.dump, dumped=dumped)
                manager.run(graph, self.context, check)
                dumped = manager.dumped
                self.pass_runs += [PassRun(run.name, run.changes, run.seconds) for run in manager.runs]
        for node in graph.nodes:
            node.meta.pop("stands_for", None)  # statistics are collected on this graph
        return graph

    def _converted(self) -> tuple[Graph, int]:
        """The graph after the converting passes that were asked for, and how many text forms were written of it."""
        steps = [step for step in self.request.passes or () if isinstance(step, ConvertingPass)]
        if not steps:
            return self.original, 0
        graph = self.original.copy()
        if 8 * graph.size_bytes() > limit() // 2:  # 4-bit codes as float32
            graph.store = spilled
        with self.stage("converting passes"):
            manager = PassManager(steps, dump=self.request.dump)
            changes = manager.run(graph, self.context)
            self.pass_runs += [PassRun(run.name, run.changes, run.seconds) for run in manager.runs]
        if not changes:
            return self.original, manager.dumped
        names = ", ".join(step.name for step in steps)
        self.ledger.note(f"the model was converted by {names}; error and time are measured against it as it came in")
        return graph, manager.dumped

    @property
    def is_converted(self) -> bool:
        """Whether a converting pass changed what the model computes."""
        return self.start is not self.original

    def _modern(self, graph: Graph) -> Graph:
        """The graph at an opset that has per-channel quantisation, when lossy passes may need it."""
        if not self.request.samples or not self._lossy_passes():
            return graph
        return self._at_opset(graph, _QUANTISES)

    def _at_opset(self, graph: Graph, wanted: int) -> Graph:
        """The graph of an ONNX model at the wanted version of the standard or a later one, if possible."""
        opset = 0 if graph.model is None else graph.model.opsets.get("", 0)
        sample = self.any_sample()
        if not 0 < opset < wanted or sample is None or is_large(graph):
            return graph
        from fxopt.frontends.convert_opset import convert_graph

        try:
            made = convert_graph(graph, wanted, self.ledger)
        except FxoptError as error:
            self.ledger.note(f"the model stays at opset {opset}: {error}")
            return graph
        bind_sizes(made, sample, self.original.sizes)
        return made

    def _numeric_check(self) -> NumericCheck | None:
        sample = self.any_sample()
        if sample is None:
            self.ledger.note("exact passes were verified by structure only: the input types are not fully known")
            return None
        try:
            return NumericCheck.of(self.start, sample, self.evaluator)
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

    def _lossy(self, exact: Graph) -> Lossy | None:
        """The best plan within the budget, applied; None when nothing is chosen."""
        priced = self._candidates(exact)
        found = None if priced is None else within_budget(self, exact, *priced)
        return self._conversion(exact) if found is None and self.is_converted else found

    def _conversion(self, exact: Graph) -> Lossy | None:
        """What converting passes made, with nothing else done; None when that is not within the budget."""
        budget, nothing_else = self.request.budget, Plan((), (), 0.0, 0.0)
        if not self.request.samples:
            if budget is None:
                return Lossy(exact, self.compiled(exact), nothing_else, None, math.nan)
            roll_back(self.ledger, None, f"{NO_DATA}, or --budget none")
            return None
        found = self.measured(exact, nothing_else)
        if budget is None or found.loss <= budget:
            return found
        found.executable.close()
        roll_back(self.ledger, None, f"over budget: measured loss {found.loss:.3g} against the model that came in")
        return None

    def _candidates(self, exact: Graph) -> _Priced | None:
        """Candidates, prices, owners and statistics; None without data (every candidate is then refused)."""
        passes = self._lossy_passes()
        with self.stage("candidates"):
            offered = [(step, candidate) for step in passes for candidate in step.candidates(exact, self.context)]
        if not self.request.samples:
            for candidate in dict.fromkeys(candidate for _, candidate in offered):
                refuse(self.ledger, candidate, candidate.refusal or NO_DATA)
            return None
        unpaid = self._unpaid(exact, offered)
        legal = [(step, item) for step, item in offered if item.refusal is None and item not in unpaid]
        with self.stage("calibration"):
            nodes = {node for step, candidate in legal for node in step.observed(exact, candidate)}
            counted = {node for step, candidate in legal for node in step.clipped(exact, candidate)}
            stats = collect(
                exact, self.calibration, nodes, evaluator=self.evaluator, progress=self.request.progress,
                histograms=counted, state=self.request.resume,
            )  # fmt: skip
        with self.stage("estimates"):
            candidates, prices = self._priced(exact, offered, unpaid, stats)
        self.priced = candidates, prices, {candidate: step for step, candidate in offered}, stats
        return self.priced

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

    def _unpaid(self, graph: Graph, offered: Sequence[tuple[LossyPass, Candidate]]) -> dict[Candidate, Price]:
        """Candidates that are not faster by their work alone: neither calibrated nor estimated."""
        found: dict[Candidate, Price] = {}
        if self.request.objective != "latency":
            return found
        for step, candidate in offered:
            work = step.work(graph, candidate) if candidate.refusal is None else None
            if work is not None:
                before, after = map(self.predicted, work)
                price = Price(before, after, math.nan)
                if not pays(price, self.request.objective):
                    found[candidate] = price
        return found

    def _priced(
        self,
        graph: Graph,
        offered: Sequence[tuple[LossyPass, Candidate]],
        unpaid: dict[Candidate, Price],
        stats: Stats,
    ) -> tuple[list[Candidate], dict[Candidate, Price]]:
        candidates: list[Candidate] = []
        prices: dict[Candidate, Price] = dict(unpaid)
        for index, (step, candidate) in enumerate(offered):
            if candidate in unpaid:
                pass
            elif candidate.refusal is None and any(node not in stats for node in step.observed(graph, candidate)):
                candidate = _refused(candidate, Refusal("no calibration sample reaches it"))
            elif candidate.refusal is None:
                with _naming(step, candidate):
                    estimate = step.estimate(graph, candidate, stats)
                before, after = self.predicted(estimate.before), self.predicted(estimate.after)
                prices[candidate] = Price(before, after, estimate.error, estimate.saved_bytes)
            candidates.append(candidate)
            if self.request.progress is not None:
                self.request.progress("estimating", index + 1, len(offered))
        return candidates, prices

    def applied(self, exact: Graph, chosen: Plan, owner: dict[Candidate, LossyPass], stats: Stats) -> Lossy:
        with self.stage("rewriting"):
            graph = exact.copy()
            graph.store = spilled if is_large(exact) else None
            self.apply(graph, chosen.chosen, owner, stats)
            for tidy in tidying_pipeline():
                tidy.run(graph, self.context)
            graph.prune()
            self._verify(exact, graph, chosen)
        return self.measured(graph, chosen)

    def measured(self, graph: Graph, chosen: Plan) -> Lossy:
        """A rewritten graph, compiled, with its error."""
        with self.stage("rewriting"):
            executable = self.compiled(graph)
        with self.stage("measuring the error"):
            error, loss = self.measured_error(executable)
        return Lossy(graph, executable, chosen, error, loss)

    def apply(self, graph: Graph, chosen: Sequence[Candidate], owner: dict[Candidate, LossyPass], stats: Stats) -> None:
        """Apply the candidates; those that want second moments come in the order of the graph, the others before."""
        later: list[Candidate] = []
        for candidate in chosen:
            with _naming(owner[candidate], candidate):
                if owner[candidate].moments(graph, candidate) is None:
                    owner[candidate].apply(graph, candidate, stats)
                else:
                    later.append(candidate)
        if not later:
            return
        place: dict[fx.Node | None, int] = {node: index for index, node in enumerate(graph.nodes)}
        later.sort(key=lambda candidate: place[owner[candidate].moments(graph, candidate)])
        walk = SequentialRun(graph, self.calibration, self.evaluator)
        for done, candidate in enumerate(later):
            step = owner[candidate]
            with _naming(step, candidate):
                node = step.moments(graph, candidate)
                assert node is not None
                stats.moments = {node.name: walk.moments(node, step.moment_rows(graph, candidate))}
                step.apply(graph, candidate, stats)
            if self.request.progress is not None:
                self.request.progress("rewriting", done + 1, len(later))
        stats.moments = {}
        for note in stats.notes:
            self.ledger.note(note)

    def _verify(self, exact: Graph, graph: Graph, chosen: Plan) -> None:
        fresh = [node for node in graph.nodes if "val" not in node.meta]  # new constants too
        try:
            verify_structure(graph, fresh, exact.nodes)
            check_output_types(graph, output_types(exact))
        except VerificationError as error:
            names = sorted({candidate.pass_name for candidate in chosen.chosen})
            raise VerificationError(f"the changes of {', '.join(names)} broke the graph: {error}") from error

    # ---- errors

    def measured_error(self, executable: Executable) -> tuple[ErrorReport, float]:
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

    # ---- what decisions need

    def exact_changed(self) -> bool:
        """Whether exact passes alone changed something: what converting passes made is judged like a lossy result."""
        return not self.is_converted and any(run.changes for run in self.pass_runs)

    def compiled(self, graph: Graph) -> Executable:
        """The graph, ready to run in the backend."""
        return self.request.backend.compile(graph, self.request.target, threads=self.request.threads)

    def any_sample(self) -> Sample | None:
        """The user's first one, or one that is made up; None when the inputs are not fully known."""
        if self.request.samples:
            return self.request.samples[0]
        return synthetic_sample(self.original.inputs, self.original.sizes)

    def predicted(self, cost: Cost) -> Prediction:
        """The time of one operator: by the backend's own model, where it has one, else by the roofline."""
        target = self.request.target
        return self.request.backend.predicted(cost, target) or predict(cost, target)

    def summary(self, graph: Graph) -> Summary:
        """The model's figures, with its predicted time on the target."""
        predicted = predict_graph(graph, self.request.target, self.request.backend.predicted)
        return summary(graph, int(predicted.macs), predicted.total)

    def finish(
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
        with self.stage("compiling"):
            for verdict in executable.verdicts():
                self.ledger.add(verdict)
            for note in executable.notes():
                self.ledger.note(note)
        report = Report(
            target=request.target.name,
            backend=request.backend.name,
            executed_on=executable.executed_on,
            outcome=outcome,
            why=why,
            objective=request.objective,
            budget=request.budget,
            before=before,
            after=before if graph is self.original else self.summary(graph),
            measured=None if timing is None else self.measurement(timing),
            error=error,
            pass_runs=self.pass_runs,
            stages=self.stages,
            versions=versions(),
            warnings=[*request.warnings, *self.ledger.notes],
            instruction_sets=sorted(request.target.features),
            runtime=executable.runtime,
        )
        return Outcome(graph, executable, report, self.ledger)

    def measurement(self, timing: Timing) -> Measurement:
        """A timing against the baseline, for the report."""
        threads = self.request.threads or self.request.target.cores
        return Measurement(
            self.baseline.executed_on, timing.baseline, timing.result, timing.ratio, timing.low, timing.high,
            timing.bursts, threads,
        )  # fmt: skip

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
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


def _refused(candidate: Candidate, reason: Refusal) -> Candidate:
    return Candidate(candidate.pass_name, candidate.node, candidate.anchor, candidate.setting, reason, candidate.group)
