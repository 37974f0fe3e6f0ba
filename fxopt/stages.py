"""Lossy passes in stages: sparsify before what quantises, each planned on what the one before made, under one budget.

Errors are those of the outputs against what came in, so a later stage has what an earlier one left. What an early stage
made must buy something in the end: the later stages alone are tried too, and the better of both goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from fxopt.budget import within_budget
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.marks import has_marks
from fxopt.offers import offers
from fxopt.passes.base import LossyPass
from fxopt.passes.manager import PassManager
from fxopt.passes.pack_sparse import PackSparse
from fxopt.passes.pipelines import lossy_passes, stages
from fxopt.request import Lossy

if TYPE_CHECKING:
    from fxopt.engine import Optimizer

_FOR_LATER = 0.25  # of the budget, that each stage leaves to every later one
Found = TypeVar("Found")


def steps_of(job: Optimizer) -> list[list[LossyPass]]:
    """The stages of the passes that were asked for."""
    asked = job.request.passes
    passes = lossy_passes() if asked is None else [step for step in asked if isinstance(step, LossyPass)]
    return stages(passes)


def planned(job: Optimizer, exact: Graph, without: Collection[str] = ()) -> Lossy | None:
    """The result of all stages within the budget; None when nothing is chosen.

    Args:
        without: names of passes that are left out.
    """
    steps = [[step for step in stage if step.name not in without] for stage in steps_of(job)]
    steps = [stage for stage in steps if stage]
    found: Lossy | None = None
    for index, stage in enumerate(steps):
        following = steps[index + 1 :]
        job.context.later = tuple(step.name for later in following for step in later)
        base = exact if found is None else _as_base(found.graph)
        offered = offers(job, base, stage)
        if offered is None:
            continue
        spent = 0.0 if found is None else found.loss
        made = within_budget(job, base, offered, _share(job.request.budget, len(following)), spent)
        if made is None:
            continue
        if found is not None:
            made.earlier = (*found.earlier, *found.plan.chosen)
            found.executable.close()
        found = made
    job.context.later = ()
    return found if found is None else packed(job, found)


def _share(budget: float | None, following: int) -> float | None:
    return None if budget is None else budget * max(0.25, 1 - _FOR_LATER * following)


def _as_base(graph: Graph) -> Graph:
    """The graph for the next stage, whose statistics are collected on it."""
    base = graph.copy()
    for node in base.nodes:
        node.meta.pop("stands_for", None)
    return base


def packed(job: Optimizer, lossy: Lossy) -> Lossy:
    """The result with sparse weights stored without their zeros, where bytes count or a kernel takes them so."""
    if not has_marks(lossy.graph) or not _packs(job):
        return lossy
    graph = lossy.graph.copy()
    if not PassManager([PackSparse()]).run(graph, job.context):
        return lossy
    made = job.measured(graph, lossy.plan)
    lossy.executable.close()
    return replace(lossy, graph=graph, executable=made.executable, error=made.error, loss=made.loss)


def _packs(job: Optimizer) -> bool:
    """CPU kernels find zeros in dense weights, or never; those of CUDA devices take weights without them."""
    ctx = job.context
    return job.request.objective == "size" or (
        ctx.target.kind == "cuda"
        and any(
            not ctx.supports("linear_sparse", kernel.dtype, kernel.pattern)
            and not ctx.unskipped(kernel.dtype, kernel.pattern)
            for kernel in ctx.target.sparse_kernels
        )
    )


def is_staged(job: Optimizer, lossy: Lossy) -> bool:
    """Whether an early stage made something and there are later ones."""
    names = {step.name for stage in steps_of(job)[:-1] for step in stage}
    return any(candidate.pass_name in names for candidate in (*lossy.plan.chosen, *lossy.earlier))


def worth_it(
    job: Optimizer,
    exact: Graph,
    lossy: Lossy,
    decide: Callable[[Lossy], Found | None],
    objection: Callable[[Found, Found | None], str],
) -> Found | None:
    """The decision about a staged result, unless that about its last stage alone is better; ledger rows are its own.

    Args:
        decide: what goes out of a result; None: nothing, and it is closed.
        objection: why the first one is not better than the second; "" when it is. The other one must be closed by it.
    """
    early = {step.name for stage in steps_of(job)[:-1] for step in stage}
    begin = job.first_row
    found = decide(lossy)
    rows = job.ledger.verdicts[begin:]
    del job.ledger.verdicts[begin:]
    alone = planned(job, exact, without=early)
    other = None if alone is None else decide(alone)
    why = "" if found is None else objection(found, other)
    if found is not None and not why:
        job.ledger.verdicts[begin:] = rows
        return found
    why = why or "with them the result is no better than what came in"
    undone = [
        replace(row, outcome="rolled-back", reason=f"it buys nothing: {why}") if row.outcome == "applied" else row
        for row in rows
        if row.pass_name in early
    ]
    job.ledger.verdicts[begin:begin] = undone
    return other
