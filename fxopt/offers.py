"""What lossy passes offer for a graph: candidates with what calibration says about them and what they cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fxopt.errors import FxoptError, PassError
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Refusal
from fxopt.passes.base import Candidate, LossyPass, Pass
from fxopt.passes.stats import Stats, collect
from fxopt.planner.plan import Price, pays
from fxopt.verdicts import refuse

if TYPE_CHECKING:
    from fxopt.engine import Optimizer

NO_DATA = Refusal("no data to measure the budget; give --calibration, or --calibration random")
_Offered = Sequence[tuple[LossyPass, Candidate]]


@dataclass
class Offers:
    """Candidates, their prices (of those without a refusal), the pass of each, and the statistics."""

    candidates: list[Candidate] = field(default_factory=list)
    prices: dict[Candidate, Price] = field(default_factory=dict)
    owners: dict[Candidate, LossyPass] = field(default_factory=dict)
    stats: Stats = field(default_factory=Stats)


def offers(job: Optimizer, graph: Graph, passes: Sequence[LossyPass]) -> Offers | None:
    """What these passes offer; None without data (every candidate is then refused)."""
    with job.stage("candidates"):
        offered = [(step, candidate) for step in passes for candidate in step.candidates(graph, job.context)]
    if not job.request.samples:
        for candidate in dict.fromkeys(candidate for _, candidate in offered):
            refuse(job.ledger, candidate, candidate.refusal or NO_DATA)
        return None
    unpaid = _unpaid(job, graph, offered)
    legal = [(step, item) for step, item in offered if item.refusal is None and item not in unpaid]
    with job.stage("calibration"):
        nodes = {node for step, candidate in legal for node in step.observed(graph, candidate)}
        counted = {node for step, candidate in legal for node in step.clipped(graph, candidate)}
        whole = {node for step, candidate in legal for node in step.whole(graph, candidate)}
        try:
            stats = collect(
                graph, job.calibration, nodes, evaluator=job.evaluator, progress=job.request.progress,
                histograms=counted, whole=whole, state=job.state,
            )  # fmt: skip
        except FxoptError:
            raise
        except Exception as error:
            job.blame_samples(error)
            raise
        job.state = None
    with job.stage("estimates"):
        candidates, prices = _priced(job, graph, offered, unpaid, stats)
    owners = {candidate: step for step, candidate in offered}
    return Offers(candidates, prices, owners, stats)


def _unpaid(job: Optimizer, graph: Graph, offered: _Offered) -> dict[Candidate, Price]:
    """Candidates that are not faster by their work alone: neither calibrated nor estimated."""
    found: dict[Candidate, Price] = {}
    if job.request.objective != "latency":
        return found
    for step, candidate in offered:
        work = step.work(graph, candidate) if candidate.refusal is None else None
        if work is not None:
            before, after = map(job.predicted, work)
            price = Price(before, after, math.nan)
            if not pays(price, job.request.objective):
                found[candidate] = price
    return found


def _priced(
    job: Optimizer, graph: Graph, offered: _Offered, unpaid: dict[Candidate, Price], stats: Stats
) -> tuple[list[Candidate], dict[Candidate, Price]]:
    candidates: list[Candidate] = []
    prices: dict[Candidate, Price] = dict(unpaid)
    progress = job.request.progress
    for index, (step, candidate) in enumerate(offered):
        if candidate not in unpaid and candidate.refusal is None:
            refusal: Refusal | None = Refusal("no calibration sample reaches it")
            if all(node in stats for node in step.observed(graph, candidate)):
                with naming(step, candidate):
                    estimate = step.estimate(graph, candidate, stats)
                before, after = job.predicted(estimate.before), job.predicted(estimate.after)
                prices[candidate] = Price(before, after, estimate.error, estimate.saved_bytes, estimate.detail)
                refusal = estimate.refusal
            candidate = candidate if refusal is None else replace(candidate, refusal=refusal)
        candidates.append(candidate)
        if progress is not None:
            progress("estimating", index + 1, len(offered))
    return candidates, prices


@contextmanager
def naming(step: Pass, candidate: Candidate) -> Iterator[None]:
    """Errors inside name the pass and the node."""
    try:
        yield
    except Exception as error:
        raise PassError(f"pass {step.name} failed at {candidate.anchor!r}: {type(error).__name__}: {error}") from error
