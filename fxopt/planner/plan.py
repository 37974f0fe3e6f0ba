"""Choose among the candidates of all lossy passes: greedy by gain per error, under one budget.

What is left of the budget then exchanges chosen candidates for clearly faster ones of the same node.

Predicted errors add (noise to signal of independent rewrites); the measured total decides afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from fxopt.ir.ledger import Refusal
from fxopt.ir.target import Prediction
from fxopt.passes.base import Candidate

_MINIMUM_ERROR = 1e-12  # an exact candidate has the best ratio, not an infinite one
_LEAST = 0.02  # share of its time that a candidate must gain: less is no difference
_SIMILAR = 2.0  # estimated errors within this factor are taken to be equal
_ROUNDING = 1e-12  # of sums of errors
_CLEARLY = 0.1  # predicted times of two forms of one operator that are nearer are taken to be equal


@dataclass(frozen=True)
class Price:
    """What a candidate costs and gives: predicted seconds before and after, output noise to signal, bytes saved.

    `detail` says what was found, for the ledger.
    """

    before: Prediction
    after: Prediction
    error: float
    saved_bytes: int = 0
    detail: str = ""

    @property
    def gain(self) -> float:
        """Predicted seconds saved per run; negative when the candidate is slower."""
        return self.before.seconds - self.after.seconds


@dataclass(frozen=True)
class Plan:
    """The chosen candidates in the order they were given, and the others with the reason."""

    chosen: tuple[Candidate, ...]
    refused: tuple[tuple[Candidate, Refusal], ...]
    error: float  # predicted noise to signal
    gain: float  # predicted seconds

    def only(self, kept: Collection[Candidate], prices: Mapping[Candidate, Price]) -> Plan:
        """The plan with these of its candidates."""
        chosen = tuple(candidate for candidate in self.chosen if candidate in kept)
        error, gain = (sum(getattr(prices[candidate], name) for candidate in chosen) for name in ("error", "gain"))
        return Plan(chosen, self.refused, error, gain)

    def without(self, declined: Mapping[Candidate, Refusal], prices: Mapping[Candidate, Price]) -> Plan:
        """The plan without what could not be done after all; the same when that is nothing."""
        if not declined:
            return self
        left = self.only([candidate for candidate in self.chosen if candidate not in declined], prices)
        return replace(left, refused=(*self.refused, *declined.items()))


def plan(
    candidates: Sequence[Candidate],
    budget: float | None,
    prices: Mapping[Candidate, Price],
    *,
    objective: str = "latency",
) -> Plan:
    """Choose at most one candidate per node so that predicted errors stay within the budget.

    Args:
        candidates: of all passes; those with a refusal are passed through.
        budget: largest accepted sum of errors; None accepts every error.
        prices: of every candidate without a refusal.
        objective: what must improve: "latency" (seconds) or "size" (bytes).
    """
    refused: list[tuple[Candidate, Refusal]] = []
    worth: list[tuple[float, Candidate]] = []
    for candidate in dict.fromkeys(candidates):
        if candidate.refusal is not None:
            refused.append((candidate, candidate.refusal))
            continue
        price = prices[candidate]
        gain = gain_of(price, objective)
        if not pays(price, objective):
            refused.append((candidate, _does_not_pay(price, objective)))
        elif math.isnan(price.error):
            refused.append((candidate, Refusal("its error cannot be estimated")))
        else:
            worth.append((gain / max(price.error, _MINIMUM_ERROR), candidate))
    worth.sort(key=lambda item: -item[0])
    taken = _greedy([candidate for _, candidate in worth], budget, prices)
    _upgrade(taken, [candidate for _, candidate in worth], budget, prices, objective)
    total = sum(prices[candidate].error for candidate in taken.values())
    for _, candidate in worth:
        other = taken.get(candidate.node)
        if other != candidate:
            error = prices[candidate].error
            refused.append((candidate, _left_out(error, total, budget, other)))
    chosen = tuple(candidate for candidate in dict.fromkeys(candidates) if taken.get(candidate.node) == candidate)
    return Plan(chosen, tuple(refused), total, sum(prices[candidate].gain for candidate in chosen))


def _greedy(
    ranked: Sequence[Candidate], budget: float | None, prices: Mapping[Candidate, Price]
) -> dict[str, Candidate]:
    """The first candidate of each node that fits, in this order."""
    taken: dict[str, Candidate] = {}
    total = 0.0
    for candidate in ranked:
        error = prices[candidate].error
        if candidate.node not in taken and (budget is None or total + error <= budget):
            taken[candidate.node] = candidate
            total += error
    return taken


def _upgrade(
    taken: dict[str, Candidate],
    ranked: Sequence[Candidate],
    budget: float | None,
    prices: Mapping[Candidate, Price],
    objective: str,
) -> None:
    """Exchange chosen candidates for clearly better ones of the same node while the budget lasts, best steps first."""
    while True:
        steps = []
        for candidate in ranked:
            current = taken.get(candidate.node)
            if current is None or not _is_clearly_better(prices[candidate], prices[current], objective):
                continue
            gain = gain_of(prices[candidate], objective) - gain_of(prices[current], objective)
            error = prices[candidate].error - prices[current].error
            steps.append((gain / max(error, _MINIMUM_ERROR), candidate))
        steps.sort(key=lambda item: -item[0])
        changed = False
        total = sum(prices[item].error for item in taken.values())
        for _, candidate in steps:
            current = taken[candidate.node]
            if not _is_clearly_better(prices[candidate], prices[current], objective):
                continue
            more = prices[candidate].error - prices[current].error
            if budget is None or total + more <= budget * (1 - _ROUNDING):
                taken[candidate.node] = candidate
                total += more
                changed = True
        if not changed:
            return


def pays(price: Price, objective: str) -> bool:
    """Whether a candidate alone gives anything: bytes, or more than the least share of the time."""
    if objective == "latency":
        return price.after.seconds < price.before.seconds * (1 - _LEAST)
    return price.saved_bytes > 0


def gain_of(price: Price, objective: str) -> float:
    """What a candidate gives: predicted seconds, or bytes."""
    return price.gain if objective == "latency" else float(price.saved_bytes)


def _is_clearly_better(new: Price, old: Price, objective: str) -> bool:
    """Faster (or smaller) by more than the predictions of two forms of one operator differ by chance.

    Of two forms with about the same error, the one that is predicted to be faster at all.
    """
    if objective == "latency":
        margin = 0.0 if new.error <= _SIMILAR * old.error else _CLEARLY
        return new.after.seconds < old.after.seconds * (1 - margin)
    return new.saved_bytes > old.saved_bytes * (1 + _CLEARLY)


def _left_out(error: float, total: float, budget: float | None, other: Candidate | None) -> Refusal:
    if other is not None:
        return Refusal("{} gives more within the budget", other.setting)
    assert budget is not None
    return Refusal("its error {:.2g} exceeds what is left of the budget, {:.2g}", error, budget - total)


def _does_not_pay(price: Price, objective: str) -> Refusal:
    if objective != "latency":
        return Refusal("saves no bytes")
    unit, per_second = ("ms", 1e3) if price.before.seconds >= 1e-3 else ("us", 1e6)
    after, before = price.after.seconds * per_second, price.before.seconds * per_second
    text = f"does not pay: predicted {{:.3g}} {unit}, now {{:.3g}} {unit} ({{}}-bound)"
    return Refusal(text, after, before, price.before.bound)
