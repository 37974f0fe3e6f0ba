"""`Channels`: what may be permuted together, and where: whole tied dimensions, or the widths of attention heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fxopt.ir.graph import Graph, label
from fxopt.ir.tied import TiedAxes, tied_dimensions
from fxopt.ir.views.conv import Conv, convs
from fxopt.ir.views.linear import Linear, linears

View = Linear | Conv


@dataclass(frozen=True)
class Place:
    """`size` neighbouring indices of an axis of a constant, from `start`."""

    target: str
    axis: int
    start: int = 0


@dataclass(frozen=True)
class Block:
    """Places whose indices share one permutation of `size`."""

    size: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Channels:
    """Blocks that are rearranged, or not, together; `fixed` says why they cannot be."""

    name: str  # of the first operator that makes them
    blocks: tuple[Block, ...]
    fixed: str = ""

    @property
    def size(self) -> int:
        """The number of channels."""
        return sum(block.size for block in self.blocks)


@dataclass(frozen=True)
class Weight:
    """A weight of linears or convolutions: which axis of the stored tensor is the outputs', which the inputs'."""

    target: str
    views: tuple[View, ...]
    outputs: int
    inputs: int

    @property
    def has_matrix(self) -> bool:
        """Whether every output sees every input: not so in grouped convolutions."""
        return all(isinstance(view, Linear) or view.groups == 1 for view in self.views)

    @property
    def name(self) -> str:
        """The operator that a user knows it by."""
        return label(self.views[0].node)

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """A tensor that lies as the weight does, as [out, in]."""
        return stored.movedim(self.outputs, 0).flatten(1)

    def stored(self, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The inverse of `matrix`; `shape` is that of the stored weight."""
        moved = [shape[self.outputs], *(size for axis, size in enumerate(shape) if axis != self.outputs)]
        return matrix.reshape(moved).movedim(0, self.outputs).contiguous()


def weights(graph: Graph) -> dict[str, Weight]:
    """The weights of all linears and convolutions, by target; without those that are used both ways round."""
    found: dict[str, list[tuple[int, View]]] = {}
    for view in (*linears(graph), *convs(graph)):
        if isinstance(view, (Linear, Conv)):
            outputs = 1 if isinstance(view, Linear) and view.transposed else 0
            found.setdefault(str(view.weight_node.target), []).append((outputs, view))
    return {
        target: Weight(target, tuple(view for _, view in uses), uses[0][0], 1 - uses[0][0])
        for target, uses in found.items()
        if len({outputs for outputs, _ in uses}) == 1
    }


def channels(graph: Graph, held: Mapping[str, Weight], *, of_inputs: bool = False) -> Iterator[Channels]:
    """The channels that the weights make, in execution order; those in heads instead of their whole.

    Args:
        of_inputs: also those that weights only take.
    """
    from fxopt.passes.rearrange_channels.heads import head_channels

    inside = list(head_channels(graph, held))
    covered = {(place.target, place.axis) for each in inside for block in each.blocks for place in block.places}
    order = {label(node): index for index, node in enumerate(graph.nodes)}
    found = list(inside)
    for group in tied_dimensions(graph):
        members = _members(group, held, of_inputs)
        if not members or (group.fixed and covered.issuperset(members)):
            continue
        target, axis = members[0]
        size = int(graph.attribute(target).shape[axis])
        if size < 2:
            continue
        places = {Place(str(node.target), axis) for node, axis in group.axes if graph.constant(node) is not None}
        block = Block(size, tuple(sorted(places, key=str)))
        users = [held[target] for target, axis in members if axis == held[target].outputs]
        named = [weight.name for weight in users or [held[target] for target, _ in members]]
        found.append(Channels(min(named, key=order.__getitem__), (block,), group.fixed))
    yield from sorted(found, key=lambda each: order[each.name])


def _members(group: TiedAxes, held: Mapping[str, Weight], of_inputs: bool) -> list[tuple[str, int]]:
    """The axes of weights that are in the group: of outputs, and of inputs where these are asked for."""
    axes = [(str(node.target), axis) for node, axis in group.axes if node.op == "get_attr"]
    return sorted(
        (target, axis)
        for target, axis in axes
        if target in held and (axis == held[target].outputs or (of_inputs and axis == held[target].inputs))
    )
