"""Fold batch norms at inference into the convolution or linear layer before them.

y = (f(x) - mean) / sqrt(var + eps) * gamma + beta with f(x) = W x + b is W' x + b' with, per output channel,
s = gamma / sqrt(var + eps), W' = s W and b' = s (b - mean) + beta; computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label, shape_of
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.neutral import read
from fxopt.ir.onnx.records import NodeRecord
from fxopt.ir.views.linear import Linear, linear
from fxopt.passes.base import Context, ExactPass
from fxopt.passes.rules.apply import drop_unused, record_once


@dataclass(frozen=True)
class _Layer:
    """What comes before a batch norm: y = W x + b per output channel, with constants."""

    node: fx.Node
    inner: tuple[fx.Node, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None
    view: Linear | None  # None: a convolution
    groups: int = 1
    transposed: bool = False  # the weight is [in, out / groups, ...] instead of [out, in / groups, ...]


@dataclass(frozen=True)
class FoldBatchNorm(ExactPass):
    """Fold batch norms at inference into the convolution or linear layer before them."""

    after = ("fold-constants",)  # scales may be computed

    def run(self, graph: Graph, ctx: Context) -> int:
        """Fold each batch norm or record why not; returns how many were folded."""
        refused, folded = [], 0
        for node in list(graph.nodes):
            arguments = read(graph, node, "batch_norm")
            if arguments is None:
                continue
            layer = ctx.excluded(label(node)) or _layer(graph, node, *arguments)
            why = layer if isinstance(layer, Refusal) else _fold(graph, node, layer, arguments, self.name)
            if why is None:
                folded += 1
            else:
                refused.append(Verdict(self.name, label(node), "refused", str(why)))
        record_once(ctx, refused)
        if folded:
            graph.release_constants()
        return folded


def _layer(graph: Graph, node: fx.Node, x: fx.Node, *rest: Any) -> _Layer | Refusal:
    """The layer that the batch norm can be folded into."""
    *vectors, _, training = rest
    if training:
        return Refusal("it takes its statistics from the batch (training mode)")
    for name, vector in zip(("scale", "shift", "mean", "variance"), vectors, strict=True):
        if vector is not None and graph.constant(vector) is None:
            return Refusal("its {} is computed at run time", name)
    layer = _convolution(graph, x) or _linear(graph, x)
    if layer is None:
        return Refusal("its input {} is not the result of a convolution or linear layer", label(x))
    if isinstance(layer, Refusal):
        return layer
    norm = node if x in node.all_input_nodes else node.args[0]
    assert isinstance(norm, fx.Node)
    for value, user in ((layer.node, norm), *((inner, layer.node) for inner in layer.inner)):
        other = next((each for each in value.users if each is not user and each not in layer.inner), None)
        if other is not None:
            return Refusal("the value of {} is also used by {}", label(value), label(other))
    if norm is not node and any(user is not node and user.users for user in norm.users):
        return Refusal("its other results are used too")
    return layer


def _convolution(graph: Graph, x: fx.Node) -> _Layer | Refusal | None:
    found = read(graph, x, "convolution")
    if found is None:
        return None
    _, weight, bias, groups, transposed = found
    constant, shift = graph.constant(weight), graph.constant(bias)
    if constant is None or (bias is not None and shift is None):
        return Refusal("the weight or bias of {} is computed at run time", label(x))
    return _Layer(x, (), constant, shift, None, groups, transposed)


def _linear(graph: Graph, x: fx.Node) -> _Layer | Refusal | None:
    view = linear(graph, x)
    if not isinstance(view, Linear):
        return view
    shape = shape_of(x)
    if shape is None or len(shape) != 2:
        return Refusal("the features of {} are not known to be its axis 1", label(x))
    bias = view.bias(graph)
    if view.bias_node is not None and bias is None:
        return Refusal("the bias of {} is computed at run time", label(x))
    return _Layer(x, view.inner, view.weight(graph), bias, view)


def _fold(graph: Graph, node: fx.Node, layer: _Layer, arguments: tuple[Any, ...], name: str) -> Refusal | None:
    """Replace layer and batch norm by one layer; the refusal when the new weights do not fit their element type."""
    _, *vectors, epsilon, _ = arguments
    weight, bias = _folded(layer, [_wide(graph, vector) for vector in vectors], epsilon)
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(bias).all()):
        return Refusal("the folded weights do not fit {}", layer.weight.dtype)
    builder = Builder(graph, node, name, like=layer.node)
    hint = label(layer.node)
    if layer.view is None:
        made = builder.with_weight(layer.node, weight, bias, hint)
    else:
        made = builder.linear(layer.view.x, weight, bias, hint)
    _name_after(node, made)
    inputs = node.all_input_nodes
    graph.replace(node, made)
    drop_unused(graph, inputs)
    return None


def _wide(graph: Graph, vector: Any) -> torch.Tensor | None:
    constant = graph.constant(vector)
    return None if constant is None else constant.double()


def _folded(layer: _Layer, vectors: Sequence[torch.Tensor | None], epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """W' and b' in the element type of W."""
    gamma, beta, mean, variance = vectors
    assert mean is not None and variance is not None
    scale = torch.rsqrt(variance + epsilon)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean if layer.bias is None else layer.bias.double() - mean
    shift = shift * scale if beta is None else shift * scale + beta
    weight = layer.weight.double()
    ones = [1] * (weight.dim() - 2)
    if layer.transposed:
        groups = layer.groups
        grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        weight = (grouped * scale.reshape(groups, 1, -1, *ones)).reshape(weight.shape)
    else:
        weight = weight * scale.reshape(-1, 1, *ones)
    dtype = layer.weight.dtype
    return weight.to(dtype), shift.to(dtype)


def _name_after(node: fx.Node, made: fx.Node) -> None:
    """The first result of an operator with several keeps its name in the file."""
    source = node.args[0] if "onnx" not in node.meta and node.args else None
    record = source.meta.get("onnx") if isinstance(source, fx.Node) else None
    if isinstance(record, NodeRecord) and len(record.outputs) > 1:
        made.meta["onnx"] = NodeRecord(record.name, record.outputs[:1])
