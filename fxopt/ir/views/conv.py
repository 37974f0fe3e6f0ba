"""`Conv`: a convolution with constant weight, with the activation that follows it where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Refusal
from fxopt.ir.views.common import argument, aten, is_aten, is_onnx


@dataclass(frozen=True)
class Conv:
    """x [N, C, *spatial] -> [N, out, *spatial']; weight [out, C / groups, *kernel]; `padding` is (begins, ends)."""

    node: fx.Node
    x: fx.Node
    weight_node: fx.Node
    bias_node: fx.Node | None
    stride: tuple[int, ...]
    padding: tuple[tuple[int, ...], tuple[int, ...]]
    dilation: tuple[int, ...]
    groups: int

    def weight(self, graph: Graph) -> torch.Tensor:
        """The weight [out, in / groups, *kernel]."""
        stored = graph.constant(self.weight_node)
        assert stored is not None
        return stored

    def bias(self, graph: Graph) -> torch.Tensor | None:
        """The bias [out], or None."""
        return graph.constant(self.bias_node)


def conv(graph: Graph, node: fx.Node) -> Conv | Refusal | None:
    """The convolution whose value `node` is; None when it is something else, a refusal when it is almost one."""
    if node.op != "call_function":
        return None
    return _onnx(graph, node) if graph.origin == "onnx" else _aten(graph, node)


def convs(graph: Graph) -> Iterator[Conv | tuple[fx.Node, Refusal]]:
    """Every convolution of the graph in execution order, and what is almost one with the reason."""
    for node in list(graph.calls()):
        view = conv(graph, node)
        if isinstance(view, Conv):
            yield view
        elif view is not None:
            yield node, view


def _onnx(graph: Graph, node: fx.Node) -> Conv | Refusal | None:
    if not is_onnx(node, "Conv"):
        return None
    weight = graph.constant(node.args[1])
    if weight is None:
        return Refusal("the weight is computed at run time, not a constant")
    bias = argument(node, 2)
    if bias is not None and graph.constant(bias) is None:
        return Refusal("the bias is computed at run time, not a constant")
    rank = weight.dim() - 2
    kwargs: dict[str, Any] = dict(node.kwargs)
    if kwargs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return Refusal("auto_pad={} has no explicit padding", kwargs["auto_pad"])
    pads = [int(pad) for pad in kwargs.get("pads") or [0] * (2 * rank)]
    assert isinstance(node.args[0], fx.Node) and isinstance(node.args[1], fx.Node)
    return Conv(
        node,
        node.args[0],
        node.args[1],
        bias,
        tuple(kwargs.get("strides") or [1] * rank),
        (tuple(pads[:rank]), tuple(pads[rank:])),
        tuple(kwargs.get("dilations") or [1] * rank),
        int(kwargs.get("group", 1)),
    )


def _aten(graph: Graph, node: fx.Node) -> Conv | Refusal | None:
    ranks = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
    if not is_aten(node, *ranks, aten.convolution.default):
        return None
    weight = graph.constant(node.args[1])
    if weight is None:
        return Refusal("the weight is computed at run time, not a constant")
    rank = weight.dim() - 2
    if is_aten(node, aten.convolution.default) and argument(node, 6, "transposed"):
        return None
    general = node.target is aten.convolution.default
    groups = argument(node, 8 if general else 6, "groups", 1)
    padding = _spatial(argument(node, 4, "padding", 0), rank)
    bias = argument(node, 2, "bias")
    assert isinstance(node.args[0], fx.Node) and isinstance(node.args[1], fx.Node)
    return Conv(
        node,
        node.args[0],
        node.args[1],
        bias,
        _spatial(argument(node, 3, "stride", 1), rank),
        (padding, padding),
        _spatial(argument(node, 5, "dilation", 1), rank),
        int(groups),
    )


def _spatial(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(int(item) for item in value)
    return values * rank if len(values) == 1 else values
