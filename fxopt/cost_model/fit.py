"""Fit a target's efficiency factors, launch time and bandwidths to measured times."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxopt.cost_model.roofline import NodeWork, predict_work, work
from fxopt.ir.graph import Graph
from fxopt.ir.target import Target

_SCALARS = ("launch_seconds", "cache_bandwidth", "bandwidth")
_STEPS = (0.2, 0.04, 0.01)  # of the natural logarithm, coarse to fine
_REACH = 8  # steps to either side


@dataclass(frozen=True)
class Measured:
    """The work of a model's nodes, and how long one run took (seconds)."""

    name: str
    nodes: tuple[NodeWork, ...]
    seconds: float

    @classmethod
    def of(cls, name: str, graph: Graph, seconds: float) -> Measured:
        """From a graph whose shapes are known."""
        return cls(name, tuple(work(graph)), seconds)

    def predicted(self, target: Target) -> float:
        """Seconds on the target."""
        return sum(prediction.seconds for prediction in predict_work(self.nodes, target))

    def error(self, target: Target) -> float:
        """predicted / measured - 1."""
        return self.predicted(target) / self.seconds - 1


def fit(start: Target, rows: Sequence[Measured], efficiencies: Sequence[str], cache_sizes: Sequence[int]) -> Target:
    """The target with those figures that make the mean |log(predicted / measured)| smallest.

    Every figure in turn is searched on a grid around its value, coarse to fine, until none improves. Peaks are kept.

    Args:
        efficiencies: which factors of `Target.efficiency` are free.
        cache_sizes: the sizes of the cache (bytes) to choose from.
    """
    best, loss = start, mean_log_error(start, rows)
    figures = (*_SCALARS, "cache_bytes", *efficiencies)
    for step in _STEPS:
        improved = True
        while improved:
            improved = False
            for figure in figures:
                for candidate in _around(best, figure, step, cache_sizes):
                    found = mean_log_error(candidate, rows)
                    if found < loss - 1e-6:
                        best, loss, improved = candidate, found, True
    return best


def mean_log_error(target: Target, rows: Sequence[Measured]) -> float:
    """The mean of |log(predicted / measured)|."""
    return sum(abs(math.log(row.predicted(target) / row.seconds)) for row in rows) / len(rows)


def _around(target: Target, figure: str, step: float, cache_sizes: Sequence[int]) -> Iterator[Target]:
    if figure == "cache_bytes":
        for size in cache_sizes:
            yield dataclasses.replace(target, cache_bytes=size)
        return
    for index in range(-_REACH, _REACH + 1):
        factor = math.exp(index * step)
        if figure in _SCALARS:
            yield dataclasses.replace(target, **{figure: getattr(target, figure) * factor})
        else:
            changed = {**target.efficiency, figure: target.efficiency[figure] * factor}
            yield dataclasses.replace(target, efficiency=changed)
