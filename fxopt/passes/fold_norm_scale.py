"""norm(x) * c -> norm(x) with weight * c and bias * c.

The factor is a constant per feature, computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.ir.builder import constant_before
from fxopt.ir.graph import Graph, label, provenance
from fxopt.ir.neutral import read
from fxopt.ir.views.common import aten, is_aten, is_onnx, only_user
from fxopt.ir.views.norm import Norm, norm
from fxopt.passes.base import Context, ExactPass


@dataclass(frozen=True)
class FoldNormScale(ExactPass):
    """Fold a constant factor per feature into the layer norm before it."""

    def run(self, graph: Graph, ctx: Context) -> int:
        """Returns how many factors were folded."""
        changes = 0
        for node in list(graph.calls()):
            found = _scaled_norm(graph, node)
            if found is None or ctx.excluded(label(node)) is not None:
                continue
            view, factor = found
            _absorb(graph, view, factor, self.name)
            graph.replace(node, view.node)
            changes += 1
        if changes:
            graph.prune()
        return changes


def can_absorb(graph: Graph, value: fx.Node, takers: Sequence[fx.Node]) -> bool:
    """Whether a factor of `value` can be folded when the views of `takers` are all that uses it."""
    view = norm(graph, value)
    if not isinstance(view, Norm) or not _is_whole(view):
        return False
    inside = {node for taker in takers for node in (taker, *taker.all_input_nodes)}
    return all(user in inside for user in value.users)


def _is_whole(view: Norm) -> bool:
    """One operator with the weight as its second or third argument."""
    return view.axes == 1 and (
        is_onnx(view.node, "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
        or is_aten(view.node, aten.layer_norm.default)
    )


def _scaled_norm(graph: Graph, node: fx.Node) -> tuple[Norm, torch.Tensor] | None:
    product = read(graph, node, "mul")
    for value, constant in (product, product[::-1]) if product is not None else ():
        factor = graph.constant(constant)
        if factor is None or not isinstance(value, fx.Node) or only_user(value) is not node:
            continue
        view = norm(graph, value)
        if not isinstance(view, Norm) or not _is_whole(view):
            continue
        weight = view.weight(graph)
        if weight is not None and factor.dtype == weight.dtype and factor.shape in (weight.shape, torch.Size([])):
            return view, factor
    return None


def _absorb(graph: Graph, view: Norm, factor: torch.Tensor, made_by: str) -> None:
    """Give the norm the products as its weight and bias."""
    node = view.node
    for old in (view.weight_node, view.bias_node):
        value = graph.constant(old)
        if value is None or old is None:
            continue
        product = (value.double() * factor.double()).to(value.dtype)
        new = constant_before(graph, node, product, label(old), (*provenance(old), made_by))
        node.replace_input_with(old, new)
    node.meta["provenance"] = (*provenance(node), made_by)
