"""Time competitors in alternating bursts, of which some run in processes of their own.

Each competitor is asked for a burst of calls in turn, rests, and the next one follows (as in `fxopt.guard`, whose
burst sizes these are); the whole is repeated, and a ratio is the median over the repeats, with the extremes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Burst = Callable[[int, int], list[float]]  # (calls dropped, calls timed) -> seconds of each timed call
RUNS = 5
_REST = 0.02  # seconds
_DROPPED = 3
_LEAST, _MOST = 3, 20  # timed calls of a burst
_ROUNDS = 3  # bursts of each competitor in a run, at least


def local(call: Callable[[], object]) -> Burst:
    """A competitor of this process."""

    def burst(dropped: int, timed: int) -> list[float]:
        times = []
        for _ in range(dropped + timed):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return times[dropped:]

    return burst


def race(competitors: Mapping[str, Burst], base: str, seconds: float, runs: int = RUNS) -> dict[str, dict[str, Any]]:
    """Speed of every competitor over `base`, in about `seconds`.

    Returns:
        For each name: `milliseconds` (median), `ratio_of_medians` (median of the runs), `low` and `high` (its extremes
        over the runs), `ratio_of_minima`, `runs`, `bursts`.
    """
    once = sum(statistics.median(burst(1, 1)) for burst in competitors.values())
    budget = seconds / runs
    timed = max(_LEAST, min(_MOST, int(budget / (_ROUNDS * max(once, 1e-9))) - _DROPPED))
    dropped = min(_DROPPED, timed)
    found = [_run(competitors, dropped, timed, budget) for _ in range(runs)]
    every = {name: [burst for times in found for burst in times[name]] for name in competitors}
    rows = {}
    for name in competitors:
        ratios = [statistics.median(times[base]) / statistics.median(times[name]) for times in found]
        rows[name] = {
            "milliseconds": 1e3 * statistics.median(every[name]),
            "ratio_of_medians": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "ratio_of_minima": min(every[base]) / min(every[name]),
            "runs": runs,
            "bursts": len(every[name]),
        }
    return rows


def _run(competitors: Mapping[str, Burst], dropped: int, timed: int, seconds: float) -> dict[str, list[float]]:
    """The median of every burst."""
    found: dict[str, list[float]] = {name: [] for name in competitors}
    begin = time.perf_counter()
    rounds = 0
    while rounds < _ROUNDS or time.perf_counter() - begin < seconds:
        for name in list(competitors) if rounds % 2 == 0 else reversed(list(competitors)):
            found[name].append(statistics.median(competitors[name](dropped, timed)))
            time.sleep(_REST)
        rounds += 1
    return found
