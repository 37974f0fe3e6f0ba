"""Choose among the candidates of all lossy passes: greedy by gain per error, under one budget.

Predicted errors add (noise to signal of independent rewrites); the measured total decides afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxopt.ir.ledger import Refusal
from fxopt.ir.target import Prediction
from fxopt.passes.base import Candidate

_MINIMUM_ERROR = 1e-12  # an exact candidate has the best ratio, not an infinite one


@dataclass(frozen=True)
class Price:
    """What a candidate costs and gives: predicted seconds before and after, output noise to signal, bytes saved."""

    before: Prediction
    after: Prediction
    error: float
    saved_bytes: int = 0

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


def plan(
    candidates: Sequence[Candidate],
    budget: float | None,
    prices: Mapping[Candidate, Price],
    *,
    objective: str = "latency",
    error_scale: float = 1.0,
) -> Plan:
    """Choose at most one candidate per node so that predicted errors stay within the budget.

    Args:
        candidates: of all passes; those with a refusal are passed through.
        budget: largest accepted sum of errors; None accepts every error.
        prices: of every candidate without a refusal.
        objective: what must improve: "latency" (seconds) or "size" (bytes).
        error_scale: measured over predicted error of an earlier plan.
    """
    refused: list[tuple[Candidate, Refusal]] = []
    worth: list[tuple[float, Candidate]] = []
    for candidate in dict.fromkeys(candidates):
        if candidate.refusal is not None:
            refused.append((candidate, candidate.refusal))
            continue
        price = prices[candidate]
        gain = price.gain if objective == "latency" else float(price.saved_bytes)
        if not gain > 0:
            refused.append((candidate, _does_not_pay(price, objective)))
        elif math.isnan(price.error):
            refused.append((candidate, Refusal("its error cannot be estimated")))
        else:
            worth.append((gain / max(price.error, _MINIMUM_ERROR), candidate))
    worth.sort(key=lambda item: -item[0])
    taken: dict[str, Candidate] = {}
    total = 0.0
    for _, candidate in worth:
        error = prices[candidate].error * error_scale
        other = taken.get(candidate.node)
        if other is not None:
            refused.append((candidate, Refusal("{} gives more per error", other.setting)))
        elif budget is not None and total + error > budget:
            refused.append(
                (
                    candidate,
                    Refusal("its error {:.2g} exceeds what is left of the budget, {:.2g}", error, budget - total),
                )
            )
        else:
            taken[candidate.node] = candidate
            total += error
    chosen = tuple(candidate for candidate in dict.fromkeys(candidates) if taken.get(candidate.node) == candidate)
    return Plan(chosen, tuple(refused), total, sum(prices[candidate].gain for candidate in chosen))


def _does_not_pay(price: Price, objective: str) -> Refusal:
    if objective != "latency":
        return Refusal("saves no bytes")
    return Refusal(
        "does not pay: predicted {:.3g} us, now {:.3g} us ({}-bound)",
        price.after.seconds * 1e6,
        price.before.seconds * 1e6,
        price.before.bound,
    )
