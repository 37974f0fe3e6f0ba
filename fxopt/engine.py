"""One optimisation, from a graph and samples to a result with its proof: exact passes, plan, rewrite, budget, guard.

Converting passes, where the user asked for some, come first; error and time are still those against what came in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fxopt.backends.base import Executable
from fxopt.cost_model.roofline import predict, predict_graph
from fxopt.decisions import Decision
from fxopt.elsewhere import fastest
from fxopt.errors import FxoptError, InvalidInput, InvalidOption, unknown
from fxopt.frontends.comparison import first_line
from fxopt.guard import Timing
from fxopt.ir.error import OutputError, output_error
from fxopt.ir.graph import Graph, label
from fxopt.ir.interpreter import Evaluator
from fxopt.ir.ledger import Ledger
from fxopt.ir.memory import limit, spilled
from fxopt.ir.shapes import infer, update
from fxopt.ir.target import Cost, Prediction
from fxopt.ir.verify import NumericCheck, synthetic_sample
from fxopt.offers import NO_DATA, offers
from fxopt.passes.base import Context, ConvertingPass, ExactPass
from fxopt.passes.manager import PassManager
from fxopt.planner.plan import Plan, plan
from fxopt.report.report import ErrorReport, Measurement, PassRun, Report, Summary
from fxopt.report.summary import summary, versions
from fxopt.request import Lossy, Outcome, Request, Sample
from fxopt.stages import planned, steps_of
from fxopt.verdicts import record, roll_back

_QUANTISES = 13  # the opset since which DequantizeLinear takes scales per channel


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
            request.target, self.ledger, request.backend, include=request.include, exclude=request.exclude,
            objective=request.objective, custom_ops=request.custom_ops,
        )  # fmt: skip
        half = (len(request.samples) + 1) // 2
        self.calibration = request.samples[:half]
        self.verification = request.samples[half:] or request.samples
        self._references: list[list[Any]] | None = None
        self._metric_before: float | None = None
        self.first_row = 0  # of the ledger, that is about lossy passes
        self.state = request.resume  # of the first calibration

    # ---- the flow

    def run(self) -> Outcome:
        """Exact passes, plan, rewrite, budget, guard."""
        request = self.request
        self._check_names(self.original)
        before = self.summary(self.original)
        if request.passes is not None and not request.passes:
            return self.finish(self.original, self.baseline, before, "unchanged", "no passes were asked for")
        exact = self._exact()
        self.first_row = len(self.ledger.verdicts)
        lossy = self._lossy(exact)
        if not request.target.is_host:
            return Decision(self).by_prediction(exact, lossy, before)
        return fastest(self, Decision(self).by_measurement(exact, lossy, before))

    def explain(self) -> Ledger:
        """Plan and price only: nothing is rewritten lossily or measured."""
        self._check_names(self.original)
        if self.request.passes is not None and not self.request.passes:
            return self.ledger
        exact, steps = self._exact(), steps_of(self)
        for index, stage in enumerate(steps):
            self.context.later = tuple(step.name for later in steps[index + 1 :] for step in later)
            found = offers(self, exact, stage)
            if found is not None:
                chosen = plan(found.candidates, self.request.budget, found.prices, objective=self.request.objective)
                record(self.ledger, chosen, found.prices)
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
        if not self.request.samples or not steps_of(self):
            return graph
        return self._at_opset(graph, _QUANTISES)

    def _at_opset(self, graph: Graph, wanted: int) -> Graph:
        """The graph of an ONNX model at the wanted version of the standard or a later one, if possible."""
        opset = 0 if graph.model is None else graph.model.opsets.get("", 0)
        if not 0 < opset < wanted:
            return graph
        sample = self.any_sample()
        if sample is None:
            why = "the types of its inputs are not fully known, so a conversion could not be verified"
            self.ledger.note(f"the model stays at opset {opset}, not {wanted}: {why}; give --input-shape")
            return graph
        from fxopt.frontends.convert_graph import convert_graph

        try:
            made = convert_graph(graph, wanted, self.ledger)
        except FxoptError as error:
            self.ledger.note(f"the model stays at opset {opset}: {error}")
            return graph
        infer(made, self.original.sizes)  # those of the costs before
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
                self.blame_samples(error)
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.ledger.note(f"exact passes were verified by structure only: a made-up sample does not run ({reason})")
            return None
        self.ledger.note("exact passes were verified by structure only: a made-up sample does not run")
        return None

    def blame_samples(self, error: Exception) -> None:
        """Raise InvalidInput for `error` when what came in does not run on a sample either."""
        for index, sample in enumerate(self.request.samples):
            try:
                self.baseline.run(sample)
            except Exception:  # whatever a backend raises: the sample is named, the first error is the cause
                raise InvalidInput(
                    f"the model does not run on sample {index} of the data given: {first_line(error)}"
                ) from error

    def _lossy(self, exact: Graph) -> Lossy | None:
        """The best plan within the budget, applied; None when nothing is chosen."""
        found = planned(self, exact)
        return self._conversion(exact) if found is None and self.is_converted else found

    def _conversion(self, exact: Graph) -> Lossy | None:
        """What converting passes made, with nothing else done; None when that is not within the budget."""
        budget, nothing_else = self.request.budget, Plan((), (), 0.0, 0.0)
        if not self.request.samples:
            if budget is None:
                return Lossy(exact, self.compiled(exact), nothing_else, None, math.nan, exact)
            roll_back(self.ledger, None, f"{NO_DATA}, or --budget none")
            return None
        found = self.measured(exact, nothing_else)
        if budget is None or found.loss <= budget:
            return found
        found.executable.close()
        roll_back(self.ledger, None, f"over budget: measured loss {found.loss:.3g} against the model that came in")
        return None

    def _check_names(self, graph: Graph) -> None:
        """`--include` and `--exclude` must name something."""
        for option, pattern in (("include", self.request.include), ("exclude", self.request.exclude)):
            if pattern is None:
                continue
            names = [label(node) for node in graph.calls()]
            if not any(pattern.search(name) for name in names):
                raise unknown(f"node (no node matches --{option})", pattern.pattern, names)

    def measured(self, graph: Graph, chosen: Plan) -> Lossy:
        """A rewritten graph, compiled, with its error."""
        with self.stage("rewriting"):
            update(graph, [node for node in graph.nodes if "val" not in node.meta])
            executable = self.compiled(graph)
        with self.stage("measuring the error"):
            error, loss = self.measured_error(executable)
        return Lossy(graph, executable, chosen, error, loss, graph)

    # ---- errors

    def measured_error(self, executable: Executable) -> tuple[ErrorReport, float]:
        """The error report, and the loss that the budget limits."""
        if self._references is None:
            self._references = [self.baseline.run(sample) for sample in self.verification]
        found: OutputError = output_error(self._references, map(executable.run, self.verification))
        before = after = None
        loss = found.noise_to_signal
        if self.request.evaluate is not None:
            if self._metric_before is None:
                self._metric_before = _metric_of(self.request.evaluate(as_function(self.baseline)))
                if math.isnan(self._metric_before):
                    raise InvalidOption("evaluate returned nan for the model that came in; expected a number")
            before = self._metric_before
            after = _metric_of(self.request.evaluate(as_function(executable)))
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
        if executable is self.baseline and request.backend.is_compiler and not request.target.is_host:
            executable, outcome = self.compiled(graph), "compiled"  # nothing to rewrite is no reason not to compile
        elif executable is self.baseline and request.backend.is_compiler:
            self.ledger.note(f"what came in goes out, in {executable.executed_on}; --force gives the compiled code")
        with self.stage("verifying the code"):
            verified = executable.verify(self.verification)
        if verified:
            self.ledger.note(verified)
        if self.state is not None:
            self.ledger.note(f"nothing was calibrated: {self.state}, the file to resume from, was not used")
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


def as_function(executable: Executable) -> Callable[..., Any]:
    """The executable as a function of flat inputs; a single output is returned bare."""

    def call(*inputs: Any) -> Any:
        results = executable.run(inputs)
        return results[0] if len(results) == 1 else tuple(results)

    return call


def _metric_of(value: Any) -> float:
    """What `evaluate` gave, as a number."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InvalidOption(f"evaluate returned {value!r}; expected a number, higher is better") from error
