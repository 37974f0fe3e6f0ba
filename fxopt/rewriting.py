"""A plan becomes a graph: candidates applied in order, the graph tidied up, its structure and its masks verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import fx

from fxopt.errors import InvalidInput, VerificationError
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Refusal
from fxopt.ir.masks import marks, verify_masks
from fxopt.ir.memory import is_large, spilled
from fxopt.ir.verify import check_output_types, output_types, verify_structure
from fxopt.offers import Offers, naming
from fxopt.passes.base import Candidate, Context, Declined, ExactPass
from fxopt.passes.pipelines import tidying_pipeline
from fxopt.passes.sequential import SequentialRun
from fxopt.planner.plan import Plan
from fxopt.request import Lossy

if TYPE_CHECKING:
    from fxopt.engine import Optimizer


def applied(job: Optimizer, base: Graph, chosen: Plan, offers: Offers) -> Lossy:
    """The graph after the plan, compiled, with its error; what a pass declined is no longer in its plan."""
    with job.stage("rewriting"):
        graph = base.copy()
        graph.store = spilled if is_large(base) else None
        declined = apply(job, graph, chosen.chosen, offers)
        chosen = chosen.without(declined, offers.prices)
        names = sorted({candidate.pass_name for candidate in chosen.chosen})
        _verify_masks(graph, base, ", ".join(names))
        for tidy in tidying_pipeline():
            keeping_masks(tidy, graph, job.context)
        graph.prune()
        _verify(base, graph, names)
    return replace(job.measured(graph, chosen), base=base, offers=offers)


def apply(job: Optimizer, graph: Graph, chosen: Sequence[Candidate], offers: Offers) -> dict[Candidate, Refusal]:
    """Apply the candidates; those that want second moments come in the order of the graph, the others before.

    Returns what could not be done after all.
    """
    owner, stats = offers.owners, offers.stats
    declined: dict[Candidate, Refusal] = {}
    later: list[Candidate] = []
    for candidate in chosen:
        with naming(owner[candidate], candidate):
            if owner[candidate].moments(graph, candidate) is not None:
                later.append(candidate)
                continue
            try:
                owner[candidate].apply(graph, candidate, stats)
            except Declined as error:
                declined[candidate] = error.refusal
    if later:
        declined |= _in_order(job, graph, later, offers)
        stats.moments = {}
        for note in stats.notes:
            job.ledger.note(note)
    return declined


def _in_order(job: Optimizer, graph: Graph, chosen: list[Candidate], offers: Offers) -> dict[Candidate, Refusal]:
    """Apply candidates, each with the moments of its input on what those before it made."""
    owner, stats = offers.owners, offers.stats
    declined: dict[Candidate, Refusal] = {}
    place: dict[fx.Node | None, int] = {node: index for index, node in enumerate(graph.nodes)}
    chosen.sort(key=lambda candidate: place[owner[candidate].moments(graph, candidate)])
    walk = SequentialRun(graph, job.calibration, job.evaluator)
    for done, candidate in enumerate(chosen):
        step = owner[candidate]
        with naming(step, candidate):
            node = step.moments(graph, candidate)
            assert node is not None
            try:
                stats.moments = {node.name: walk.moments(node, step.moment_rows(graph, candidate))}
                step.apply(graph, candidate, stats)
            except InvalidInput as error:
                declined[candidate] = Refusal("{}", error)
            except Declined as error:
                declined[candidate] = error.refusal
        if job.request.progress is not None:
            job.request.progress("rewriting", done + 1, len(chosen))
    return declined


def keeping_masks(step: ExactPass, graph: Graph, ctx: Context) -> int:
    """Run a pass on a graph; its number of changes.

    Raises:
        VerificationError: it took zeros from a weight that promises them.
    """
    before = marks(graph)
    changes = step.run(graph, ctx)
    try:
        verify_masks(graph, before)
    except VerificationError as error:
        raise VerificationError(f"pass {step.name} broke the graph: {error}") from error
    return changes


def _verify_masks(graph: Graph, base: Graph, names: str) -> None:
    try:
        verify_masks(graph, marks(base))
    except VerificationError as error:
        raise VerificationError(f"the changes of {names} broke the graph: {error}") from error


def _verify(base: Graph, graph: Graph, names: Sequence[str]) -> None:
    fresh = [node for node in graph.nodes if "val" not in node.meta]  # new constants too
    try:
        verify_structure(graph, fresh, base.nodes)
        check_output_types(graph, output_types(base))
    except VerificationError as error:
        raise VerificationError(f"the changes of {', '.join(names)} broke the graph: {error}") from error
