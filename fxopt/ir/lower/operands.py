"""Values from around a body as flat operands of torch's control flow, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch


class Operands:
    """Groups of values; `flat` are the tensors and symbolic sizes in them, each tensor once."""

    def __init__(self, groups: Sequence[Sequence[Any]]) -> None:
        self.groups = groups
        self.places: dict[int, int] = {}  # id of a leaf -> its position
        leaves: list[Any] = []
        for leaf in _leaves(groups):
            if id(leaf) not in self.places:
                self.places[id(leaf)] = len(leaves)
                leaves.append(leaf)
        self.flat = tuple(leaves)

    def restored(self, given: Sequence[Any]) -> list[list[Any]]:
        """The groups with these leaves."""
        return [[self._restored(value, given) for value in group] for group in self.groups]

    def _restored(self, value: Any, given: Sequence[Any]) -> Any:
        if id(value) in self.places:
            return given[self.places[id(value)]]
        if isinstance(value, (list, tuple)):
            return [self._restored(item, given) for item in value]
        if isinstance(value, np.ndarray) and value.dtype == object:
            items = np.empty(value.size, object)
            items[:] = [self._restored(item, given) for item in value.reshape(-1)]
            return items.reshape(value.shape)
        return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (torch.Tensor, torch.SymInt)):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, np.ndarray) and value.dtype == object:
        for item in value.reshape(-1):
            yield from _leaves(item)
