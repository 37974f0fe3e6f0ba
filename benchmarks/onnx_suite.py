"""The conformance suite of ONNX, run through `fxopt.onnx_backend`: how many cases pass, and how many natively in torch.

    python -m benchmarks.onnx_suite [--only REGEX] [--json FILE] [--failures]

Native means that no node left torch and fxopt's host lane: neither `onnx.reference` nor `onnxruntime` took part.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import tempfile
import time
import unittest
import warnings
from dataclasses import asdict, dataclass
from typing import Any

LIMIT_SECONDS = 60


@dataclass(frozen=True)
class Outcome:
    """How one case ended; `fallback` are the nodes that ran outside torch."""

    state: str  # "passed", "failed", "skipped" or "timeout"
    reason: str
    fallback: tuple[str, ...]
    seconds: float

    @property
    def is_native(self) -> bool:
        return self.state == "passed" and not self.fallback


class TooSlow(BaseException):
    """A case took longer than the limit."""


def _raise(*_: Any) -> None:
    raise TooSlow


def run_suite(only: str = "") -> dict[str, Outcome]:
    """Every CPU case of the suite whose name matches, by "kind/name"."""
    with tempfile.TemporaryDirectory() as models:
        os.environ["ONNX_MODELS"] = models
        os.environ.setdefault("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _run(only)


def _run(only: str) -> dict[str, Outcome]:
    from onnx.backend.test.runner import Runner

    from fxopt import onnx_backend

    prepared: list[onnx_backend.BackendRep] = []

    class Recorder(onnx_backend.FxoptBackend):
        @classmethod
        def prepare(cls, model: Any, device: str = "CPU", **options: Any) -> onnx_backend.BackendRep:
            prepared.append(super().prepare(model, device, **options))
            return prepared[-1]

    outcomes = {}
    for kind, items in Runner(Recorder)._test_items.items():
        for name, item in sorted(items.items()):
            if name.endswith("_cpu") and re.search(only, f"{kind}/{name}"):
                prepared.clear()
                state, reason, seconds = _outcome(item.func)
                fallback = tuple(node for rep in prepared for node in rep.fallback_nodes)
                outcomes[f"{kind}/{name.removesuffix('_cpu')}"] = Outcome(state, reason, fallback, round(seconds, 3))
    return outcomes


def _outcome(function: Any) -> tuple[str, str, float]:
    started = time.perf_counter()
    previous = signal.signal(signal.SIGALRM, _raise)
    signal.alarm(LIMIT_SECONDS)
    state, reason = "passed", ""
    try:
        function(None)
    except unittest.SkipTest as skip:
        state, reason = "skipped", str(skip)
    except TooSlow:
        state, reason = "timeout", f"more than {LIMIT_SECONDS} s"
    except Exception as error:
        state, reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())[:300]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return state, reason, time.perf_counter() - started


def table(outcomes: dict[str, Outcome]) -> dict[str, dict[str, int]]:
    """Cases, passed and native, by kind; the expanded function bodies are a kind of their own."""
    rows: dict[str, dict[str, int]] = {}
    for name, outcome in outcomes.items():
        kind = name.split("/")[0]
        if kind == "NodeModel" and "_expanded" in name:
            kind = "NodeModel, expanded"
        for key in (kind, "all"):
            row = rows.setdefault(key, {"cases": 0, "passed": 0, "native": 0})
            row["cases"] += 1
            row["passed"] += outcome.state == "passed"
            row["native"] += outcome.is_native
    return rows


def _why(outcome: Outcome) -> str:
    return outcome.reason or f"ran outside torch: {', '.join(outcome.fallback)}"


def main() -> None:
    """Run the suite and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="run the cases whose kind/name matches")
    parser.add_argument("--json", help="write every outcome to this file instead of the summary to results/")
    parser.add_argument("--failures", action="store_true", help="print what did not pass natively")
    options = parser.parse_args()
    outcomes = run_suite(options.only)
    rows = table(outcomes)
    for kind, row in rows.items():
        print(f"{kind:28s} {row['passed']:5d} of {row['cases']:5d} pass, {row['native']:5d} natively")
    slowest = max(outcomes.items(), key=lambda item: item[1].seconds)
    print(f"slowest: {slowest[0]}, {slowest[1].seconds} s")
    if options.failures:
        for name, outcome in outcomes.items():
            if not outcome.is_native:
                print(f"{name}: {outcome.state} {_why(outcome)}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({name: asdict(outcome) for name, outcome in outcomes.items()}, file, indent=1)
    elif not options.only:
        from benchmarks.common import machine, write

        not_native = {name: _why(outcome) for name, outcome in outcomes.items() if not outcome.is_native}
        write("onnx_suite", {"machine": machine(), "kinds": rows, "not_native": not_native})


if __name__ == "__main__":
    main()
