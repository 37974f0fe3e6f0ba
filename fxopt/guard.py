"""The guard: baseline and result measured interleaved in bursts, on the machine that the result is for.

Thread pools of several sessions in one process spin after a call and slow each other, so one competitor runs a burst
of calls (the first ones dropped), rests, and the next one follows; ratios are taken between neighbouring bursts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_DROPPED = 3  # first calls of a burst
_REST = 0.02  # seconds between bursts
_MAX_CALLS = 20
_MAX_SHORT_CALLS = 500  # of a model whose calls take microseconds
_SHORT_BURST = 0.01  # seconds
_PLANNED_BURSTS = 8  # that the size of one is chosen for
_MIN_BURSTS = 5
_FEWEST_BURSTS = 3  # when one call takes about as long as was given for all
_CLEAR_BURSTS = 10  # from here on a clear ratio ends the measurement
_CLEAR = 0.03
_MAX_BURSTS = 40


@dataclass(frozen=True)
class Timing:
    """Seconds per call of both, and the ratio baseline / result with its confidence interval (higher is faster)."""

    baseline: float
    result: float
    ratio: float
    low: float
    high: float
    bursts: int


def measure(baseline: Callable[[], object], result: Callable[[], object], seconds: float = 10.0) -> Timing:
    """Time both in alternating bursts, for at most about `seconds`, or until the ratio is clear.

    A burst counts as its lower quartile: other processes only ever make calls slower.
    `low` and `high` are order statistics of the per-pair ratios that bound their median with at least 90 % confidence
    (sign test); with fewer than five pairs they are the extremes.
    """
    size = _burst_size((baseline, result), seconds)
    begin = time.perf_counter()
    first: list[float] = []
    second: list[float] = []
    while _goes_on(len(first), begin, seconds):
        if len(first) >= _CLEAR_BURSTS and _is_clear(first, second):
            break
        if len(first) % 2:  # alternate which one goes first: a drift of the machine hits both
            second.append(_burst(result, size))
            first.append(_burst(baseline, size))
        else:
            first.append(_burst(baseline, size))
            second.append(_burst(result, size))
    ratios = _ratios(first, second)
    low, high = _interval(ratios)
    return Timing(
        statistics.median(first), statistics.median(second), statistics.median(ratios), low, high, len(ratios)
    )


def _ratios(first: list[float], second: list[float]) -> list[float]:
    return sorted(a / b for a, b in zip(first, second, strict=True))


def _is_clear(first: list[float], second: list[float]) -> bool:
    low, high = _interval(_ratios(first, second))
    return low > 1.0 + _CLEAR or high < 1.0 - _CLEAR


@dataclass(frozen=True)
class _Size:
    """Calls of a burst that are timed, and calls before them that are not."""

    timed: int
    dropped: int


def _burst(call: Callable[[], object], size: _Size) -> float:
    times = []
    for _ in range(size.dropped + size.timed):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    time.sleep(_REST)
    return sorted(times[size.dropped :])[size.timed // 4]


def _burst_size(calls: Sequence[Callable[[], object]], seconds: float) -> _Size:
    """As many calls as let eight bursts of each fit into the time; of few, half are dropped."""
    for call in calls:
        call()
    begin = time.perf_counter()
    for call in calls:
        call()
    together = max(time.perf_counter() - begin, 1e-6)
    most = max(_MAX_CALLS, min(_MAX_SHORT_CALLS, int(_SHORT_BURST / together)))
    count = max(1, int(seconds / (_PLANNED_BURSTS * together)))
    dropped = min(_DROPPED, count // 2)
    return _Size(min(most, count - dropped), dropped)


def _goes_on(bursts: int, begin: float, seconds: float) -> bool:
    """Whether there is time for one more burst of each; fewer than five are enough only far behind the time."""
    spent = time.perf_counter() - begin
    if bursts < _MIN_BURSTS:
        return bursts < _FEWEST_BURSTS or spent < 2 * seconds
    return bursts < _MAX_BURSTS and spent < seconds


def _interval(ratios: list[float]) -> tuple[float, float]:
    """The order statistics around the median that a sign test at 10 % leaves."""
    count = len(ratios)
    tail, term, rank = 0.0, 0.5**count, 0
    for index in range(count // 2):
        if tail + term > 0.05:
            break
        tail += term
        term = term * (count - index) / (index + 1)
        rank = index + 1
    rank = max(rank, 1)
    return ratios[rank - 1], ratios[count - rank]


@dataclass(frozen=True)
class Times:
    """Seconds per call of one competitor: median over the bursts (each its lower quartile), and the fastest burst."""

    median: float
    minimum: float
    bursts: int


def measure_many(calls: Mapping[str, Callable[[], object]], seconds: float = 10.0) -> dict[str, Times]:
    """Time any number of competitors in alternating bursts for about `seconds`."""
    names = list(calls)
    size = _burst_size(list(calls.values()), seconds)
    found: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    rounds = 0
    while _goes_on(rounds, begin, seconds):
        for name in names if rounds % 2 == 0 else reversed(names):
            found[name].append(_burst(calls[name], size))
        rounds += 1
    return {name: Times(statistics.median(times), min(times), len(times)) for name, times in found.items()}
