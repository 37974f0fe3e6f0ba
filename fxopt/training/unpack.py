"""Sparse weights that are stored without their zeros, as whole weights with marks: what training works on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label
from fxopt.ir.masks import mark_of, set_mark
from fxopt.ir.ops.linear_sparse import conv_sparse, linear_sparse
from fxopt.ir.views.common import aten
from fxopt.ir.views.weights import weight_of

_MADE_BY = "finetune"


def unpacked(graph: Graph) -> Graph:
    """The graph itself, or a copy with a linear or convolution in the place of every packed one."""
    packed = (linear_sparse.target, conv_sparse.target)
    if not any(node.target in packed for node in graph.calls()):
        return graph
    made = graph.copy()
    for node in list(made.calls()):
        if node.target in packed:
            mark = mark_of(node)
            new = _linear(made, node) if node.target is linear_sparse.target else _conv(made, node)
            made.replace(node, new)
            if mark is not None:
                set_mark(made, new, mark)
    made.prune()
    return made


def _linear(graph: Graph, node: fx.Node) -> fx.Node:
    x, bias = _arguments(graph, node)
    return Builder(graph, node, _MADE_BY, like=node).linear(x, _weight(graph, node), bias, label(node))


def _conv(graph: Graph, node: fx.Node) -> fx.Node:
    x, bias = _arguments(graph, node)
    arguments: Any = node.args
    stride, pads = list(arguments[6]), list(arguments[7])
    rank = len(stride)
    builder = Builder(graph, node, _MADE_BY, like=node)
    weight = _weight(graph, node)
    weight = weight.reshape(*weight.shape, *[1] * rank)
    constants = [builder.const(weight, f"{label(node)}_weight")]
    constants += [] if bias is None else [builder.const(bias, f"{label(node)}_bias")]
    if builder.is_onnx:
        return builder.onnx("Conv", x, *constants, strides=stride, pads=pads)
    assert pads[:rank] == pads[rank:], "aten convolutions pad both sides alike"
    inputs = (*constants, None)[:2]
    return builder.call(aten.convolution.default, x, *inputs, stride, pads[:rank], [1] * rank, False, [0] * rank, 1)


def _arguments(graph: Graph, node: fx.Node) -> tuple[fx.Node, torch.Tensor | None]:
    x: Any = node.args[0]
    return x, graph.constant(node.args[3])


def _weight(graph: Graph, node: fx.Node) -> torch.Tensor:
    weight = weight_of(graph, node)
    assert weight is not None, "its parts are constants"
    return weight
