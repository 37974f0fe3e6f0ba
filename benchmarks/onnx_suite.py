"""The conformance suite of ONNX, run through `fxopt.onnx_backend`: how many cases pass, and how many natively in torch.

    python -m benchmarks.onnx_suite [--only REGEX] [--json FILE] [--failures]

Native means that the case passes while neither `onnx.reference` nor `onnxruntime` can be imported: every node runs in
torch or in fxopt's host lane. A case that asks for one of them runs again with both.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
import unittest
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import onnx

LIMIT_SECONDS = 60
EVALUATORS = ("onnx.reference", "onnxruntime")


@dataclass(frozen=True)
class Outcome:
    """How one case ended; `fallback` are the nodes that ran outside torch, `asked` the evaluators it wanted."""

    state: str  # "passed", "failed", "skipped" or "timeout"
    reason: str
    fallback: tuple[str, ...]
    asked: tuple[str, ...]
    seconds: float

    @property
    def is_native(self) -> bool:
        return self.state == "passed" and not self.fallback and not self.asked


class TooSlow(BaseException):
    """A case took longer than the limit."""


def _raise(*_: Any) -> None:
    raise TooSlow


class _Refusing(MetaPathFinder):
    """Refuses imports of the evaluators, and keeps their names."""

    def __init__(self) -> None:
        self.asked: dict[str, None] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if is_evaluator(name):
            self.asked[name] = None
            raise ImportError(f"{name} was asked for")


def is_evaluator(name: str) -> bool:
    """Whether a module is one of the evaluators, or in one."""
    return any(name == root or name.startswith(f"{root}.") for root in EVALUATORS)


@contextmanager
def without_evaluators() -> Iterator[dict[str, None]]:
    """Nothing inside can import an evaluator, or reach it through its package; gives the names that were asked for."""
    hidden = {name: module for name, module in sys.modules.items() if is_evaluator(name)}
    refusing = _Refusing()
    reference = vars(onnx).pop("reference", None)
    for name in hidden:
        del sys.modules[name]
    sys.meta_path.insert(0, refusing)
    try:
        yield refusing.asked
    finally:
        sys.meta_path.remove(refusing)
        sys.modules.update(hidden)
        if reference is not None:
            onnx.reference = reference


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
                with without_evaluators() as asked:
                    state, reason, seconds = _outcome(item.func)
                if asked:
                    prepared.clear()
                    state, reason, seconds = _outcome(item.func)
                fallback = tuple(node for rep in prepared for node in rep.fallback_nodes)
                case = f"{kind}/{name.removesuffix('_cpu')}"
                outcomes[case] = Outcome(state, reason, fallback, tuple(asked), round(seconds, 3))
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


def why(outcome: Outcome) -> str:
    """Why a case is not native."""
    return outcome.reason or f"ran outside torch: {', '.join(outcome.fallback or outcome.asked)}"


def report(outcomes: dict[str, Outcome]) -> str:
    """The counts by kind, and the slowest case."""
    lines = [
        f"{kind:28s} {row['passed']:5d} of {row['cases']:5d} pass, {row['native']:5d} natively"
        for kind, row in table(outcomes).items()
    ]
    name, outcome = max(outcomes.items(), key=lambda item: item[1].seconds)
    return "\n".join([*lines, f"slowest: {name}, {outcome.seconds} s"])


def main() -> None:
    """Run the suite and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="run the cases whose kind/name matches")
    parser.add_argument("--json", help="write every outcome to this file instead of the summary to results/")
    parser.add_argument("--failures", action="store_true", help="print what did not pass natively")
    options = parser.parse_args()
    outcomes = run_suite(options.only)
    print(report(outcomes))
    if options.failures:
        for name, outcome in outcomes.items():
            if not outcome.is_native:
                print(f"{name}: {outcome.state} {why(outcome)}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({name: asdict(outcome) for name, outcome in outcomes.items()}, file, indent=1)
    elif not options.only:
        from benchmarks.common import write

        not_native = {name: why(outcome) for name, outcome in outcomes.items() if not outcome.is_native}
        slowest = max(outcome.seconds for outcome in outcomes.values())
        write("onnx_suite", {"kinds": table(outcomes), "not_native": not_native, "slowest_seconds": slowest})


if __name__ == "__main__":
    main()
