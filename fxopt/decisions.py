"""Whether a rewritten model goes out: by prediction where the target is absent, by measurement where it is here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fxopt.backends.base import Executable
from fxopt.groups import cut_out, group_ratios, slow_groups
from fxopt.guard import Timing, measure
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.marks import has_marks
from fxopt.ir.ops.sparse_linear_u8s8 import sparse_linear_u8s8
from fxopt.own_kernels import with_own_kernels
from fxopt.report import units
from fxopt.report.report import Summary
from fxopt.request import Lossy, Outcome, Sample
from fxopt.rewriting import applied
from fxopt.stages import is_staged, worth_it
from fxopt.verdicts import roll_back, why_nothing

if TYPE_CHECKING:
    from fxopt.engine import Optimizer
    from fxopt.passes.base import Candidate

_LEAST_BOUGHT = 1.01  # for less of the whole model's time no error is made


class Decision:
    """Decides about the results of one `Optimizer`; what does not pay is rolled back, with the reason."""

    def __init__(self, job: Optimizer) -> None:
        self.job = job

    def by_prediction(self, exact: Graph, lossy: Lossy | None, before: Summary) -> Outcome:
        """Take what is predicted to be no slower (or smaller, when that is the objective) for the whole model."""
        request = self.job.request
        if lossy is not None and is_staged(self.job, lossy):
            lossy = worth_it(self.job, exact, lossy, lambda found: found, self._no_gain)
        graph = lossy.graph if lossy is not None else exact
        if lossy is None and not self.job.exact_changed():
            return self.job.finish(
                self.job.original, self.job.baseline, before, "nothing paid", why_nothing(self.job.ledger)
            )
        after = self.job.summary(graph)
        assert before.predicted is not None and after.predicted is not None
        gain = before.predicted.seconds / max(after.predicted.seconds, 1e-12)
        why = f"predicted {gain:.2f}x on {request.target.name}"
        pays = gain >= 1.0
        if request.objective == "size":
            why = f"{why}, {units.size(after.size_bytes)} of constants instead of {units.size(before.size_bytes)}"
            pays = after.size_bytes < before.size_bytes
        elif lossy is not None and lossy.plan.chosen and pays:
            alone = self.job.summary(exact).predicted
            assert alone is not None
            bought = alone.seconds / max(after.predicted.seconds, 1e-12)
            if bought < _LEAST_BOUGHT:
                why, pays = f"{why}, of which lossy changes give {bought:.3f}x: too little", False
        if not pays and not request.force:
            gone = None if lossy is None else self._all_of(lossy, lossy.plan.chosen)
            roll_back(self.job.ledger, gone, f"{why}, for the whole model")
            if lossy is None:
                return self._nothing(before, why)
            lossy.executable.close()
            return self.by_prediction(exact, None, before)
        executable = lossy.executable if lossy is not None else self.job.compiled(exact)
        why = f"{why}, +-{100 * request.target.interval:.0f} % ({request.target.error})"
        return self.job.finish(graph, executable, before, "optimized", why, lossy.error if lossy else None)

    def by_measurement(self, exact: Graph, lossy: Lossy | None, before: Summary) -> Outcome:
        """Take what is measured to be surely faster: the lossy result, else the exact one, else what came in."""
        request = self.job.request
        if not self.job.baseline.is_timed:
            return self._by_samples(exact, lossy, before)
        sample = self._timing_sample()
        if sample is None or request.force or request.objective != "latency":
            return self._without_guard(exact, lossy, before, sample)
        is_other = self.job.exact_changed() or request.backend.is_compiler  # than what came in
        plain = self.job.compiled(exact) if is_other else self.job.baseline
        share = request.guard_seconds / (2 if lossy is not None and plain is not self.job.baseline else 1)
        if lossy is not None:
            found = self._fastest(exact, lossy, plain, sample, share)
            if found is not None and plain is not self.job.baseline:
                plain.close()
            if found is not None:
                lossy, timing = found
                return self.job.finish(
                    lossy.graph, lossy.executable, before, "optimized", _measured(timing), lossy.error, timing
                )
        if plain is self.job.baseline:
            return self.job.finish(
                self.job.original, self.job.baseline, before, "nothing paid", why_nothing(self.job.ledger)
            )
        with self.job.stage("guard"):
            timing = measure(lambda: self.job.baseline.run(sample), lambda: plain.run(sample), share)
        if timing.low >= 1.0:
            return self.job.finish(exact, plain, before, "optimized", _measured(timing), None, timing)
        plain.close()
        why = f"{_measured(timing)}: {_not_surely(timing)}"
        roll_back(self.job.ledger, None, why)
        return self._nothing(before, why, timing)

    def _fastest(
        self, exact: Graph, lossy: Lossy, plain: Executable, sample: Sample, seconds: float
    ) -> tuple[Lossy, Timing] | None:
        """The lossy result where it pays, on own kernels where these are faster, and its timing."""

        def decide(one: Lossy) -> tuple[Lossy, Timing] | None:
            with self.job.stage("guard"):
                found = self._paying(one, plain, sample, seconds)
            if found is None or not self.job.request.custom_ops:
                return found
            return self._on_own_kernels(*found, sample, seconds)

        def objection(found: tuple[Lossy, Timing], other: tuple[Lossy, Timing] | None) -> str:
            return self._no_faster(found[0], None if other is None else other[0], sample, seconds)

        return worth_it(self.job, exact, lossy, decide, objection) if is_staged(self.job, lossy) else decide(lossy)

    def _by_samples(self, exact: Graph, lossy: Lossy | None, before: Summary) -> Outcome:
        """Of a model that is too large to be timed whole: one representative per operator, shape and type decides."""
        request = self.job.request
        if request.force or request.objective != "latency":
            return self._without_guard(exact, lossy, before, None)
        if lossy is None or not lossy.plan.chosen:
            return self.by_prediction(exact, lossy, before)
        chosen = lossy.plan.chosen
        with self.job.stage("guard"):
            assert lossy.base is not None
            part = self._representative(lossy)
            ratios = group_ratios(lossy.base, lossy.graph, chosen, part, request.guard_seconds)
        why = f"sampled, {len(ratios)} of {len(chosen)} changes: the model exceeds half of the memory"
        self.job.ledger.note(why)
        dropped = {
            item.group: f"measured alone, {item.group} runs at {ratios.get(item.group, math.nan):.2f}x: not faster"
            for item in chosen
            if not ratios.get(item.group, 0.0) >= 1.0
        }
        kept = tuple(item for item in chosen if item.group not in dropped)
        roll_back(self.job.ledger, [item for item in chosen if item.group in dropped], "", dropped)
        if not kept:
            lossy.executable.close()
            self._undo_conversion()
            return self.by_prediction(exact, None, before)
        if len(kept) < len(chosen):
            lossy.executable.close()
            lossy = self._only(lossy, kept)
            if request.budget is not None and not lossy.loss <= request.budget:
                lossy.executable.close()
                why = f"over budget without the slow ones: measured loss {lossy.loss:.3g}"
                roll_back(self.job.ledger, self._all_of(lossy, kept), why)
                return self.by_prediction(exact, None, before)
        return self.job.finish(lossy.graph, lossy.executable, before, "optimized", why, lossy.error)

    def _paying(
        self, lossy: Lossy, plain: Executable, sample: Sample, seconds: float
    ) -> tuple[Lossy, Timing] | None:
        """The lossy result if it is measured to be faster than the exact one and than what came in.

        While it is not, groups of changes that are slow by themselves are dropped.
        """
        deadline = time.perf_counter() + seconds * 2
        budget = self.job.request.budget
        while True:
            timing, rivals = self._against(lossy, plain, sample, seconds / 2)
            if all(rival.low >= 1.0 for rival in rivals):
                return lossy, timing
            chosen, base = lossy.plan.chosen, lossy.base
            part = self._representative(lossy)
            dropped = slow_groups(base, lossy.graph, chosen, part, seconds / 2) if chosen and base else {}
            kept = tuple(candidate for candidate in chosen if candidate.group not in dropped)
            lossy.executable.close()
            if not kept or len(kept) == len(chosen) or time.perf_counter() > deadline:
                worst = min(rivals, key=lambda rival: rival.low)
                why = f"{_measured(worst)} for the whole model: not surely faster"
                roll_back(self.job.ledger, self._all_of(lossy, chosen), why, dropped)
                return None
            roll_back(self.job.ledger, [candidate for candidate in chosen if candidate.group in dropped], "", dropped)
            lossy = self._only(lossy, kept)
            if budget is not None and not lossy.loss <= budget:
                lossy.executable.close()
                why = f"over budget without the slow ones: measured loss {lossy.loss:.3g}"
                roll_back(self.job.ledger, self._all_of(lossy, kept), why)
                return None

    def _only(self, lossy: Lossy, kept: Sequence[Candidate]) -> Lossy:
        """The same with these of the last stage's candidates."""
        assert lossy.base is not None and lossy.offers is not None
        chosen = replace(lossy.plan.only(kept, lossy.offers.prices), refused=())
        return replace(applied(self.job, lossy.base, chosen, lossy.offers), earlier=lossy.earlier)

    def _against(self, lossy: Lossy, plain: Executable, sample: Sample, seconds: float) -> tuple[Timing, list[Timing]]:
        """The timing against what came in, and all timings: also that against the exact result, where there is one."""

        def run() -> object:
            return lossy.executable.run(sample)

        timing = measure(lambda: self.job.baseline.run(sample), run, seconds)
        if plain is self.job.baseline:
            return timing, [timing]
        return timing, [measure(lambda: plain.run(sample), run, seconds), timing]

    def _on_own_kernels(self, lossy: Lossy, timing: Timing, sample: Sample, seconds: float) -> tuple[Lossy, Timing]:
        """The result on own kernels where these are faster, and its timing against what came in."""
        fused = with_own_kernels(self.job, lossy, sample, seconds / 2)
        if fused is lossy:
            return lossy, timing
        with self.job.stage("guard"):
            return fused, measure(
                lambda: self.job.baseline.run(sample), lambda: fused.executable.run(sample), seconds / 2
            )

    def _representative(self, lossy: Lossy) -> Callable[[Graph, str], Callable[[], object] | None]:
        """One candidate's operator alone, compiled, on a sample of its input (None when it cannot be cut out)."""

        def alone(graph: Graph, node_name: str) -> Callable[[], object] | None:
            part = None if lossy.offers is None else cut_out(graph, node_name, lossy.offers.stats)
            if part is None:
                return None
            small, inputs = part
            executable = self.job.compiled(small)
            return lambda: executable.run(inputs)

        return alone

    def _no_faster(self, lossy: Lossy, other: Lossy | None, sample: Sample, seconds: float) -> str:
        """Why a staged result is not better than another one, by time; the worse one is closed."""
        if self.job.request.custom_ops and has_marks(lossy.graph) and not _skips_zeros(lossy.graph):
            lossy.executable.close()
            return "no own kernel that skips its zeros was measured to be faster"
        if other is None:
            return ""
        timing = measure(lambda: other.executable.run(sample), lambda: lossy.executable.run(sample), seconds / 2)
        why = "" if timing.low > 1.0 else f"{_measured(timing)} over the same without it: not surely faster"
        (lossy if why else other).executable.close()
        return why

    def _no_gain(self, lossy: Lossy, other: Lossy | None) -> str:
        """The same by prediction, or by bytes where these are the objective."""
        if other is None:
            return ""
        if self.job.request.objective == "size":
            sizes = lossy.graph.size_bytes(), other.graph.size_bytes()
            why = "" if sizes[0] < sizes[1] else f"{sizes[0]} bytes of constants with it, {sizes[1]} without it"
        else:
            times = [self.job.summary(one.graph).predicted for one in (lossy, other)]
            assert times[0] is not None and times[1] is not None
            gain = times[1].seconds / max(times[0].seconds, 1e-12)
            why = "" if gain > 1.0 else f"predicted {gain:.2f}x over the same without it"
        (lossy if why else other).executable.close()
        return why

    def _without_guard(self, exact: Graph, lossy: Lossy | None, before: Summary, sample: Sample | None) -> Outcome:
        request = self.job.request
        if lossy is not None and request.objective == "size" and not request.force and is_staged(self.job, lossy):
            lossy = worth_it(self.job, exact, lossy, lambda found: found, self._no_gain)
        if lossy is None and not self.job.exact_changed() and not request.backend.is_compiler:
            return self.job.finish(
                self.job.original, self.job.baseline, before, "nothing paid", why_nothing(self.job.ledger)
            )
        if lossy is not None and request.custom_ops and request.force:
            lossy = with_own_kernels(self.job, lossy, None, 0.0)
        graph = lossy.graph if lossy is not None else exact
        reason = ""
        if sample is None and not request.force and request.objective == "latency":
            reason = "no input to measure with; give --calibration or example inputs, or --force"
        if request.objective == "size" and not request.force and graph.size_bytes() >= self.job.original.size_bytes():
            reason = "the result is not smaller"
        if reason:
            if lossy is not None:
                lossy.executable.close()
            roll_back(self.job.ledger, None, reason)
            return self._nothing(before, reason)
        executable = lossy.executable if lossy is not None else self.job.compiled(exact)
        timing = None
        if sample is not None and not request.force:
            timing = measure(
                lambda: self.job.baseline.run(sample), lambda: executable.run(sample), request.guard_seconds / 4
            )
        why = "not measured (--force)" if request.force else "smaller"
        return self.job.finish(graph, executable, before, "optimized", why, lossy.error if lossy else None, timing)

    def _all_of(self, lossy: Lossy, chosen: Sequence[Candidate]) -> Sequence[Candidate] | None:
        """What is undone with a plan: earlier stages too, and with a conversion below it everything (None)."""
        return None if self.job.is_converted else (*chosen, *lossy.earlier)

    def _undo_conversion(self) -> None:
        if self.job.is_converted:
            roll_back(self.job.ledger, None, "nothing made of the converted model is faster than what came in")

    def _nothing(self, before: Summary, why: str, timing: Timing | None = None) -> Outcome:
        """What came in goes out."""
        return self.job.finish(self.job.original, self.job.baseline, before, "nothing paid", why, timing=timing)

    def _timing_sample(self) -> Sample | None:
        if self.job.request.samples:
            return self.job.request.samples[0]
        sample = self.job.any_sample()
        if sample is None or any(value.dtype not in (torch.float32, torch.float64) for value in sample):
            return None
        return sample


def _measured(timing: Timing) -> str:
    return f"measured {timing.ratio:.2f}x ({timing.low:.2f} to {timing.high:.2f})"


def _skips_zeros(graph: Graph) -> bool:
    """Whether a linear runs in an own kernel that leaves out zero blocks."""
    return any(node.target is sparse_linear_u8s8.target for node in graph.calls())


def _not_surely(timing: Timing) -> str:
    """Why it counts as not faster; a noisy machine is told from a slow result."""
    hint = " (the machine is busy: more --guard-seconds narrow the interval)" if timing.ratio > 1.0 else ""
    return f"not surely faster{hint}"
