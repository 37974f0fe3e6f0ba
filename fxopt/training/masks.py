"""Zeros that training keeps: of nodes with a mark (`fxopt.ir.sparsity`), or every zero of a weight."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph
from fxopt.ir.masks import mark_of
from fxopt.ir.sparsity import Mark
from fxopt.ir.views.conv import Conv, convs
from fxopt.ir.views.linear import Linear, linears
from fxopt.training.parameters import WEIGHT

MASKS = ("zeros", "marks", "none")


def kept_zeros(graph: Graph, roles: Mapping[str, str], masks: str) -> dict[str, Tensor]:
    """Which elements of the trained constants must stay zero, by target; constants without such elements are left out.

    Args:
        masks: "zeros": every zero of a weight (one that is zero throughout was not pruned: it is trained); "marks": the
            patterns of marked nodes only; "none".

    Raises:
        Unsupported: marks are asked for, and there are none.
    """
    found = {} if masks == "none" else _of_marks(graph, roles)
    if masks == "marks" and not any(mark_of(node) for node in graph.nodes):
        raise Unsupported("masks='marks': no node has a mark of sparsify; masks='zeros' keeps every zero of a weight")
    if masks == "zeros":
        for target, role in roles.items():
            zeros = graph.attribute(target).detach() == 0
            if role == WEIGHT and not bool(zeros.all()):
                found[target] = zeros
    return {target: zeros for target, zeros in found.items() if bool(zeros.any())}


def _of_marks(graph: Graph, roles: Mapping[str, str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for view in (*linears(graph), *convs(graph)):
        mark = mark_of(view.node) if isinstance(view, (Linear, Conv)) else None
        if mark is None or not isinstance(view, (Linear, Conv)) or str(view.weight_node.target) not in roles:
            continue
        zeros = _pattern(mark, view.weight(graph).flatten(1))
        target = str(view.weight_node.target)
        zeros = zeros.t() if isinstance(view, Linear) and view.transposed else zeros
        found[target] = zeros.reshape(graph.attribute(target).shape).contiguous()
    return found


def _pattern(mark: Mark, weight: Tensor) -> Tensor:
    """The zeros [out, in] that make the pattern: zero blocks; of N:M every zero."""
    pattern = mark.pattern
    if pattern.is_counted or not weight.numel():
        return weight == 0
    return pattern.spread(~pattern.occupied(weight))
