"""Other ways of running the same artifact on this machine: taken when they are measured to be faster, and as right."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fxopt.errors import FxoptError
from fxopt.guard import Timing, measure
from fxopt.request import Outcome

if TYPE_CHECKING:
    from fxopt.backends.base import Executable
    from fxopt.engine import Optimizer

_ROUNDING: float | None = 1e-6  # noise to signal between two runtimes of one float model


def fastest(job: Optimizer, outcome: Outcome) -> Outcome:
    """The outcome, run as its backend runs it fastest; every alternative is measured and gets a note.

    Results must be verified: within the budget for a model that was changed lossily, else equal up to rounding.
    """
    request = job.request
    if not outcome.executable.is_timed or request.force or request.objective != "latency":
        return outcome
    for create in request.backend.alternatives(outcome.executable):
        with job.stage("other runtimes"):
            try:
                other = create()
            except FxoptError as error:
                job.ledger.note(str(error))
                continue
            reason, measured = _objection(job, other, outcome.report.error is not None), ""
            if not reason:
                timing = _timed(job, outcome.executable, other)
                measured = f"measured {timing.ratio:.2f}x ({timing.low:.2f} to {timing.high:.2f})"
                reason = "" if timing.low >= 1.0 else f"{measured}, not surely faster"
            instead = f"instead of {outcome.executable.executed_on}"
            if reason:
                job.ledger.note(f"{other.executed_on} is not used {instead}: {reason}")
                other.close()
                continue
            job.ledger.note(f"{other.executed_on} is used {instead}: {measured}")
            outcome = _moved(job, outcome, other)
    outcome.report.warnings = [*request.warnings, *job.ledger.notes]
    return outcome


def _timed(job: Optimizer, first: Executable, second: Executable) -> Timing:
    sample = job.verification[0]
    return measure(lambda: first.run(sample), lambda: second.run(sample), job.request.guard_seconds / 4)


def _objection(job: Optimizer, other: Executable, is_lossy: bool) -> str:
    """Why the other runtime's results do not do; "" when they do."""
    if not job.verification:
        return "there are no samples to verify it with"
    error, loss = job.measured_error(other)
    if not is_lossy:
        loss, limit, what = error.noise_to_signal, _ROUNDING, "what rounding explains"
    else:
        limit, what = job.request.budget, "the budget"
    return "" if limit is None or loss <= limit else f"its error {loss:.3g} exceeds {what}, {limit:g}"


def _moved(job: Optimizer, outcome: Outcome, other: Executable) -> Outcome:
    """The outcome in the other runtime, its figures measured anew."""
    before = outcome.report
    report = dataclasses.replace(before, executed_on=other.executed_on, runtime=other.runtime)
    if before.error is not None:
        report.error = job.measured_error(other)[0]
    if before.measured is not None:
        report.measured = job.measurement(_timed(job, job.baseline, other))
        report.why = f"{before.why}; {report.measured.ratio:.2f}x in {other.executed_on}"
    return Outcome(outcome.graph, other, report, outcome.ledger)
