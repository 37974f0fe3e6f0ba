"""How reductions and normalisations are read."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.neutral.readers import (
    Arguments,
    Readers,
    argument,
    aten,
    is_floating,
    key_of,
    normal_axes,
    operand,
    rank_of,
    version_of,
)

readers = Readers()
reads = readers.reads


@reads("softmax", "Softmax")
def _onnx_softmax(graph: Graph, node: fx.Node) -> Arguments | None:
    rank = rank_of(node.args[0])
    newer = version_of(node) >= 13
    axis = normal_axes(node.kwargs.get("axis", -1 if newer else 1), rank)
    if not newer and (rank is None or axis != rank - 1):
        return None  # old versions flatten everything from the axis on
    return node.args[0], axis


@reads("softmax", aten.softmax.int, aten._softmax.default)
def _torch_softmax(graph: Graph, node: fx.Node) -> Arguments | None:
    if argument(node, 2, "dtype"):
        return None
    return node.args[0], normal_axes(node.args[1], rank_of(node.args[0]))


@reads("mean", "ReduceMean")
@reads("sum", "ReduceSum")
@reads("amax", "ReduceMax")
def _onnx_reduction(graph: Graph, node: fx.Node) -> Arguments | None:
    x, axes, keepdims = node.args[0], operand(graph, node, 1, "axes"), bool(node.kwargs.get("keepdims", 1))
    rank = rank_of(x)
    if axes is None or axes == ():
        if rank is None or node.kwargs.get("noop_with_empty_axes"):
            return None
        axes = range(rank)
    axes = normal_axes(axes, rank)
    return x, tuple(sorted(axes)) if isinstance(axes, (tuple, range)) else axes, keepdims


@reads("mean", aten.mean.dim, aten.mean.default)
@reads("sum", aten.sum.dim_IntList, aten.sum.default)
@reads("amax", aten.amax.default)
def _torch_reduction(graph: Graph, node: fx.Node) -> Arguments | None:
    x, axes, rank = node.args[0], argument(node, 1, "dim"), rank_of(node.args[0])
    if node.kwargs.get("dtype") is not None or not is_floating(x):
        return None  # integers are summed in int64
    if not axes:
        axes = None if rank is None else range(rank)
    if axes is None:
        return None
    return x, tuple(sorted(normal_axes(tuple(axes), rank))), bool(argument(node, 2, "keepdim", False))


_MAY_TRAIN = (aten._native_batch_norm_legit.default, aten.native_batch_norm.default, aten.batch_norm.default)


@reads("batch_norm", "BatchNormalization", operator.getitem, aten.batch_norm.default)
def _batch_norm(graph: Graph, node: fx.Node) -> Arguments | None:
    source: Any = node
    if node.target is operator.getitem:
        source = node.args[0] if node.args[1] == 0 else None
    if key_of(node) == "BatchNormalization" and node.kwargs.get("_outputs", 1) != 1:
        return None  # its first output is read
    return None if source is None else _batch_norm_of(source)


def _batch_norm_of(source: fx.Node) -> Arguments | None:
    """x, weight, bias, mean, variance, epsilon, training"""
    if key_of(source) == "BatchNormalization":
        if not source.kwargs.get("spatial", 1):
            return None
        return *source.args[:5], source.kwargs.get("epsilon", 1e-5), _trains(source)
    if source.target is aten._native_batch_norm_legit_no_training.default:
        return *source.args[:5], source.args[6], False
    if source.target in _MAY_TRAIN:
        return *source.args[:5], source.args[7], source.args[5]
    return None


def _trains(node: fx.Node) -> bool:
    """Whether a BatchNormalization takes its statistics from the batch."""
    if version_of(node) >= 14:
        return bool(node.kwargs.get("training_mode", 0))
    if version_of(node) < 7 and not node.kwargs.get("is_test"):
        return True
    return node.kwargs.get("_outputs", 1) not in (None, 1)
