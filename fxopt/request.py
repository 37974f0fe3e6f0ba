"""One optimisation as data: what was asked for, resolved, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxopt.backends.base import Backend, Executable
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Ledger
from fxopt.ir.target import Target
from fxopt.passes.base import Candidate, Pass
from fxopt.planner.plan import Plan
from fxopt.report.report import ErrorReport, Report

if TYPE_CHECKING:
    from fxopt.offers import Offers

Progress = Callable[[str, int, int], None]
Sample = list[Any]  # one value per input of the graph


@dataclass
class Request:
    """What the user asked for, resolved."""

    target: Target
    backend: Backend
    samples: list[Sample] = field(default_factory=list)
    passes: Sequence[Pass] | None = None
    evaluate: Callable[[Any], float] | None = None
    budget: float | None = 0.02
    objective: str = "latency"
    include: re.Pattern[str] | None = None
    exclude: re.Pattern[str] | None = None
    threads: int | None = None
    force: bool = False
    guard_seconds: float = 10.0
    dump: Path | None = None
    progress: Progress | None = None
    warnings: list[str] = field(default_factory=list)
    resume: Path | None = None  # the state of the calibration
    custom_ops: bool = False  # own kernels in a library beside the file


@dataclass
class Outcome:
    """The result of an optimisation."""

    graph: Graph
    executable: Executable
    report: Report
    ledger: Ledger


@dataclass
class Lossy:
    """A rewritten graph with its plan and measured error.

    Where passes are planned in stages, the plan is that of the last one which found something, `base` what it was
    applied to, and `earlier` what `base` holds already.
    """

    graph: Graph
    executable: Executable
    plan: Plan
    error: ErrorReport | None  # None: there are no samples
    loss: float  # what the budget limits
    base: Graph | None = None
    offers: Offers | None = None  # of which the plan is
    earlier: tuple[Candidate, ...] = ()
