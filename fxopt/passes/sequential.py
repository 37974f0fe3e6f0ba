"""Second moments of values on the graph as it is rewritten: each layer sees what the compressed ones before it give.

Memory: the values that are alive at one place of the graph, of all calibration samples, and one matrix of moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from fxopt.errors import InvalidInput
from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import Evaluator, constant_value, evaluate

Rows = Callable[[torch.Tensor], torch.Tensor]
WIDE_COLUMNS = 4096  # up to here in float64: it costs little, and no factorisation fails for rounding


class SequentialRun:
    """Runs a graph on all samples, node by node, no further than asked; what comes later may still be rewritten."""

    def __init__(self, graph: Graph, samples: Sequence[Sequence[Any]], evaluator: Evaluator | None = None) -> None:
        self.graph = graph
        self.evaluator = evaluator
        self.values: list[dict[fx.Node, Any]] = [
            dict(zip(graph.placeholders, sample, strict=True)) for sample in samples
        ]
        self.done: set[fx.Node] = set(graph.placeholders)
        self._last: fx.Node | None = None
        self._moments: tuple[fx.Node, torch.Tensor] | None = None

    def advance(self, node: fx.Node) -> list[Any]:
        """The values of `node`, one per sample."""
        if node not in self.done:
            for current in self._between(node):
                self._run(current)
        return [values[node] for values in self.values]

    def moments(self, node: fx.Node, rows: Rows | None = None) -> torch.Tensor:
        """2 / n * sum of x x.T over all n rows of the node's values [..., features]: [features, features].

        Args:
            rows: makes rows [groups, n, features] of a value's items one by one; the result is then [groups, features,
                features].

        Raises:
            InvalidInput: a value is infinite or NaN.
        """
        if rows is None and self._moments is not None and self._moments[0] is node:
            return self._moments[1]
        self._moments = None
        total: torch.Tensor | None = None
        count = 0
        for found in self._rows(node, rows):
            wide = found.double() if found.shape[-1] <= WIDE_COLUMNS else found.float()
            product = wide.mT @ wide
            total = product if total is None else total.add_(product)
            count += found.shape[-2]
        if total is None or not bool(torch.isfinite(total).all()):
            raise InvalidInput(f"{node.name}: the calibration samples give infinite or NaN values here")
        total.mul_(2 / max(count, 1))
        if rows is None:
            self._moments = node, total
        return total

    def _rows(self, node: fx.Node, rows: Rows | None) -> Iterator[torch.Tensor]:
        for value in self.advance(node):
            if rows is None:
                yield value.reshape(-1, value.shape[-1])
                continue
            for index in range(len(value)):  # patches are many times as large as an item
                yield rows(value[index : index + 1])

    def _between(self, last: fx.Node) -> list[fx.Node]:
        """The operators up to `last` that have not run yet, in order."""
        begin = self._last
        start = next(iter(self.graph.fx.nodes)) if begin is None or begin._erased else begin.next
        found = []
        current = start
        while True:
            if current.op == "call_function" and current not in self.done:
                found.append(current)
            if current is last:
                return found
            if current.op == "output":
                raise AssertionError(f"{last} lies before what has run")
            current = current.next

    def _run(self, node: fx.Node) -> None:
        for values in self.values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), partial(self._value, values))
            with torch.no_grad():
                values[node] = evaluate(self.graph, node, tuple(args), dict(kwargs), self.evaluator)
        self.done.add(node)
        self._last = node
        for used in node.all_input_nodes:
            if used.op != "get_attr" and all(user in self.done for user in used.users):
                for values in self.values:
                    values.pop(used, None)

    def _value(self, values: dict[fx.Node, Any], node: fx.Node) -> Any:
        return constant_value(self.graph, node) if node.op == "get_attr" else values[node]
