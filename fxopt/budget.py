"""The fastest plan within the error budget: everything that pays first, then a search along smaller plans.

Which errors reach the outputs is measured on the calibration samples (`planner/sensitivity.py`); whether a plan keeps
to the budget, on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fxopt.cost_model.roofline import predict
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Refusal
from fxopt.ir.memory import is_large
from fxopt.ir.target import Cost
from fxopt.offers import Offers
from fxopt.passes.base import Candidate
from fxopt.passes.crossings import Crossings, crossings
from fxopt.planner.path import Path, Taken
from fxopt.planner.plan import Plan, Price, pays, plan
from fxopt.planner.sensitivity import measure_errors, priced
from fxopt.request import Lossy
from fxopt.rewriting import applied, apply
from fxopt.verdicts import record

if TYPE_CHECKING:
    from fxopt.engine import Optimizer

_FULL = 0.93  # share of the budget that ends the search
_GUESSES = 5  # by predicted errors, before the interval is halved

Prices = dict[Candidate, Price]


def within_budget(
    job: Optimizer, base: Graph, offers: Offers, budget: float | None, spent: float = 0.0
) -> Lossy | None:
    """The lossy result whose measured loss is within the budget, recorded in the ledger; None when there is none.

    Args:
        spent: the loss of `base` itself, where an earlier stage made it.
    """
    first = plan(offers.candidates, None, offers.prices, objective=job.request.objective)
    if first.chosen and not job.request.target.is_host:  # nothing will be measured
        first = _with_conversions(job, base, first, offers)
    if not first.chosen:
        record(job.ledger, first, offers.prices)
        return None
    lossy = applied(job, base, first, offers)
    first = lossy.plan
    if not first.chosen or budget is None or lossy.loss <= budget:
        record(job.ledger, first, offers.prices)
        if first.chosen:
            return lossy
        lossy.executable.close()
        return None
    lossy.executable.close()
    prices = _measured(job, base, first.chosen, offers)
    offers = replace(offers, prices=prices)
    path = Path(first.chosen, prices, job.request.objective, _crossings(job, base, first.chosen, offers))

    def of(taken: Taken) -> Lossy:
        return applied(job, base, _plan(taken, first, path, prices), offers)

    found = _search(job, path, budget, spent, lossy.loss, of)
    record(job.ledger, _plan({}, first, path, prices) if found is None else found.plan, prices)
    return found


def _with_conversions(job: Optimizer, base: Graph, first: Plan, offers: Offers) -> Plan:
    """The plan without convolutions that are predicted to gain less than converting between codes and floats takes."""
    found = _crossings(job, base, [item for item in first.chosen if _gives_levels(base, item, offers)], offers)
    if found is None or job.request.objective != "latency":
        return first
    path = Path(first.chosen, offers.prices, job.request.objective, found)
    best = max(path.states, key=path.gain)
    if path.gain(best) <= path.gain(path.start):
        return first
    refused = [
        (item, Refusal("converting its values takes longer than it gains: some around it are not in 8 bits"))
        for item in first.chosen
        if best.get(item.node) != item
    ]
    chosen = tuple(best[item.node] for item in first.chosen if item.node in best)
    gain = sum(offers.prices[item].gain for item in chosen)
    return Plan(chosen, (*first.refused, *refused), path.error(best), gain)


def _gives_levels(base: Graph, item: Candidate, offers: Offers) -> bool:
    levels = offers.owners[item].fixed_levels(base, item)
    return levels is not None and levels[1] is not None


def _search(
    job: Optimizer, path: Path, budget: float, spent: float, loss: float, applied: Callable[[Taken], Lossy]
) -> Lossy | None:
    """The first plan of the path within the budget, as far as a few trials find it."""
    over, best, within = 0, None, len(path.states) - 1
    room = budget - spent
    # predicted errors and measured losses (above what was spent) of the plans over budget, the last one last
    seen = [(path.errors[0], loss - spent)]
    for trial in range(_GUESSES + math.ceil(math.log2(len(path.states)))):
        if within - over > 1:
            known = seen if best is None else [*seen, (path.errors[within], best.loss - spent)]
            index = _guess(path.errors, over, within, room, known) if trial < _GUESSES else (over + within) // 2
        elif best is not None:
            break
        else:
            index = within  # nothing is left
        if best is None:
            job.ledger.note(
                f"a plan with measured loss {seen[-1][1] + spent:.3g} exceeds the budget {budget:g}; planned again with"
                f" {len(path.states[index])} changes"
            )
        if not path.states[index]:
            break
        lossy = applied(path.states[index])
        if not lossy.loss <= budget or not lossy.plan.chosen:
            lossy.executable.close()
            over = index
            seen.append((path.errors[index], lossy.loss - spent))
            continue
        if best is not None:
            best.executable.close()
        best, within = lossy, index
        if lossy.loss - spent >= room * _FULL:
            break
    return best


def _guess(errors: Sequence[float], over: int, within: int, budget: float, known: Sequence[tuple[float, float]]) -> int:
    """The first plan between two whose loss should be within the budget, from predicted errors and losses so far.

    Losses grow like a power of predicted errors: with the power 1 at first, then with that between the last two plans.
    """
    (error, loss), power = known[-1], 1.0
    if not all(0.0 < value < math.inf for pair in known for value in pair):
        return (over + within) // 2
    if len(known) > 1 and known[-2][1] != loss:
        before, loss_before = known[-2]
        power = min(max(math.log(error / before) / math.log(loss / loss_before), 0.5), 4.0)
    wanted = error * (budget * (1 + _FULL) / 2 / loss) ** power
    index = next((index for index in range(over + 1, within) if errors[index] <= wanted), within - 1)
    return index


def _plan(taken: Taken, first: Plan, path: Path, prices: Prices) -> Plan:
    """A plan of the path; what the first plan had and this one lacks is refused for its error."""
    offered = {item.node for item in first.chosen}
    refused: list[tuple[Candidate, Refusal]] = []
    for item, reason in (*first.refused, *((item, None) for item in first.chosen)):
        other = taken.get(item.node)
        if item == other:
            continue
        if reason is not None and not (item.node in offered and item in prices and pays(prices[item], path.objective)):
            refused.append((item, reason))
        elif other is not None:
            refused.append((item, Refusal("{} gives more within the budget", other.setting)))
        else:
            refused.append((item, Refusal("over budget: alone it adds {:.2g} to the noise", prices[item].error)))
    chosen = tuple(taken[item.node] for item in first.chosen if item.node in taken)
    return Plan(chosen, tuple(refused), path.error(taken), sum(prices[item].gain for item in chosen))


def _measured(job: Optimizer, base: Graph, chosen: Sequence[Candidate], offers: Offers) -> Prices:
    """Prices with what each change adds to the error of the outputs; as they are where measuring takes too long."""
    owner, prices = offers.owners, offers.prices
    if is_large(base) or any(owner[item].moments(base, item) is not None for item in chosen):
        job.ledger.note("over budget: the errors of the layers' own outputs decide what is left out")
        return prices

    def change(graph: Graph, group: Sequence[Candidate]) -> None:
        apply(job, graph, group, offers)

    with job.stage("output errors"):
        errors, runs, samples = measure_errors(base, chosen, job.calibration, change, prices, job.evaluator)
    job.ledger.note(
        f"over budget: what each of {len(chosen)} changes alone adds to the error of the outputs was measured: {runs}"
        f" partial runs on {samples} calibration samples"
    )
    return priced(prices, chosen, errors)


def _crossings(job: Optimizer, base: Graph, chosen: Sequence[Candidate], offers: Offers) -> Crossings | None:
    levels = {item.node: offers.owners[item].fixed_levels(base, item) for item in chosen}
    target = job.request.target

    def seconds(cost: Cost) -> float:
        return predict(cost, target).seconds

    return crossings(base, {name: found for name, found in levels.items() if found is not None}, seconds)
