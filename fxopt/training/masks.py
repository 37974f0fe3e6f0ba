"""Zeros that training keeps: of nodes with a mark (`fxopt.ir.sparsity`), or every zero of a weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx

from fxopt.errors import PassError, Unsupported, unknown
from fxopt.ir.graph import Graph, label
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
        UnknownName: `masks` is none of these.
        Unsupported: marks are asked for, and there are none.
    """
    if masks not in MASKS:
        raise unknown("masks", masks, MASKS)
    if masks == "none":
        return {}
    found: dict[str, Tensor] = {}
    marked = list(marked_weights(graph))
    if masks == "marks" and not marked:
        raise Unsupported(
            "masks='marks': no node has a mark of sparsify; masks='zeros' keeps every zero"
        )
    for view, mark in marked:
        target = str(view.weight_node.target)
        if target in roles:
            zeros = _pattern(mark, matrix(graph, view))
            stored = graph.constant(view.weight_node)
            assert stored is not None
            found[target] = (zeros.t() if _is_transposed(view) else zeros).reshape(stored.shape).contiguous()
    for target, role in roles.items():
        if masks == "zeros" and role == WEIGHT:
            zeros = graph.attribute(target).detach() == 0
            if not bool(zeros.all()):
                found[target] = zeros | found[target] if target in found else zeros
    return {target: zeros for target, zeros in found.items() if bool(zeros.any())}


def check_marks(graph: Graph) -> None:
    """Raise unless every marked weight still has its pattern.

    Raises:
        PassError: one has not.
    """
    for view, mark in marked_weights(graph):
        broken = mark.violation(matrix(graph, view))
        if broken:
            raise PassError(f"finetune: {label(view.node)} lost its pattern {mark.pattern}: {broken}")


def marked_weights(graph: Graph) -> Iterator[tuple[Linear | Conv, Mark]]:
    """Linears and convolutions whose weight was made sparse, with their marks."""
    for view in (*linears(graph), *convs(graph)):
        if isinstance(view, (Linear, Conv)):
            nodes: tuple[fx.Node, ...] = (view.node, *(view.inner if isinstance(view, Linear) else ()))
            mark = next((node.meta["sparsity"] for node in nodes if "sparsity" in node.meta), None)
            if isinstance(mark, Mark):
                yield view, mark


def matrix(graph: Graph, view: Linear | Conv) -> Tensor:
    """The weight as [out, in], that of a convolution as [out, in / groups * kernel]."""
    return view.weight(graph).flatten(1)


def _is_transposed(view: Linear | Conv) -> bool:
    return isinstance(view, Linear) and view.transposed


def _pattern(mark: Mark, weight: Tensor) -> Tensor:
    """The zeros [out, in] that make the pattern: zero blocks; of N:M every zero."""
    pattern = mark.pattern
    if pattern.refusal(*weight.shape):
        return weight == 0
    return pattern.spread(~pattern.occupied(weight)) if weight.numel() else torch.zeros_like(weight, dtype=torch.bool)
