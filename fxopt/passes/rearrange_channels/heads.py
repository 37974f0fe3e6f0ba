"""Channels inside attention heads: the width of each head can be permuted by itself, heads stay where they are.

q @ k.T sums over the width of a head: rows of the query and key projections may be permuted alike, head by head. The
width of v goes through attention as it is: rows of the value projection and columns of the output projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from fxopt.ir.graph import Graph, label, shape_of
from fxopt.ir.neutral import read
from fxopt.ir.views.attention import Attention, Operand, attentions
from fxopt.ir.views.common import reads_shape
from fxopt.ir.views.linear import Linear, linear
from fxopt.passes.rearrange_channels.channels import Block, Channels, Place, Weight

_SPLIT = (0, 2, 1, 3)  # [batch, length, heads, width] <-> [batch, heads, length, width]


@dataclass(frozen=True)
class _Projection:
    """A linear that makes, or takes, heads side by side."""

    view: Linear
    heads: int
    width: int


def head_channels(graph: Graph, held: Mapping[str, Weight]) -> Iterator[Channels]:
    """Of every attention between linears: the channels of queries and keys, and those of values."""
    for view in list(attentions(graph)):
        if not isinstance(view, Attention):
            continue
        q, k, v = (_source(graph, view, made, place) for made, place in ((view.q, 0), (view.k, 1), (view.v, 1)))
        if q is not None and k is not None and _fit(graph, q, k):
            yield _channels(graph, k, q, held, is_outputs=True)
        out = _taker(graph, view)
        if v is not None and out is not None and _fit(graph, v, out):
            yield _channels(graph, v, out, held, is_outputs=False)


def _channels(
    graph: Graph, few: _Projection, many: _Projection, held: Mapping[str, Weight], *, is_outputs: bool
) -> Channels:
    """One block per head of `few`, with the heads of `many` that go with it; `is_outputs`: rows of `many`, too."""
    width, repeats = few.width, many.heads // few.heads
    blocks = []
    for head in range(few.heads):
        places = list(_rows(graph, few, head * width))
        for other in range(head * repeats, (head + 1) * repeats):
            if is_outputs:
                places += _rows(graph, many, other * width)
            else:
                target = str(many.view.weight_node.target)
                places.append(Place(target, held[target].inputs, other * width))
        blocks.append(Block(width, tuple(places)))
    first = min(few.view.node, many.view.node) if is_outputs else few.view.node
    return Channels(label(first), tuple(blocks))


def _rows(graph: Graph, projection: _Projection, start: int) -> Iterator[Place]:
    """The rows of a head, and its part of the bias."""
    view = projection.view
    yield Place(str(view.weight_node.target), 1 if view.transposed else 0, start)
    bias = view.bias(graph)
    if bias is not None and view.bias_node is not None and bias.shape[-1] > 1:
        yield Place(str(view.bias_node.target), bias.dim() - 1, start)


def _fit(graph: Graph, a: _Projection, b: _Projection) -> bool:
    """Two projections with heads of one width, whose constants nothing else uses."""
    few, many = sorted((a.heads, b.heads))
    nodes = [node for each in (a, b) for node in (each.view.weight_node, each.view.bias_node) if node is not None]
    targets = [str(node.target) for node in nodes]
    alone = all(_users(graph, target) == 1 for target in targets)
    return a.width == b.width and many % few == 0 and alone and len(set(targets)) == len(targets)


def _users(graph: Graph, target: str) -> int:
    """The operators that use a constant, also behind a transpose."""
    count = 0
    for node in graph.fx.find_nodes(op="get_attr"):
        if str(node.target) == target:
            for user in node.users:
                count += len(user.users) if read(graph, user, "transpose") is not None else 1
    return count


def _source(graph: Graph, view: Attention, operand: Operand, place: int) -> _Projection | None:
    """The linear that makes q, k or v; what lies between is used by nothing else."""
    node = operand.node
    if operand.replay or not _leads_to(graph, node, {view.node, *view.inner}):
        return None
    if view.heads is not None:
        return _projection(graph, linear(graph, node), view.heads[place]) if operand.perm is None else None
    parted = read(graph, node, "reshape")
    if operand.perm != _SPLIT or parted is None or not _used_by(parted[0], {node}):
        return None
    heads = _heads(node)
    return None if heads is None else _projection(graph, linear(graph, parted[0]), heads)


def _taker(graph: Graph, view: Attention) -> _Projection | None:
    """The linear that takes the result, heads side by side."""
    value, heads = view.node, None if view.heads is None else view.heads[0]
    if view.heads is None:
        turned = value if view.result_perm == _SPLIT else _turned(graph, view)
        merged = None if turned is None else _only(turned)
        if turned is None or merged is None or read(graph, merged, "reshape") is None:
            return None
        heads, value = _heads(turned), merged
    user = _only(value)
    for node in () if user is None else (user, *user.users):
        taker = linear(graph, node)
        if isinstance(taker, Linear) and taker.x is value and heads is not None:
            return _projection(graph, taker, heads, columns=True)
    return None


def _turned(graph: Graph, view: Attention) -> fx.Node | None:
    """The result as [batch, length, heads, width], by the one operator that uses it."""
    turned = _only(view.node) if view.result_perm is None else None
    order = None if turned is None else read(graph, turned, "transpose")
    return turned if order is not None and tuple(order[1]) == _SPLIT else None


def _projection(graph: Graph, view: object, heads: int, *, columns: bool = False) -> _Projection | None:
    if not isinstance(view, Linear):
        return None
    size = view.features(graph)[1 if columns else 0]
    return _Projection(view, heads, size // heads) if heads and size % heads == 0 else None


def _heads(parted: fx.Node) -> int | None:
    """The heads of [batch, length, heads, width]."""
    shape = shape_of(parted)
    if shape is None or len(shape) != 4 or not isinstance(shape[2], int) or not isinstance(shape[3], int):
        return None
    return shape[2]


def _used_by(node: fx.Node, users: set[fx.Node]) -> bool:
    return all(user in users or reads_shape(user) for user in node.users)


def _leads_to(graph: Graph, node: fx.Node, users: set[fx.Node]) -> bool:
    """Whether only these use the value, some of them through transposes and copies."""
    return all(
        user in users
        or reads_shape(user)
        or (any(read(graph, user, name) for name in ("transpose", "identity")) and _leads_to(graph, user, users))
        for user in node.users
    )


def _only(node: fx.Node) -> fx.Node | None:
    """The single user of a value, beside those that read its shape."""
    users = [user for user in node.users if not reads_shape(user)]
    return users[0] if len(users) == 1 else None
