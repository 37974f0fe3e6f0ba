"""How many rows a table has that integers of an input are looked up in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxopt.errors import InvalidInput
from fxopt.ir.graph import Graph

_MOVES = frozenset(
    (
        "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Cast", "Slice", "Expand",
        "view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "t", "slice",
        "expand", "clone", "alias", "contiguous", "_to_copy", "to",
    )
)  # fmt: skip  # operators whose result holds values of their first input, and no others


def rows_looked_up(graph: Graph, index: int) -> int | None:
    """Rows of the smallest constant table that input number `index` indexes; None when it indexes none."""
    bounds = []
    for node, value in _uses(graph.placeholders[index]):
        is_torch = _name(node) == "embedding"
        if (not is_torch and _name(node) != "Gather") or len(node.args) < 2 or node.args[1] is not value:
            continue
        table = graph.constant(node.args[0])
        if table is not None and table.dim():
            axis: Any = 0 if is_torch else node.kwargs.get("axis", 0)
            bounds.append(int(table.shape[axis]))
    return min(bounds, default=None)


def check_lookups(graph: Graph, samples: Sequence[Mapping[str, torch.Tensor]], where: str) -> None:
    """Raise when a sample holds an index that is outside of the table that it is looked up in."""
    for index, spec in enumerate(graph.inputs):
        rows = rows_looked_up(graph, index)
        if rows is None:
            continue
        for value in (sample[spec.name] for sample in samples):
            if value.numel() and not (-rows <= int(value.min()) and int(value.max()) < rows):
                low, high = int(value.min()), int(value.max())
                raise InvalidInput(
                    f"{where}: input {spec.name!r} holds integers from {low} to {high}, and the table that they are "
                    f"looked up in has {rows} rows; give data that were made for this model"
                )


def _uses(start: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Operators that take the value, moved or not, and the value as they take it."""
    waiting, seen = [start], {start}
    while waiting:
        value = waiting.pop()
        for user in value.users:
            yield user, value
            if user not in seen and _name(user) in _MOVES and user.args and user.args[0] is value:
                seen.add(user)
                waiting.append(user)


def _name(node: fx.Node) -> str:
    return getattr(node.target, "op_type", "") or re.sub(r".*aten\.|\..*", "", str(node.target))
