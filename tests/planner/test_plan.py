"""The planner: greedy by gain per error, one candidate per node, under the budget; every "no" has its reason."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.ir.ledger import Refusal
from fxopt.ir.target import Prediction
from fxopt.passes.base import Candidate, Setting
from fxopt.planner.plan import Plan, Price, pays, plan

US = 1e-6


def candidate(node: str, kind: str = "static", refusal: Refusal | None = None) -> Candidate:
    return Candidate("quantize-linear", node, node, Setting.of("quantize-linear", activations=kind), refusal)


def price(before: float, after: float, error: float, saved: int = 0) -> Price:
    """Times in microseconds."""

    def seconds(value: float) -> Prediction:
        return Prediction(value * US, value * US, value * US, "memory")

    return Price(seconds(before), seconds(after), error, saved)


def chosen(found: Plan) -> list[tuple[str, str]]:
    return [(row.node, row.setting["activations"]) for row in found.chosen]


def reasons(found: Plan) -> dict[tuple[str, str], str]:
    return {(row.node, row.setting["activations"]): str(reason) for row, reason in found.refused}


A, B, C = candidate("a"), candidate("b"), candidate("c")
PRICES = {A: price(10, 4, 0.01), B: price(10, 9, 0.001), C: price(10, 2, 0.02)}  # gain per error: 600, 1000, 400


def test_takes_everything_that_fits() -> None:
    found = plan([A, B, C], 0.05, PRICES)
    assert found.chosen == (A, B, C) and not found.refused
    assert found.error == pytest.approx(0.031) and found.gain == pytest.approx(15 * US)


def test_the_best_gain_per_error_comes_first() -> None:
    found = plan([C, A, B], 0.015, PRICES)
    assert found.chosen == (A, B)  # in the order they were given
    assert reasons(found) == {("c", "static"): "its error 0.02 exceeds what is left of the budget, 0.004"}


def test_what_does_not_fit_does_not_end_the_search() -> None:
    wide, narrow = candidate("wide"), candidate("narrow")
    found = plan([wide, narrow], 0.01, {wide: price(100, 1, 0.02), narrow: price(10, 9.5, 0.01)})
    assert found.chosen == (narrow,)


@pytest.mark.parametrize(
    ("budget", "after", "kind"),
    [(1.0, 4, "static"), (None, 4, "static"), (0.0095, 4, "dynamic"), (1.0, 5.9, "dynamic"), (None, 5.9, "dynamic")],
)
def test_one_setting_per_node(budget: float | None, after: float, kind: str) -> None:
    """The better one per error; what is left of the budget goes to a clearly faster one."""
    dynamic, static = candidate("a", "dynamic"), candidate("a", "static")
    found = plan([dynamic, static], budget, {dynamic: price(10, 6, 0.001), static: price(10, after, 0.01)})
    assert chosen(found) == [("a", kind)]
    other = "static" if kind == "dynamic" else "dynamic"
    assert reasons(found) == {("a", other): f"quantize-linear{{activations={kind}}} gives more within the budget"}


def test_exchanges_keep_to_the_budget() -> None:
    """There is enough for one of two exchanges: the one that gains more per error."""
    nodes = [(candidate(name, "dynamic"), candidate(name, "static")) for name in "ab"]
    prices = {}
    for (dynamic, static), after in zip(nodes, (3, 1), strict=True):
        prices[dynamic], prices[static] = price(10, 6, 0.001), price(10, after, 0.01)
    found = plan([item for pair in nodes for item in pair], 0.012, prices)
    assert chosen(found) == [("a", "dynamic"), ("b", "static")]
    assert found.error == pytest.approx(0.011)


def test_the_second_setting_is_taken_when_the_first_exceeds_the_budget() -> None:
    dynamic, static = candidate("a", "dynamic"), candidate("a", "static")
    prices = {dynamic: price(10, 9, 0.001), static: price(100, 1, 0.05)}
    found = plan([dynamic, static], 0.01, prices)
    assert chosen(found) == [("a", "dynamic")]
    assert reasons(found) == {("a", "static"): "quantize-linear{activations=dynamic} gives more within the budget"}


@pytest.mark.parametrize("after", [9.9, 10.0, 12.5])
def test_what_does_not_pay_is_refused_with_both_times(after: float) -> None:
    found = plan([A], None, {A: price(10, after, 0.0)})
    assert not found.chosen
    assert reasons(found) == {("a", "static"): f"does not pay: predicted {after:.3g} us, now 10 us (memory-bound)"}


def test_refusals_pass_through() -> None:
    refused = candidate("a", refusal=Refusal("the weight is empty"))
    found = plan([refused], None, {})
    assert not found.chosen and found.refused == ((refused, Refusal("the weight is empty")),)


def test_without_a_budget_every_error_is_accepted() -> None:
    huge = candidate("huge")
    found = plan([huge], None, {huge: price(10, 9, float("inf"))})
    assert found.chosen == (huge,)
    assert not plan([huge], 1e9, {huge: price(10, 9, float("inf"))}).chosen


@pytest.mark.parametrize("budget", [None, 0.02])
def test_an_unknown_error_is_never_accepted(budget: float | None) -> None:
    found = plan([A, B], budget, {A: price(10, 1, math.nan), B: price(10, 1, 0.001)})
    assert found.chosen == (B,) and found.error == 0.001
    assert reasons(found) == {("a", "static"): "its error cannot be estimated"}


def test_a_budget_of_nothing_accepts_what_is_exact() -> None:
    found = plan([A, B], 0.0, {A: price(10, 4, 0.0), B: price(10, 1, 1e-9)})
    assert found.chosen == (A,)
    assert "exceeds what is left of the budget, 0" in reasons(found)["b", "static"]


def test_size_is_another_objective() -> None:
    slower, nothing = candidate("slower"), candidate("nothing")
    prices = {slower: price(10, 20, 0.001, saved=300), nothing: price(10, 1, 0.001, saved=0)}
    found = plan([slower, nothing], 0.02, prices, objective="size")
    assert found.chosen == (slower,)
    assert reasons(found) == {("nothing", "static"): "saves no bytes"}


def test_size_is_what_counts_per_error_then() -> None:
    small, large = candidate("small"), candidate("large")
    prices = {small: price(10, 1, 0.01, saved=10), large: price(10, 9, 0.01, saved=1000)}
    assert plan([small, large], 0.01, prices, objective="size").chosen == (large,)
    assert plan([small, large], 0.01, prices).chosen == (small,)


def test_a_candidate_that_is_offered_twice_is_chosen_once() -> None:
    found = plan([A, candidate("a")], None, PRICES)
    assert found.chosen == (A,) and not found.refused
    assert found.gain == pytest.approx(6 * US)


def test_nothing_offered() -> None:
    assert plan([], 0.02, {}) == Plan((), (), 0.0, 0.0)


ERRORS = st.one_of(st.just(0.0), st.floats(1e-12, 10.0), st.just(float("inf")))
TIMES = st.floats(0.0, 1e3)


@st.composite
def priced(draw: st.DrawFn) -> tuple[list[Candidate], dict[Candidate, Price]]:
    """Up to twelve candidates on up to five nodes."""
    keys = draw(
        st.lists(
            st.tuples(st.integers(0, 4), st.sampled_from(["dynamic", "static", "weights"])), max_size=12, unique=True
        )
    )
    found = [
        candidate(f"n{node}", kind, draw(st.sampled_from([None, None, None, Refusal("no")]))) for node, kind in keys
    ]
    return found, {
        row: price(draw(TIMES), draw(TIMES), draw(ERRORS), draw(st.integers(-5, 1000)))
        for row in found
        if row.refusal is None
    }


@settings(max_examples=200, deadline=None)
@given(
    case=priced(),
    budget=st.one_of(st.none(), st.floats(0.0, 5.0)),
    objective=st.sampled_from(["latency", "size"]),
)
def test_what_holds_for_every_plan(
    case: tuple[list[Candidate], dict[Candidate, Price]], budget: float | None, objective: str
) -> None:
    candidates, prices = case
    found = plan(candidates, budget, prices, objective=objective)
    assert found == plan(candidates, budget, prices, objective=objective)
    assert budget is None or found.error <= budget
    assert len({row.node for row in found.chosen}) == len(found.chosen)
    assert sorted(map(str, (*found.chosen, *(row for row, _ in found.refused)))) == sorted(map(str, candidates))
    assert all(str(reason) for _, reason in found.refused)
    for row in found.chosen:
        assert row.refusal is None
        assert prices[row].gain > 0 if objective == "latency" else prices[row].saved_bytes > 0
    left = [row for row, _ in found.refused if row.refusal is None]
    taken = {row.node for row in found.chosen}
    for row in left:  # nothing was left out that pays, is the only one of its node, and fits
        if pays(prices[row], objective) and row.node not in taken:
            assert budget is not None and not found.error + prices[row].error <= budget


@settings(max_examples=100, deadline=None)
@given(case=priced(), budget=st.floats(0.0, 5.0), order=st.randoms(use_true_random=False))
def test_without_ties_the_order_of_the_candidates_does_not_matter(
    case: tuple[list[Candidate], dict[Candidate, Price]], budget: float, order: object
) -> None:
    candidates, prices = case
    ratios = [row.gain / max(row.error, 1e-12) for row in prices.values()]
    if len(set(ratios)) < len(ratios):
        return
    shuffled = list(candidates)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert set(plan(candidates, budget, prices).chosen) == set(plan(shuffled, budget, prices).chosen)


@pytest.mark.parametrize(("error", "kind"), [(0.0015, "static"), (0.0025, "dynamic")])
def test_of_about_equal_errors_the_faster_form_is_taken(error: float, kind: str) -> None:
    """Estimates of one operator's error do not tell a factor of two from chance."""
    dynamic, static = candidate("a", "dynamic"), candidate("a", "static")
    found = plan([dynamic, static], 1.0, {dynamic: price(10, 5, 0.001), static: price(10, 4.9, error)})
    assert chosen(found) == [("a", kind)]
