"""The guard: ratios of interleaved bursts with an honest interval, in bounded time. Most tests run on a made-up clock."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fxopt.guard as guard
from fxopt.guard import measure, measure_many


class Clock:
    """Stands for the `time` module: only calls and rests take time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.rested = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.rested += seconds

    def takes(
        self, seconds: Callable[[], float] | float, log: list[str] | None = None, name: str = ""
    ) -> Callable[[], None]:
        """A function that takes so long."""

        def call() -> None:
            self.now += seconds() if callable(seconds) else seconds
            if log is not None:
                log.append(name)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(guard, "time", made)
    return made


def test_the_ratio_of_steady_calls(clock: Clock) -> None:
    found = measure(clock.takes(3e-3), clock.takes(2e-3), 2.0)
    assert (found.baseline, found.result) == (pytest.approx(3e-3), pytest.approx(2e-3))
    assert found.ratio == found.low == found.high == pytest.approx(1.5)
    assert found.bursts >= 5


def test_more_than_one_is_faster(clock: Clock) -> None:
    assert measure(clock.takes(1e-3), clock.takes(2e-3), 1.0).ratio == pytest.approx(0.5)


def test_a_real_clock() -> None:
    found = measure(lambda: time.sleep(0.006), lambda: time.sleep(0.002), 1.0)
    assert 1.5 < found.ratio < 4.5 and found.low <= found.ratio <= found.high
    assert found.baseline >= 0.006 and found.result >= 0.002


def test_bursts_alternate_and_the_first_calls_are_dropped(clock: Clock) -> None:
    """The first three calls after a change of the competitor are slow; who goes first changes every time."""
    log: list[str] = []
    run = {"a": 0, "b": 0}

    def duration(name: str, seconds: float) -> Callable[[], float]:
        def now() -> float:
            run[name] = run[name] + 1 if log and log[-1] == name else 1
            return seconds * (50 if run[name] <= 3 else 1)

        return now

    found = measure(clock.takes(duration("a", 2e-3), log, "a"), clock.takes(duration("b", 1e-3), log, "b"), 10.0)
    assert found.ratio == pytest.approx(2.0) and found.low == pytest.approx(2.0) == found.high
    bursts = [(name, len(list(calls))) for name, calls in itertools.groupby(log[4:])]  # after the warm-up
    size = bursts[0][1]
    assert [name for name, _ in bursts[:4]] == ["a", "b", "a", "b"]
    assert all(calls == 2 * size for _, calls in bursts[1:-1])  # a b, b a, a b: each goes first in turn


def test_a_drift_of_the_machine_hits_both(clock: Clock) -> None:
    """Everything becomes slower all the time: the ratio stays."""
    start = clock.now
    found = measure(
        clock.takes(lambda: 2e-3 * (1 + (clock.now - start))),
        clock.takes(lambda: 1e-3 * (1 + (clock.now - start))),
        5.0,
    )
    assert found.ratio == pytest.approx(2.0, rel=0.02)
    assert found.low == pytest.approx(2.0, rel=0.2)


def test_equal_noisy_calls_are_not_called_faster(clock: Clock) -> None:
    """Over many measurements of equal competitors the lower bound exceeds 1 in about 5 %; 10 % are allowed here."""
    generator = random.Random(0)

    def noisy() -> float:
        return 1e-3 * (1 + generator.expovariate(5))

    wrong = sum(measure(clock.takes(noisy), clock.takes(noisy), 0.3).low > 1.0 for _ in range(300))
    assert wrong <= 30


def test_the_interval_contains_the_true_ratio(clock: Clock) -> None:
    generator = random.Random(1)

    def call(seconds: float) -> Callable[[], None]:
        return clock.takes(lambda: seconds * (1 + generator.expovariate(5)))

    found = [measure(call(1.3e-3), call(1e-3), 0.3) for _ in range(300)]
    inside = sum(timing.low <= 1.3 <= timing.high for timing in found)
    assert inside >= 255  # 85 %: 90 % less three standard deviations
    assert all(timing.low <= timing.ratio <= timing.high for timing in found)


@pytest.mark.parametrize("call", [1e-7, 1e-5, 1e-3, 0.03, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("seconds", [0.2, 1.0, 10.0])
def test_the_time_is_bounded(clock: Clock, call: float, seconds: float) -> None:
    """About the time that was given; when calls are long, five pairs within twice the time, or three."""
    begin = clock.now
    found = measure(clock.takes(call), clock.takes(2 * call), seconds)
    spent = clock.now - begin
    pair = 3 * call
    assert spent <= max(1.5 * seconds + 0.4, 5 * pair + 2 * seconds + 0.4, 5 * pair + 0.4)
    assert spent <= 2 * seconds + 6 * pair + 0.4
    assert found.bursts >= (5 if 7 * pair < seconds else 3)
    assert found.bursts <= 40
    assert found.ratio == pytest.approx(0.5)


def test_short_calls_do_not_take_all_the_time(clock: Clock) -> None:
    begin = clock.now
    measure(clock.takes(1e-6), clock.takes(1e-6), 60.0)
    assert clock.now - begin < 5


def test_an_exception_is_not_swallowed(clock: Clock) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure(clock.takes(1e-3), broken, 1.0)


# ---- the interval


def below(count: int, successes: int) -> float:
    """P(at most so many of `count` fair coins)."""
    return sum(math.comb(count, index) for index in range(successes + 1)) / 2**count


@pytest.mark.parametrize("count", range(1, 60))
def test_the_interval_is_that_of_the_sign_test(count: int) -> None:
    ratios = [float(index) for index in range(1, count + 1)]
    low, high = guard._interval(ratios)
    rank = int(low)
    assert high == count + 1 - rank
    if count < 5:
        assert rank == 1
        return
    assert 2 * below(count, rank - 1) <= 0.1  # covers the median with 90 %
    assert 2 * below(count, rank) > 0.1  # and the next narrower one does not


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=50))
def test_the_interval_lies_around_the_median(ratios: list[float]) -> None:
    import statistics

    low, high = guard._interval(sorted(ratios))
    assert min(ratios) <= low <= statistics.median(ratios) <= high <= max(ratios)


# ---- many competitors


def test_many(clock: Clock) -> None:
    log: list[str] = []
    times = {"a": 1e-3, "b": 2e-3, "c": 4e-3}
    found = measure_many({name: clock.takes(seconds, log, name) for name, seconds in times.items()}, 2.0)
    assert list(found) == ["a", "b", "c"]
    for name, seconds in times.items():
        assert found[name].median == found[name].minimum == pytest.approx(seconds)
        assert found[name].bursts >= 5
    assert len({row.bursts for row in found.values()}) == 1


def test_many_report_the_fastest_burst_too(clock: Clock) -> None:
    durations = iter([1e-3 * (1 + index / 1000) for index in range(10_000)])
    found = measure_many({"only": clock.takes(lambda: next(durations))}, 1.0)["only"]
    assert found.minimum < found.median


@pytest.mark.parametrize("call", [1e-6, 1e-2, 2.0])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_time_for_many_is_bounded(clock: Clock, call: float, count: int) -> None:
    begin = clock.now
    measure_many({str(index): clock.takes(call) for index in range(count)}, 4.0)
    assert clock.now - begin <= 8 + (count * call) * 6 + 0.03 * count * 45
