"""`Call`: one operator call as the work functions see it, with sizes as numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph, hint
from fxopt.ir.target import Cost


@dataclass(frozen=True)
class Call:
    """A node with what is known about its operands. Everything unknown counts as empty."""

    graph: Graph
    node: fx.Node

    def argument(self, index: int, name: str = "", default: Any = None) -> Any:
        """The raw argument by position or keyword."""
        if index < len(self.node.args):
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def attribute(self, name: str, default: Any = None) -> Any:
        """A keyword argument (an ONNX attribute)."""
        return self.node.kwargs.get(name, default)

    def tensor(self, index: int, name: str = "") -> torch.Tensor | None:
        """The (fake) tensor of an argument; None when it is absent, unknown or no tensor."""
        return tensor_of(self.argument(index, name))

    def shape(self, index: int, name: str = "") -> tuple[int, ...] | None:
        """The shape of an argument as numbers."""
        tensor = self.tensor(index, name)
        return None if tensor is None else sizes(tensor)

    @property
    def output(self) -> torch.Tensor | None:
        """The first result that is a tensor."""
        return next(tensors(self.node.meta.get("val")), None)

    @property
    def moved(self) -> int:
        """Bytes of all operands and results, each counted once; constants count too."""
        return self.read + self.written

    @property
    def read(self) -> int:
        """Bytes of the operands."""
        return sum(nbytes(used.meta.get("val")) for used in self.node.all_input_nodes)

    @property
    def written(self) -> int:
        """Bytes of the results."""
        return nbytes(self.node.meta.get("val"))

    def cost(self, flops: float, kind: str, *, dtype: str = "", moved: float | None = None, launches: int = 1) -> Cost:
        """A cost over all operands; `dtype` defaults to that of the first operand."""
        return Cost(flops, self.moved if moved is None else moved, dtype or self.dtype, kind, launches)

    @property
    def dtype(self) -> str:
        """The element type of the first tensor operand, else of the result, else float32."""
        operands = (tensor_of(used) for used in self.node.all_input_nodes)
        found = next((tensor for tensor in operands if tensor is not None), self.output)
        return "float32" if found is None else dtype_name(found)


def tensor_of(argument: object) -> torch.Tensor | None:
    """The (fake) tensor behind an argument node."""
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors of a value, which may be a tuple or list."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def sizes(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape as numbers; symbolic dimensions by their hint."""
    return tuple(hint(dim) for dim in tensor.shape)


def count(tensor: torch.Tensor | None) -> int:
    """The number of elements; 0 for None."""
    return 0 if tensor is None else math.prod(sizes(tensor))


def nbytes(value: object) -> int:
    """Bytes of the tensors of a value; shape arithmetic on the host counts nothing."""
    return sum(count(tensor) * tensor.dtype.itemsize for tensor in tensors(value))


def dtype_name(tensor: torch.Tensor) -> str:
    """`float32`, `int8`, ..."""
    return str(tensor.dtype).removeprefix("torch.")
