"""Operators that read the shape of a value inside of attention get it from the operands, so that the value can go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import DynamicSize, Graph, label, shape_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.views.common import is_onnx, reads_shape
from fxopt.passes.fuse_attention_heads.plan import Plan

Sources = dict[str, tuple[int, int]]  # a dynamic size: which of (q, v), and its axis there


def readers(plan: Plan) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(reader, value) for every value that fusing removes."""
    removed = [*plan.view.inner, *([plan.view.node] if plan.end is not plan.view.node else [])]
    for value in removed:
        for user in value.users:
            if reads_shape(user) and user.users:
                yield user, value


def unreadable(plan: Plan) -> Refusal | None:
    """Why the shape of an inner value cannot be had from the operands."""
    sources = _sources(plan, 0)
    for user, value in readers(plan):
        shape = shape_of(value)
        known = shape is not None and all(_is_known(size, sources, plan) for size in shape)
        if not known or not is_onnx(user, "Shape"):
            return Refusal("{} reads the shape of its inner value {}", label(user), label(value))
    return None


def reread(graph: Graph, b: Builder, plan: Plan, taken: list[fx.Node], axis: int) -> None:
    """Give the readers the sizes of the operands `taken`, whose lengths are along `axis`."""
    sources = _sources(plan, axis)
    for user, value in list(readers(plan)):
        shape, options = shape_of(value) or (), dict(user.kwargs)
        start, end, _ = slice(options.get("start", 0), options.get("end")).indices(len(shape))
        before = Builder(graph, user, b.makers[-1])
        parts = [_size(before, size, sources, taken, plan) for size in shape[start:end]]
        whole = before.concat(parts, 0) if parts else before.const(torch.zeros(0, dtype=torch.int64), "shape")
        graph.replace(user, whole)


def _sources(plan: Plan, axis: int) -> Sources:
    """Where the dynamic sizes of the scores are found."""
    batch, queries, keys = plan.shape[0], plan.shape[-2], plan.shape[-1]
    return {str(keys): (1, axis), str(queries): (0, axis), str(batch): (0, 0)}


def _is_known(size: Any, sources: Sources, plan: Plan) -> bool:
    return isinstance(size, int) or str(size) in sources or _folded(size, plan)


def _folded(size: Any, plan: Plan) -> bool:
    """Whether a size is batch * heads."""
    batch, heads = plan.shape[0], plan.shape[-3]
    if not isinstance(size, DynamicSize) or not isinstance(batch, DynamicSize) or not isinstance(heads, int):
        return False
    return size.size == batch.size * heads and size.other == batch.other * heads


def _size(b: Builder, size: Any, sources: Sources, taken: list[fx.Node], plan: Plan) -> fx.Node:
    """The size as a vector of one number."""
    if isinstance(size, int):
        return b.const(torch.tensor([size], dtype=torch.int64), "size")
    is_folded = str(size) not in sources
    which, axis = (0, 0) if is_folded else sources[str(size)]
    found = b.onnx("Shape", taken[2] if which else taken[0], start=axis, end=axis + 1)
    if not is_folded:
        return found
    return b.onnx("Mul", found, b.const(torch.tensor([plan.shape[-3]], dtype=torch.int64), "heads"))
