"""The whole ONNX backend suite through `fxopt.onnx_backend`.

`suite_exceptions.txt` names every case that does not pass without another evaluator, with the reason. The list may only
shrink: a listed case that passes natively fails the test, and so does a case that is not listed and does not.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.onnx_suite import LIMIT_SECONDS, Outcome, is_evaluator, report, run_suite, table, why

EXCEPTIONS = Path(__file__).with_name("suite_exceptions.txt")
PASSED, NATIVE = 2023, 2023  # at least, with Pillow
NEEDS_PILLOW = "needs Pillow"

pytestmark = pytest.mark.slow


@cache
def outcomes() -> dict[str, Outcome]:
    torch.manual_seed(0)  # of what is random without a seed
    return run_suite()


def has_pillow() -> bool:
    return importlib.util.find_spec("PIL") is not None


def exceptions() -> dict[str, str]:
    """Reason by case; those that need Pillow are none where it is installed."""
    lines = [line for line in EXCEPTIONS.read_text().splitlines() if line and not line.startswith("#")]
    listed = dict(line.split(": ", 1) for line in lines)
    assert list(listed) == sorted(listed)
    return {name: reason for name, reason in listed.items() if not (has_pillow() and reason == NEEDS_PILLOW)}


def test_every_case_passes_natively_or_is_listed() -> None:
    failing = {
        name: why(outcome)
        for name, outcome in outcomes().items()
        if not outcome.is_native and name not in exceptions()
    }
    assert failing == {}


def test_the_list_is_no_longer_than_it_must_be() -> None:
    passing = [name for name in exceptions() if name in outcomes() and outcomes()[name].is_native]
    assert passing == []
    assert set(exceptions()) <= set(outcomes())


def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{report(outcomes())}")
    total = table(outcomes())["all"]
    without = 0 if has_pillow() else EXCEPTIONS.read_text().count(f": {NEEDS_PILLOW}\n")
    assert total["passed"] >= PASSED - without
    assert total["native"] >= NATIVE - without


def test_nothing_of_fxopt_holds_an_evaluator() -> None:
    """While a case runs they cannot be imported; nor was one kept from before."""
    outcomes()
    held = [
        f"{module.__name__}.{name}"
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("fxopt")
        for name, value in vars(module).items()
        if is_evaluator(getattr(value, "__module__", None) or getattr(value, "__name__", None) or "")
    ]
    assert held == []


def test_no_case_is_slow() -> None:
    assert max(outcome.seconds for outcome in outcomes().values()) < LIMIT_SECONDS
