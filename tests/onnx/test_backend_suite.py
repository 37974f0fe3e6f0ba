"""The whole ONNX backend suite through `fxopt.onnx_backend`.

`suite_exceptions.txt` names every case that does not pass without another evaluator, with the reason. The list may only
shrink: a listed case that passes natively fails the test, and so does a case that is not listed and does not.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.onnx_suite import LIMIT_SECONDS, Outcome, run_suite, table

EXCEPTIONS = Path(__file__).with_name("suite_exceptions.txt")
PASSED, NATIVE = 2023, 2023  # at least, with Pillow
NEEDS_PILLOW = "needs Pillow"

pytestmark = pytest.mark.slow


@cache
def outcomes() -> dict[str, Outcome]:
    torch.manual_seed(0)  # of what is random without a seed
    return run_suite()


def exceptions() -> dict[str, str]:
    """Reason by case; those that need Pillow are none where it is installed."""
    lines = [line for line in EXCEPTIONS.read_text().splitlines() if line and not line.startswith("#")]
    listed = dict(line.split(": ", 1) for line in lines)
    assert list(listed) == sorted(listed)
    has_pillow = importlib.util.find_spec("PIL") is not None
    return {name: reason for name, reason in listed.items() if not (has_pillow and reason == NEEDS_PILLOW)}


def test_every_case_passes_natively_or_is_listed() -> None:
    failing = {
        name: outcome.reason or f"ran outside torch: {', '.join(outcome.fallback)}"
        for name, outcome in outcomes().items()
        if not outcome.is_native and name not in exceptions()
    }
    assert failing == {}


def test_the_list_is_no_longer_than_it_must_be() -> None:
    passing = [name for name in exceptions() if name in outcomes() and outcomes()[name].is_native]
    assert passing == []
    assert set(exceptions()) <= set(outcomes())


def test_counts() -> None:
    pytest.importorskip("PIL")
    total = table(outcomes())["all"]
    assert total["passed"] >= PASSED
    assert total["native"] >= NATIVE


def test_no_case_is_slow() -> None:
    assert max(outcome.seconds for outcome in outcomes().values()) < LIMIT_SECONDS
