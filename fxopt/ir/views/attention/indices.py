"""Positions of queries and keys: integers that grow by one along the last axis (keys) or the one before (queries)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.neutral import read
from fxopt.ir.views.attention.numbers import is_one, number, sizes
from fxopt.ir.views.common import argument, aten, is_aten, is_onnx

_DEEPEST = 16


@dataclass(frozen=True)
class Affine:
    """queries * i + keys * j + offset at query i and key j."""

    queries: int
    keys: int
    offset: int

    def plus(self, other: Affine, sign: int = 1) -> Affine:
        """The sum, or difference."""
        return Affine(
            self.queries + sign * other.queries, self.keys + sign * other.keys, self.offset + sign * other.offset
        )


def affine(graph: Graph, node: object, depth: int = _DEEPEST) -> Affine | None:
    """The node's value by position; None when it is something else."""
    plain = _whole_number(graph, node)
    if plain is not None:
        return Affine(0, 0, plain)
    if not isinstance(node, fx.Node) or not depth:
        return None
    constant = graph.constant(node)
    if constant is not None:
        return _of_constant(constant)
    if _counts(graph, node) is not None:
        return Affine(0, 1, _counts(graph, node) or 0)
    for name, sign in (("add", 1), ("sub", -1)):
        pair = read(graph, node, name)
        if pair is not None:
            first, second = (affine(graph, operand, depth - 1) for operand in pair)
            return None if first is None or second is None else first.plus(second, sign)
    negated = read(graph, node, "neg")
    if negated is not None:
        inner = affine(graph, negated[0], depth - 1)
        return None if inner is None else Affine(0, 0, 0).plus(inner, -1)
    for name in ("cast", "identity", "expand"):
        found = read(graph, node, name)
        if found is not None:
            return affine(graph, found[0], depth - 1) if _same_ends(found[0], node) else None
    return _moved(graph, node, depth)


def _whole_number(graph: Graph, node: object) -> int | None:
    value = number(graph, node)
    return int(value) if value is not None and value == int(value) else None


def _counts(graph: Graph, node: fx.Node) -> int | None:
    """The first number of arange(first, ..., 1)."""
    if is_onnx(node, "Range"):
        start, step = (_whole_number(graph, node.args[index]) for index in (0, 2))
        return start if step == 1 else None
    if is_aten(node, aten.arange.default):
        return 0
    if is_aten(node, aten.arange.start, aten.arange.start_step):
        start, step = _whole_number(graph, node.args[0]), argument(node, 2, "step", 1)
        return start if step == 1 else None
    return None


def _same_ends(x: object, node: fx.Node) -> bool:
    """Whether an expansion leaves the positions where they are: axes are only put in front, or widened."""
    before, after = sizes(x), sizes(node)
    return before is not None and after is not None and len(before) <= len(after)


def _moved(graph: Graph, node: fx.Node, depth: int) -> Affine | None:
    """Below a reshape, a transpose, or a slice that begins at the front."""
    for name in ("unsqueeze", "reshape", "squeeze"):
        found = read(graph, node, name)
        if found is None:
            continue
        inner, before, after = affine(graph, found[0], depth - 1), _long_axis(found[0]), _long_axis(node)
        if inner is None or before is None or after is None or before > 2 or after > 2:
            return None
        return _turned(inner) if before != after else inner
    turn = read(graph, node, "transpose")
    if turn is not None and len(turn[1]) >= 2:
        count = len(turn[1])
        inner = affine(graph, turn[0], depth - 1)
        swap = tuple(turn[1]) == (*range(count - 2), count - 1, count - 2)
        return _turned(inner) if swap and inner is not None else None
    cut: Any = read(graph, node, "slice")
    if cut is not None and isinstance(cut[1], tuple) and not any(cut[1]) and cut[4] == (1,) * len(cut[1]):
        return affine(graph, cut[0], depth - 1)
    return None


def _long_axis(node: object) -> int | None:
    """The only axis whose size is not 1, counted from the end (1: the last one); None when there are several."""
    shape = sizes(node)
    long = [len(shape) - axis for axis, size in enumerate(shape) if not is_one(size)] if shape is not None else []
    return long[0] if len(long) == 1 else None


def _turned(inner: Affine) -> Affine:
    return Affine(inner.keys, inner.queries, inner.offset)


def _of_constant(value: torch.Tensor) -> Affine | None:
    """The positions that a constant of one or two long axes holds."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or not value.numel():
        return None
    if any(size != 1 for size in value.shape[:-2]):
        return None
    flat = value.reshape(value.shape[-2:]) if value.dim() >= 2 else value.reshape(1, -1)
    rows, columns = flat.shape
    first = int(flat[0, 0])
    queries = int(flat[1, 0]) - first if rows > 1 else 0
    keys = int(flat[0, 1]) - first if columns > 1 else 0
    if rows == 1 and columns == 1:
        return Affine(0, 0, first)
    made = first + queries * torch.arange(rows).unsqueeze(1) + keys * torch.arange(columns)
    return Affine(queries, keys, first) if torch.equal(made, flat.to(torch.int64)) else None
