"""pack-sparse: of weights with zeros that are kept on purpose, store only the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.masks import mark_of
from fxopt.ir.ops.linear_sparse import conv_sparse, linear_sparse, stored, stored_bytes
from fxopt.ir.sparsity import Mark
from fxopt.ir.views.conv import Conv
from fxopt.passes.base import Context, ExactPass
from fxopt.passes.quantize_linear.common import FLOATS, replaced
from fxopt.passes.rules.apply import record_once
from fxopt.passes.sparsify.layer import Layer, layers

_OPSET = 11  # the first with CumSum, which decodes masks


@dataclass(frozen=True)
class PackSparse(ExactPass):
    """Store the blocks of sparse weights that are not zero, and one bit for each block.

    It comes last: where bytes count (`objective="size"`), or where a kernel takes weights in this form.
    """

    def opset(self, graph: Graph, ctx: Context) -> int:
        """Of the operators that decode masks."""
        return _OPSET if any(True for _ in _marked(graph)) else 0

    def run(self, graph: Graph, ctx: Context) -> int:
        """Returns how many layers are stored without their zeros; the ledger says why others are not."""
        refused, changes = [], 0
        for layer, mark in reversed(list(_marked(graph))):  # users first: what they use is then still there
            refusal = _refusal(graph, ctx, layer, mark)
            if refusal is None:
                _pack(graph, layer, mark, self.name)
                changes += 1
            else:
                refused.append(Verdict(self.name, label(layer.node), "refused", str(refusal)))
        record_once(ctx, refused[::-1])
        return changes


def _marked(graph: Graph) -> Iterator[tuple[Layer, Mark]]:
    for found in layers(graph):
        mark = None if isinstance(found, tuple) else mark_of(found.node)
        if mark is not None and isinstance(found, Layer) and found.weight(graph).dtype in FLOATS:
            yield found, mark


def _refusal(graph: Graph, ctx: Context, layer: Layer, mark: Mark) -> Refusal | None:
    excluded = ctx.excluded(label(layer.node))
    if excluded is not None:
        return excluded
    weight, pattern = layer.weight(graph), mark.pattern
    dtype = str(weight.dtype).removeprefix("torch.")
    unsupported = ctx.supports("conv_sparse" if layer.is_conv else "linear_sparse", dtype, str(pattern))
    if unsupported:
        return Refusal(unsupported)
    bias = layer.view.bias(graph)
    if bias is not None and bias.dim() != 1:
        return Refusal("its bias has shape {}; expected one axis", list(bias.shape))
    if ctx.objective != "size":
        why = ctx.unskipped(dtype, str(pattern), (weight.shape[0], weight.shape[1]))
        return Refusal('it saves bytes, which objective="size" asks for, not time: {}', why) if why else None
    out, columns = weight.shape
    if stored_bytes(pattern, out, columns, pattern.zeros(weight), weight.itemsize) >= weight.nbytes:
        return Refusal("{:.0%} zeros save less than the mask of their places takes", pattern.zeros(weight))
    return None


def _pack(graph: Graph, layer: Layer, mark: Mark, made_by: str) -> None:
    view = layer.view
    values, mask = stored(layer.weight(graph), mark.pattern)
    stem, source = label(view.weight_node), (label(view.node), made_by)
    arguments: tuple[Any, ...] = (
        view.x,
        graph.add_constant(values, f"{stem}_values", source),
        graph.add_constant(mask, f"{stem}_mask", source),
        view.bias_node,
        layer.weight(graph).shape[1],
        str(mark.pattern),
    )
    target: Any = linear_sparse.target
    if isinstance(view, Conv):
        target = conv_sparse.target
        arguments += (list(view.stride), [*view.padding[0], *view.padding[1]])
    node: fx.Node = replaced(graph, view, view.node, target, arguments, made_by)
    node.meta["sparsity"] = mark
