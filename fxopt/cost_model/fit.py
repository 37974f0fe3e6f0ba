"""Fit a target's efficiency factors, launch time and bandwidths to measured times."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxopt.cost_model.roofline import NodeWork, predict_work, work
from fxopt.ir.graph import Graph
from fxopt.ir.target import Target

# Each figure is fitted on the groups of probes that show it.
PLAN: Mapping[str, tuple[str, ...]] = {
    "launch_seconds": ("launch",),
    "cache_bandwidth": ("memory", "gemv"),
    "bandwidth": ("stream",),
    "cache_bytes": ("stream", "linear float32", "linear int8"),
    "linear": ("linear float32",),
    "linear.int8": ("linear int8",),
    "linear.uint8": ("linear uint8",),
    "linear.s8s8": ("linear s8s8",),
    "attention": ("attention",),
    "conv": ("conv float32",),
    "conv.narrow": ("conv float32",),
    "conv.int8": ("conv int8",),
    "conv.narrow.int8": ("conv int8",),
    "norm": ("norm",),
    "norm.skip": ("norm.skip",),
    "elementwise": ("elementwise",),
    "quantize": ("quantize",),
    "other": ("pool",),
}
_FIRST = {"launch_seconds": 1e-6, "cache_bandwidth": 40e9, "bandwidth": 10e9, "cache_bytes": 2**23}
_FIRST_EFFICIENCY = 0.3
_CACHE_SIZES = tuple(2**power for power in range(20, 27))
_STEPS = (0.2, 0.04, 0.01)  # of the natural logarithm, coarse to fine
_REACH = 8  # steps to either side
_SWEEPS = 6


@dataclass(frozen=True)
class Measured:
    """The work of a model's nodes, and how long one run took (seconds); `group` is that of the probe."""

    name: str
    group: str
    nodes: tuple[NodeWork, ...]
    seconds: float

    @classmethod
    def of(cls, name: str, group: str, graph: Graph, seconds: float) -> Measured:
        """From a graph whose shapes are known."""
        return cls(name, group, tuple(work(graph)), seconds)

    def predicted(self, target: Target) -> float:
        """Seconds on the target."""
        return sum(prediction.seconds for prediction in predict_work(self.nodes, target))

    def error(self, target: Target) -> float:
        """predicted / measured - 1."""
        return self.predicted(target) / self.seconds - 1


def fit(start: Target, rows: Sequence[Measured], plan: Mapping[str, tuple[str, ...]] = PLAN) -> Target:
    """The target whose figures make the mean |log(predicted / measured)| of their rows smallest.

    Figure by figure, each on a grid around its value, coarse to fine, in sweeps until none changes; the first ones are
    the same whatever `start` holds. Figures that the target lacks or that no row shows, and all peaks, are kept.
    """
    known = {row.group for row in rows}
    shown = {figure for figure, groups in plan.items() if known & set(groups)}
    best = _neutral(start, shown)
    for step in _STEPS:
        for _ in range(_SWEEPS):
            before = best
            for figure in (figure for figure in plan if figure in shown):
                used = [row for row in rows if row.group in plan[figure]]
                if figure in _FIRST or figure in best.efficiency:
                    best = min(_around(best, figure, step), key=lambda target: mean_log_error(target, used))
            if best == before:
                break
    return best


def _neutral(target: Target, figures: Collection[str]) -> Target:
    factors = {name: _FIRST_EFFICIENCY if name in figures else value for name, value in target.efficiency.items()}
    first: dict[str, Any] = {name: value for name, value in _FIRST.items() if name in figures}
    return dataclasses.replace(target, efficiency=factors, **first)


def mean_log_error(target: Target, rows: Sequence[Measured]) -> float:
    """The mean of |log(predicted / measured)|."""
    return sum(abs(math.log(row.predicted(target) / row.seconds)) for row in rows) / len(rows)


def _around(target: Target, figure: str, step: float) -> Iterator[Target]:
    """The target itself, then those that differ in one figure."""
    yield target
    if figure == "cache_bytes":
        for size in _CACHE_SIZES:
            yield dataclasses.replace(target, cache_bytes=size)
        return
    for index in range(-_REACH, _REACH + 1):
        factor = math.exp(index * step)
        if figure == "launch_seconds":
            yield dataclasses.replace(target, launch_seconds=target.launch_seconds * factor)
        elif figure == "bandwidth":
            yield dataclasses.replace(target, bandwidth=min(target.bandwidth * factor, target.cache_bandwidth))
        elif figure == "cache_bandwidth":
            yield dataclasses.replace(target, cache_bandwidth=max(target.cache_bandwidth * factor, target.bandwidth))
        else:
            changed = {**target.efficiency, figure: target.efficiency[figure] * factor}
            yield dataclasses.replace(target, efficiency=changed)
