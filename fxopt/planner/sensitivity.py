"""How much of the error of the model's outputs each candidate causes, measured on calibration samples.

The error of a layer's own output says little about that: on its way to the outputs it may grow or shrink a thousand
times. Errors of independent rewrites add, so each candidate (or a run of consecutive ones, where there are many) is
applied alone to the float model, whose values are known: only what lies behind it has to run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from fxopt.ir.error import output_error
from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import Evaluator, plain_tensor
from fxopt.ir.partial_run import resume
from fxopt.passes.base import Candidate
from fxopt.planner.plan import Price

RUNS = 64  # of the model behind a rewrite, at most
_GROUPS = 32  # with which a plan of more than RUNS candidates begins
_SAMPLES = 4
_BYTES = 1 << 29  # of values that are kept

Apply = Callable[[Graph, Sequence[Candidate]], None]


def measure_errors(
    graph: Graph,
    chosen: Sequence[Candidate],
    samples: Sequence[Sequence[Any]],
    apply: Apply,
    prices: Mapping[Candidate, Price],
    evaluator: Evaluator | None = None,
) -> tuple[dict[Candidate, float], int, int]:
    """Output noise to signal of each chosen candidate alone; the number of runs, and of samples in each.

    More candidates than `RUNS` begin as groups of consecutive ones; those with the largest errors are halved until the
    runs are used up, and the members of what remains share its error as their own errors are to each other.

    Args:
        graph: the one that `apply` rewrites copies of.
        apply: applies candidates to a graph.
        prices: with the candidates' own errors.
    """
    place = {node.name: index for index, node in enumerate(graph.nodes)}
    ordered = sorted(chosen, key=lambda candidate: place[candidate.node])
    known = _values(graph, samples[: max(1, min(_SAMPLES, RUNS // max(1, len(ordered))))], evaluator)
    references = [[plain_tensor(value) for value in results] for _, results in known]

    runs = 0

    def measured(group: Sequence[Candidate]) -> float:
        nonlocal runs
        runs += 1
        rewritten = graph.copy()
        apply(rewritten, group)
        results = [resume(rewritten, values, place, evaluator) for values, _ in known]
        return output_error(references, results).noise_to_signal

    return _refined(ordered, measured, prices), runs, len(known)


def priced(
    prices: Mapping[Candidate, Price], chosen: Sequence[Candidate], errors: Mapping[Candidate, float]
) -> dict[Candidate, Price]:
    """Prices with output errors: every candidate of a node is scaled like the one that was measured."""
    growth = {item.node: errors[item] / max(prices[item].error, 1e-30) for item in chosen}
    return {
        item: replace(price, error=errors[item] if item in errors else price.error * growth.get(item.node, 1.0))
        for item, price in prices.items()
    }


def _values(
    graph: Graph, samples: Sequence[Sequence[Any]], evaluator: Evaluator | None
) -> list[tuple[dict[str, Any], list[Any]]]:
    """The values of all operators by name, and the outputs, for as many of the samples as memory is meant for."""
    found: list[tuple[dict[str, Any], list[Any]]] = []
    for sample in samples:
        values: dict[str, Any] = {}

        def keep(node: Any, value: Any, values: dict[str, Any] = values) -> None:
            if node.op != "get_attr":
                values[node.name] = value

        results = graph.run(sample, evaluator=evaluator, observer=keep)
        found.append((values, results))
        size = sum(value.nbytes for value in values.values() if isinstance(value, torch.Tensor))
        if (len(found) + 1) * size > _BYTES:
            break
    return found


def _refined(
    ordered: list[Candidate], measured: Callable[[Sequence[Candidate]], float], prices: Mapping[Candidate, Price]
) -> dict[Candidate, float]:
    count = len(ordered) if len(ordered) <= RUNS else _GROUPS
    bounds = [len(ordered) * index // count for index in range(count + 1)]
    parts = [ordered[start:end] for start, end in pairwise(bounds)]
    groups = [(part, measured(part)) for part in parts]
    runs = count
    while runs + 2 <= RUNS:
        widest = max((item for item in groups if len(item[0]) > 1), key=lambda item: item[1], default=None)
        if widest is None:
            break
        group = widest[0]
        halves = (group[: len(group) // 2], group[len(group) // 2 :])
        groups.remove(widest)
        groups += [(half, measured(half)) for half in halves]
        runs += 2
    found: dict[Candidate, float] = {}
    for group, error in groups:
        own = sum(prices[item].error for item in group)
        found |= {item: error * (prices[item].error / own if own > 0 else 1 / len(group)) for item in group}
    return found
