"""Operators that give their input unchanged: copies, and dropout at inference."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.neutral.readers import Arguments, Readers, argument, aten, key_of, version_of

readers = Readers()
reads = readers.reads


@reads("identity", "Identity", aten.alias.default, aten.detach.default)
@reads("identity", aten.clone.default, aten.lift_fresh_copy.default, aten.contiguous.default)
def _identity(graph: Graph, node: fx.Node) -> Arguments | None:
    return (node.args[0],)


@reads("identity", "Concat", "Sum", "Max", "Min", "Mean")
def _single(graph: Graph, node: fx.Node) -> Arguments | None:
    return node.args if len(node.args) == 1 else None


@reads("identity", aten.cat.default)
def _single_cat(graph: Graph, node: fx.Node) -> Arguments | None:
    parts: Any = node.args[0]
    return (parts[0],) if len(parts) == 1 else None


@reads("identity", aten.dropout.default)
def _torch_dropout(graph: Graph, node: fx.Node) -> Arguments | None:
    return None if argument(node, 2, "train") else (node.args[0],)


@reads("identity", "Dropout")
def _onnx_dropout(graph: Graph, node: fx.Node) -> Arguments | None:
    return (node.args[0],) if node.kwargs.get("_outputs", 1) == 1 and _drops_nothing(graph, node) else None


@reads("identity", operator.getitem)
def _first_of_dropout(graph: Graph, node: fx.Node) -> Arguments | None:
    source, index = node.args
    if index != 0 or not isinstance(source, fx.Node) or not _drops_nothing(graph, source):
        return None
    return (source.args[0],)


def _drops_nothing(graph: Graph, node: fx.Node) -> bool:
    """True for a dropout at inference."""
    if node.target is aten.native_dropout.default:
        return argument(node, 2, "train") is False
    if key_of(node) != "Dropout":
        return False
    if version_of(node) < 7:
        return bool(node.kwargs.get("is_test", 0))
    training = argument(node, 2, "")
    constant = graph.constant(training)
    return training is None or (constant is not None and not bool(constant.reshape(-1)[0]))
