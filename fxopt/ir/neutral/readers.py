"""What the readers share: a table per file, and helpers that normalise arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph, shape_of, tensor_value
from fxopt.ir.onnx.op import OnnxOp

Arguments = tuple[Any, ...]
Reader = Callable[[Graph, fx.Node], Arguments | None]

aten = torch.ops.aten


class Readers:
    """How neutral operators are read, by target: an aten overload, an ONNX operator type, or `operator.getitem`."""

    def __init__(self) -> None:
        self.table: dict[Any, dict[str, Reader]] = {}

    def reads(self, name: str, *targets: Any) -> Callable[[Reader], Reader]:
        """Declare how `name` is read from calls of these targets."""

        def declare(reader: Reader) -> Reader:
            for target in targets:
                self.table.setdefault(target, {})[name] = reader
            return reader

        return declare


def key_of(node: fx.Node) -> Any:
    """What the tables know the node's operator by; None for an ONNX operator of another domain."""
    target = node.target
    if not isinstance(target, OnnxOp):
        return target
    return target.op_type if target.domain == "" else None


def version_of(node: fx.Node) -> int:
    """The version of an ONNX operator."""
    assert isinstance(node.target, OnnxOp)
    return node.target.since_version


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def ints(graph: Graph, value: Any) -> Any:
    """Constant integers as a tuple; None and nodes that compute at run time as they are."""
    if isinstance(value, (list, tuple)):
        return tuple(value)
    constant = graph.constant(value)
    if constant is None or constant.is_floating_point() or constant.dim() > 1:
        return value
    return tuple(int(item) for item in constant.reshape(-1).tolist())


def operand(graph: Graph, node: fx.Node, index: int, attribute: str) -> Any:
    """What ONNX has as an attribute in old versions and as an input in new ones."""
    given = node.kwargs.get(attribute)
    return ints(graph, given if given is not None else argument(node, index, ""))


def rank_of(x: Any) -> int | None:
    """The number of axes; None when it is unknown."""
    shape = shape_of(x)
    return None if shape is None else len(shape)


def normal_axes(axes: Any, rank: int | None) -> Any:
    """Axes (one or several) counted from 0; as they are while the rank is unknown."""
    if rank is None:
        return axes
    if isinstance(axes, int):
        return axes % rank if rank else 0
    return tuple([axis % rank if rank else 0 for axis in axes]) if isinstance(axes, (list, tuple)) else axes


def is_floating(node: object) -> bool:
    """True when the value is known to hold floating-point numbers."""
    value = tensor_value(node)
    return value is not None and value.dtype.is_floating_point
