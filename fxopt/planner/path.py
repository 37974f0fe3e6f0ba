"""From everything that pays to nothing: the plans on the way, each with less error than the one before.

Each step undoes (or exchanges, for a more exact one of the same node) what takes the most error per second. Steps know
about conversions: what is left in floats between 8-bit neighbours costs more than it gives back, and next to what is in
floats already it costs less. So runs at the ends go first where their errors are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fxopt.passes.base import Candidate
from fxopt.passes.crossings import Crossings
from fxopt.planner.plan import Price, gain_of, pays

_TINY = 1e-12
_MANY = 128  # candidates: of more than these, only pairs are left out together
_STALE = 12  # steps whose ratio is computed anew before one is taken

Taken = dict[str, Candidate]
Step = tuple[tuple[str, Candidate | None], ...]  # what becomes of some nodes


class Path:
    """The plans between a start and nothing, of one set of prices."""

    def __init__(
        self,
        start: Sequence[Candidate],
        prices: Mapping[Candidate, Price],
        objective: str = "latency",
        crossings: Crossings | None = None,
    ) -> None:
        self.prices = prices
        self.objective = objective
        self.crossings = crossings if objective == "latency" else None
        self.offers: dict[str, list[Candidate]] = {}
        for candidate, price in prices.items():
            if pays(price, objective):
                self.offers.setdefault(candidate.node, []).append(candidate)
        self._near: dict[str, set[str]] = {}  # nodes whose conversions depend on each other
        self.start: Taken = {candidate.node: candidate for candidate in start}
        self._order: list[str] = list(self.start)
        if self.crossings is not None:
            place = {name: index for index, name in enumerate(self.crossings.order)}
            self._order.sort(key=lambda name: place.get(name, -1))
            for one, other in self.crossings.neighbours():
                self._near.setdefault(one, set()).add(other)
                self._near.setdefault(other, set()).add(one)
        self.states, self.errors = self._of_use([state for longest in self._lengths() for state in self._walk(longest)])

    def _lengths(self) -> tuple[int, ...]:
        """The lengths up to which runs are left out at once: long ones see further, short ones stop nearer a budget."""
        if self.crossings is None:
            return (1,)
        return (1, 2, 4, 8) if len(self.start) <= _MANY else (2,)

    def _of_use(self, states: list[Taken]) -> tuple[list[Taken], list[float]]:
        """The start, those that are faster than every other of no more error, and nothing; by falling errors."""
        found = sorted(((self.error(state), -self.gain(state), state) for state in states), key=lambda item: item[:2])
        kept: list[tuple[Taken, float]] = []
        best = -math.inf
        for error, loss, state in found:
            if -loss > best:
                best = -loss
                kept.append((state, error))
        if kept[0][0]:
            kept.insert(0, ({}, 0.0))
        if kept[-1][0] != self.start:
            kept.append((self.start, self.error(self.start)))
        kept.reverse()
        return [state for state, _ in kept], [error for _, error in kept]

    def error(self, taken: Taken) -> float:
        """Predicted error of a plan, with that of convolutions which run in 8 bits although they are not taken."""
        lone = self._lone(taken)
        total = sum(self.prices[candidate].error for candidate in taken.values())
        return total + sum(self.prices[self.start[name]].error for name in lone if name in self.start)

    def gain(self, taken: Taken) -> float:
        """Predicted seconds (or bytes) saved, conversions included."""
        gain = sum(gain_of(self.prices[candidate], self.objective) for candidate in taken.values())
        if self.crossings is None:
            return gain
        return gain - self.crossings.of(_static(taken))[0]

    def _lone(self, taken: Taken) -> frozenset[str]:
        return frozenset() if self.crossings is None else self.crossings.of(_static(taken))[1]

    def _walk(self, longest: int) -> list[Taken]:
        state = dict(self.start)
        states = [state]
        ratios = {step: self._ratio(state, step) for step in self._steps(longest)}
        while state:
            step = self._best(state, ratios)
            if step is None:
                step = tuple((name, None) for name in list(state)[:1])  # of no use by itself: the walk has to end
            state = _after(state, step)
            states.append(state)
            touched = {name for name, _ in step}
            for other in ratios:
                if any(name in touched for name, _ in other) or self._is_near(other, touched):
                    ratios[other] = self._ratio(state, other)
        return states

    def _best(self, state: Taken, ratios: dict[Step, float]) -> Step | None:
        """The step with the most error per second; ratios of steps far from the last ones may be out of date."""
        for _ in range(_STALE):
            best = max(ratios, key=lambda step: ratios[step], default=None)
            if best is None or ratios[best] <= 0.0:
                return None
            now = self._ratio(state, best)
            if now >= ratios[best]:
                return best
            ratios[best] = now
        return max(ratios, key=lambda step: ratios[step])

    def _steps(self, longest: int) -> list[Step]:
        """One node exchanged for what is more exact; runs of nodes left out together."""
        steps: list[Step] = [
            ((name, candidate),)
            for name, current in self.start.items()
            for candidate in self.offers.get(name, ())
            if self.prices[candidate].error < self.prices[current].error
        ]
        count = len(self._order)
        for first in range(count):
            for end in range(first + 1, min(first + longest, count) + 1):
                steps.append(tuple((name, None) for name in self._order[first:end]))
        return steps

    def _is_near(self, step: Step, touched: set[str]) -> bool:
        return any(not touched.isdisjoint(self._near.get(name, ())) for name, _ in step)

    def _ratio(self, state: Taken, step: Step) -> float:
        """Error taken per second lost; 0 where the step takes none."""
        if any(name not in state or state[name] == candidate for name, candidate in step):
            return 0.0
        after = _after(state, step)
        less = self.error(state) - self.error(after)
        lost = self.gain(state) - self.gain(after)
        return less / max(lost, _TINY) if less > 0.0 else 0.0


def _after(state: Taken, step: Step) -> Taken:
    after = dict(state)
    for name, candidate in step:
        if candidate is None:
            after.pop(name, None)
        else:
            after[name] = candidate
    return after


def _static(taken: Taken) -> list[str]:
    return [name for name, candidate in taken.items() if candidate.setting.get("activations", "static") == "static"]
