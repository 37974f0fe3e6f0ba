"""Rearrange the channels of a graph, group by group, where that keeps more importance under a pattern of zeros."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.graph import Graph, provenance, set_attribute
from fxopt.ir.ledger import Refusal
from fxopt.ir.masks import mark_of
from fxopt.ir.sparsity import Pattern
from fxopt.passes.rearrange_channels.channels import Block, Channels, Place, View, Weight, channels, weights
from fxopt.passes.rearrange_channels.order import Role, best_order

Importance = Callable[[View], Tensor]
_LEAST = 1e-6  # by which the kept share must rise


@dataclass(frozen=True)
class Rearranged:
    """What came of some channels: the share of importance that the pattern keeps, or the refusal."""

    channels: Channels
    before: float = 0.0
    after: float = 0.0
    refusal: Refusal | None = None


def rearrange(
    graph: Graph,
    pattern: Pattern,
    sparsity: float,
    importance: Importance | None = None,
    *,
    refuses: Callable[[Channels, list[Weight]], Refusal | None] = lambda found, held: None,
    made_by: str = "rearrange-channels",
) -> list[Rearranged]:
    """Permute channels in place; the graph computes the same, up to the order of sums.

    Types must be known (`fxopt.ir.shapes.infer`).

    Args:
        sparsity: share of zeros that is going to be made; N:M has its own.
        importance: of each weight of a linear or convolution, [out, in] not negative; None: its magnitude. That of
            Wanda is |W| * |x|.
        refuses: called with channels and the weights that would gain; a reason to leave them.

    Raises:
        InvalidInput: an importance has another shape than its weight, or negative elements.
    """
    held = weights(graph)
    given = {} if importance is None else {key: _given(graph, weight, importance) for key, weight in held.items()}
    found = []
    for each in list(channels(graph, held, of_inputs=pattern.of > 1)):
        gaining = _gaining(graph, each, held, pattern)
        refusal = _refusal(graph, each, held, gaining, pattern) or refuses(each, gaining)
        if refusal is not None:
            found.append(Rearranged(each, refusal=refusal))
            continue
        scores = {
            weight.target: given[weight.target] if given else graph.attribute(weight.target).detach().abs().float()
            for weight in gaining
        }
        before = _kept(gaining, scores, pattern, sparsity)
        orders = [_order(block, gaining, scores, pattern, sparsity) for block in each.blocks]
        after = _kept(gaining, _moved(scores, each.blocks, orders), pattern, sparsity)
        if not after >= before + _LEAST:
            why = Refusal("no better order was found: {} keeps {:.1%} of the importance", str(pattern), before)
            found.append(Rearranged(each, before, before, why))
            continue
        given = _moved(given, each.blocks, orders)
        _apply(graph, each.blocks, orders, made_by)
        found.append(Rearranged(each, before, after))
    return found


def _given(graph: Graph, weight: Weight, importance: Importance) -> Tensor:
    """The importance of a weight, as the weight is stored; of one with several uses, their sum."""
    stored: Tensor = graph.attribute(weight.target).detach()
    expected = weight.matrix(stored).shape
    total = torch.zeros(expected)
    for view in weight.views:
        scores = importance(view).float()
        if scores.shape != expected or not bool((scores >= 0).all()):
            raise InvalidInput(
                f"importance of {weight.name!r} has shape {list(scores.shape)}; expected {list(expected)}, and no "
                "negative number"
            )
        total += scores
    return weight.stored(total, stored.shape)


def _gaining(graph: Graph, found: Channels, held: dict[str, Weight], pattern: Pattern) -> list[Weight]:
    """The weights that keep more or less as the channels are ordered."""
    places = [place for block in found.blocks for place in block.places]
    return [
        weight
        for weight in held.values()
        if any(_is_output(weight, place, pattern) or _is_input(weight, place, pattern) for place in places)
        and not pattern.refusal(*weight.matrix(graph.attribute(weight.target)).shape)
    ]


def _is_output(weight: Weight, place: Place, pattern: Pattern) -> bool:
    """Whether the pattern joins neighbours of the place as outputs."""
    return place.target == weight.target and place.axis == weight.outputs and pattern.outputs > 1 and weight.has_matrix


def _is_input(weight: Weight, place: Place, pattern: Pattern) -> bool:
    """Whether the pattern joins neighbours of the place as inputs."""
    return place.target == weight.target and place.axis == weight.inputs and pattern.of > 1 and weight.has_matrix


def _refusal(
    graph: Graph, found: Channels, held: dict[str, Weight], gaining: list[Weight], pattern: Pattern
) -> Refusal | None:
    if found.fixed:
        return Refusal("the order is fixed: {}", found.fixed)
    targets = {place.target for block in found.blocks for place in block.places}
    if not gaining:
        shapes = {tuple(held[target].matrix(graph.attribute(target)).shape) for target in targets & held.keys()}
        reasons = sorted(filter(None, (pattern.refusal(*shape) for shape in shapes)))
        return Refusal("{}", reasons[0] if reasons else f"the pattern {pattern} does not depend on the order")
    for weight in (held[target] for target in sorted(targets & held.keys())):
        if any(mark_of(view.node) is not None for view in weight.views):
            return Refusal("{} was made sparse before: its pattern could break", weight.name)
    for size in {block.size for block in found.blocks if len(found.blocks) > 1}:
        for group in (pattern.outputs, pattern.of):
            if size % group:
                return Refusal("heads of width {} do not divide by {} of the pattern {}", size, group, str(pattern))
    return None


# ---- the search


def _kept(gaining: list[Weight], scores: dict[str, Tensor], pattern: Pattern, sparsity: float) -> float:
    """The share of importance that the pattern keeps, every weight counted by its size."""
    kept = whole = 0.0
    for weight in gaining:
        matrix = weight.matrix(scores[weight.target])
        total = float(matrix.double().sum())
        share = float(matrix.double()[pattern.mask(matrix, sparsity)].sum()) / total if total else 1.0
        kept, whole = kept + share * matrix.numel(), whole + matrix.numel()
    return kept / whole


def _order(block: Block, gaining: list[Weight], scores: dict[str, Tensor], pattern: Pattern, sparsity: float) -> Tensor:
    """The order that the search finds: channel `order[i]` comes to place i."""
    roles = []
    for weight in gaining:
        matrix = weight.matrix(scores[weight.target])
        scale = matrix.numel() / (float(matrix.sum()) or 1.0)
        for place in block.places:
            part = slice(place.start, place.start + block.size)
            if _is_output(weight, place, pattern):
                roles.append(_output_role(matrix, part, scale, pattern, sparsity))
            neighbours = matrix.shape[1] == scores[weight.target].shape[weight.inputs]  # not so in 3x3 kernels
            if _is_input(weight, place, pattern) and neighbours:
                columns = pattern.shared(matrix)[:, part].t() * scale
                roles.append(Role(columns.contiguous(), pattern.of, pattern.kept))
    return best_order(roles) if roles else torch.arange(block.size)


def _output_role(matrix: Tensor, part: slice, scale: float, pattern: Pattern, sparsity: float) -> Role:
    """Outputs that share their zeros: what lies above the threshold of the whole weight is kept."""
    groups = pattern.shared(matrix).flatten()
    share = pattern.sparsity if pattern.is_counted else sparsity
    removed = min(round(groups.numel() * share), groups.numel() - 1)
    threshold = float(groups.kthvalue(removed + 1).values)
    rows = matrix[part]
    if pattern.is_counted:
        sets = Pattern(1, pattern.kept, pattern.of).mask(rows, 0.0)
    else:
        sets = rows * pattern.outputs > threshold
    return Role((rows * scale).contiguous(), pattern.outputs, threshold=threshold * scale, sets=sets)


# ---- the result


def _moved(values: Mapping[str, Tensor], blocks: Sequence[Block], orders: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors that lie as the constants do, permuted as these will be."""
    moved = dict(values)
    for block, order in zip(blocks, orders, strict=True):
        for place in block.places:
            if place.target in moved:
                moved[place.target] = _permuted(moved[place.target], place, order)
    return moved


def _permuted(value: Tensor, place: Place, order: Tensor) -> Tensor:
    index = torch.arange(value.shape[place.axis])
    index[place.start : place.start + len(order)] = order + place.start
    return value.index_select(place.axis, index)


def _apply(graph: Graph, blocks: Sequence[Block], orders: Sequence[Tensor], made_by: str) -> None:
    targets = {place.target for block in blocks for place in block.places}
    constants = {target: graph.attribute(target).detach() for target in sorted(targets)}
    for target, value in _moved(constants, blocks, orders).items():
        set_attribute(graph.root, target, graph.stored(value))
    for node in graph.fx.find_nodes(op="get_attr"):
        if str(node.target) in targets:
            node.meta["provenance"] = (*provenance(node), made_by)
