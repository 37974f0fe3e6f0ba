"""Smaller plans: each has less error and gains less than the one before; conversions make runs go together."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.ir.target import Cost
from fxopt.passes.base import Candidate
from fxopt.passes.crossings import Crossings, Place
from fxopt.planner.path import Path
from fxopt.planner.plan import Price
from tests.planner.test_plan import US, candidate, price


def chain(*elements: int) -> Crossings:
    """An input, then static convolutions c0, c1, ... one behind the other, then a float operator."""
    places = [Place((), elements=1)]
    for index, count in enumerate(elements):
        places.append(Place((index,), f"c{index}", "gives", count))
    places.append(Place((len(elements),), elements=1))
    return Crossings(places, lambda cost: cost.bytes * 1e-9)


def taken(path: Path) -> list[list[str]]:
    return [sorted(state) for state in path.states]


def test_the_most_error_per_second_goes_first() -> None:
    a, b, c = (candidate(name) for name in "abc")
    prices = {a: price(10, 4, 0.01), b: price(10, 9, 0.001), c: price(10, 2, 0.02)}
    path = Path([a, b, c], prices)
    assert taken(path) == [["a", "b", "c"], ["a", "b"], ["b"], []]
    assert path.errors == pytest.approx([0.031, 0.011, 0.001, 0.0])


def test_a_more_exact_form_comes_before_none() -> None:
    static, dynamic, slow = candidate("a"), candidate("a", "dynamic"), candidate("a", "slow")
    prices = {static: price(10, 2, 0.02), dynamic: price(10, 3, 0.001), slow: price(10, 10, 0.0)}
    path = Path([static], prices)
    assert path.states == [{"a": static}, {"a": dynamic}, {}]  # what does not pay is never taken


def test_a_layer_between_others_is_not_left_out_alone() -> None:
    """ONNX Runtime would quantise it all the same; with its neighbour it is in floats."""
    found = [candidate(f"c{index}") for index in range(5)]
    errors = [0.001, 0.001, 0.05, 0.001, 0.001]
    prices = {item: price(100, 30, error) for item, error in zip(found, errors, strict=True)}
    path = Path(found, prices, crossings=chain(100, 100, 100, 100, 100))
    less = next(state for state, error in zip(path.states, path.errors, strict=True) if error < 0.01)
    assert "c2" not in less and len(less) == 3
    assert path.error({item.node: item for item in found if item.node != "c2"}) == pytest.approx(sum(errors))


def test_it_is_cheaper_to_cut_where_values_are_small() -> None:
    """Both ends have the same error; what the second layer gives is large."""
    found = [candidate(f"c{index}") for index in range(4)]
    prices = {item: price(100, 90, 0.01) for item in found}
    path = Path(found, prices, crossings=chain(100_000, 100, 100, 100))
    assert taken(path)[1] == ["c0", "c1", "c2"]
    last_is_large = Path(found, prices, crossings=chain(100, 100, 100_000, 100))
    assert taken(last_is_large)[1] == ["c1", "c2", "c3"]


def test_size_knows_no_conversions() -> None:
    found = [candidate(f"c{index}") for index in range(3)]
    prices = {item: price(1, 1, 0.01 * (index == 1) + 0.001, 100) for index, item in enumerate(found)}
    assert taken(Path(found, prices, "size", chain(9, 9, 9)))[1] == ["c0", "c2"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000), st.integers(1, 10**5)), min_size=1, max_size=9))
def test_errors_and_gains_fall(layers: list[tuple[int, int, int]]) -> None:
    prices: dict[Candidate, Price] = {}
    for index, (after, error, _) in enumerate(layers):
        prices[candidate(f"c{index}")] = price(60, after, error * 1e-5)
    for crossings in (None, chain(*(elements for _, _, elements in layers))):
        path = Path(list(prices), prices, crossings=crossings)
        assert path.states[0] == {item.node: item for item in prices} and path.states[-1] == {}
        assert path.errors == sorted(path.errors, reverse=True)
        gains = [path.gain(state) for state in path.states[1:]]
        assert gains == sorted(gains, reverse=True) and gains[-1] == 0.0
        assert all(
            math.isclose(error, path.error(state)) for state, error in zip(path.states, path.errors, strict=True)
        )


def test_gain_takes_conversions_off() -> None:
    found = [candidate("c0"), candidate("c1")]
    prices = {item: price(100, 30, 0.01) for item in found}
    path = Path(found, prices, crossings=chain(1000, 1000))
    seconds = path.crossings.predict(Cost(0.0, 40 * 1001)) if path.crossings is not None else 0.0
    assert path.gain(path.start) == pytest.approx(140 * US - seconds)
