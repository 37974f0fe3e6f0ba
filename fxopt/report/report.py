"""`Report`: what one optimisation did, as plain data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fxopt.ir.target import Prediction

Result = Literal["optimized", "nothing paid", "unchanged", "fine-tuned", "compiled"]
VERSION = 1  # of the JSON form


@dataclass(frozen=True)
class Summary:
    """A model in figures."""

    operators: int
    op_counts: dict[str, int]
    size_bytes: int  # of the constants
    macs: int  # multiply-adds of one run
    predicted: Prediction | None = None


@dataclass(frozen=True)
class Measurement:
    """Baseline and result timed in interleaved bursts; `ratio` is baseline / result, so more than 1 is faster."""

    baseline: str  # what the result was compared with
    baseline_seconds: float  # median of one run
    result_seconds: float
    ratio: float
    low: float  # confidence bounds of the ratio
    high: float
    bursts: int
    threads: int


@dataclass(frozen=True)
class ErrorReport:
    """How far the result's outputs are from the model's, on samples that did not calibrate it."""

    noise_to_signal: float
    relative_l2: float
    cosine: float
    metric_before: float | None = None
    metric_after: float | None = None
    samples: int = 0


@dataclass(frozen=True)
class PassRun:
    """One run of a pass: how many changes it made, and how long it took."""

    name: str
    changes: int
    seconds: float


@dataclass
class Report:
    """What was asked for, what came out, and how it was found."""

    target: str
    backend: str
    executed_on: str  # where the result runs in this process
    outcome: Result
    why: str
    objective: str
    budget: float | None
    before: Summary
    after: Summary
    measured: Measurement | None = None
    error: ErrorReport | None = None
    pass_runs: list[PassRun] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)  # seconds
    versions: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    instruction_sets: list[str] = field(default_factory=list)  # of the target
    runtime: str = ""  # of the backend's runtimes, the one that was measured: "cpu", "openvino"

    def to_json(self) -> dict[str, Any]:
        """Plain data that every JSON writer takes: infinite and undefined numbers become texts."""
        return {"version": VERSION, **_finite(asdict(self))}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Report:
        """The inverse of `to_json`."""
        fields = {key: _number(value) for key, value in data.items() if key != "version"}
        fields["before"] = _summary(data["before"])
        fields["after"] = _summary(data["after"])
        fields["measured"] = None if data["measured"] is None else Measurement(**_numbers(data["measured"]))
        fields["error"] = None if data["error"] is None else ErrorReport(**_numbers(data["error"]))
        fields["pass_runs"] = [PassRun(**row) for row in data["pass_runs"]]
        return cls(**fields)

    def __str__(self) -> str:
        from fxopt.report.text import report_text

        return report_text(self)


def _summary(data: dict[str, Any]) -> Summary:
    predicted = data["predicted"]
    return Summary(**{**data, "predicted": None if predicted is None else Prediction(**_numbers(predicted))})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value


def _numbers(data: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(value) for key, value in data.items()}
