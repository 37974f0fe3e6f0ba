"""What queries, keys and values are before scales, transposes, the repetition of shared heads, and rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from fxopt.ir.graph import Graph, shape_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.views.attention.numbers import is_one, same_sizes
from fxopt.ir.views.attention.scores import factored
from fxopt.ir.views.attention.view import Operand
from fxopt.ir.views.common import argument, aten, is_aten, is_onnx

_HEADS = -3  # the axis of the heads, from the end


def untransposed(graph: Graph, operand: Operand) -> Operand:
    """The operand before transposes and copies."""
    while True:
        turn = read(graph, operand.node, "transpose")
        copied = read(graph, operand.node, "identity")
        if turn is not None and isinstance(turn[0], fx.Node):
            order = tuple(range(len(turn[1]))) if operand.perm is None else operand.perm
            perm = tuple(turn[1][axis] for axis in order)
            operand = Operand(turn[0], None if perm == tuple(range(len(perm))) else perm)
        elif copied is not None and isinstance(copied[0], fx.Node):
            operand = replace(operand, node=copied[0])
        else:
            flat = _flat_swap(graph, operand)
            if flat is None:
                return operand
            operand = flat


def _flat_swap(graph: Graph, operand: Operand) -> Operand | None:
    """x when the operand is reshape(transpose(reshape(x))) that only swaps its last two axes."""
    found = _flat(graph, operand.node)
    given = None if found is None else shape_of(found[0])
    if found is None or given is None or str(given) != str(found[1]):
        return None
    return _swapped(replace(operand, node=found[0]))


def _flat(graph: Graph, node: fx.Node) -> tuple[fx.Node, tuple[Any, ...]] | None:
    """x and a shape when the node is x in that shape with its last two axes swapped, with three axes in between."""
    back = read(graph, node, "reshape")
    turn = None if back is None else read(graph, back[0], "transpose")
    flat = None if turn is None else read(graph, turn[0], "reshape")
    if turn is None or flat is None or tuple(turn[1]) != (*range(len(turn[1]) - 2), len(turn[1]) - 1, len(turn[1]) - 2):
        return None
    middle, result = shape_of(turn[0]), shape_of(node)
    if middle is None or result is None or len(result) < 2 or not isinstance(flat[0], fx.Node):
        return None
    before = (*result[:-2], result[-1], result[-2])
    return (flat[0], before) if str(middle[-2:]) == str(before[-2:]) else None


def _swapped(operand: Operand) -> Operand:
    """The operand with the last two axes of its node swapped before its own permutation."""
    rank = len(operand.shape or ()) if operand.perm is None else len(operand.perm)
    order = tuple(range(rank)) if operand.perm is None else operand.perm
    swap = (*range(rank - 2), rank - 1, rank - 2)
    perm = tuple(swap[axis] for axis in order)
    return replace(operand, perm=None if perm == tuple(range(rank)) else perm)


def unscaled(graph: Graph, operand: Operand) -> tuple[Operand, float]:
    """The operand before factors of its own, and their product."""
    operand, scale = untransposed(graph, operand), 1.0
    while True:
        found = factored(graph, operand.node)
        if found is None:
            return operand, scale
        scale *= found[1]
        operand = untransposed(graph, replace(operand, node=found[0]))


def unscaled_below(graph: Graph, operand: Operand) -> tuple[Operand, float]:
    """The same below reshapes, which are made again; unchanged when there is no factor."""
    moved: list[fx.Node] = []
    node = operand.node
    while True:
        found = factored(graph, node)
        if found is not None:
            return Operand(found[0], operand.perm, tuple(reversed(moved))), found[1]
        step = next(filter(None, (read(graph, node, name) for name in ("reshape", "transpose", "identity"))), None)
        if step is None or not isinstance(step[0], fx.Node):
            return operand, 1.0
        moved.append(node)
        node = step[0]


@dataclass(frozen=True)
class Shared:
    """An operand before each of its heads was repeated `times` times in a row."""

    operand: Operand
    times: int


def unrepeated(graph: Graph, operand: Operand) -> Shared:
    """The operand before its heads were repeated; with times 1 when they were not."""
    rank = len(operand.shape or ())
    if rank < 4 or operand.replay:
        return Shared(operand, 1)
    axis = rank + _HEADS if operand.perm is None else operand.perm[rank + _HEADS]
    joined, flat = read(graph, operand.node, "reshape"), _flat(graph, operand.node)
    found = None if joined is None else _expanded(graph, joined[0], shape_of(operand.node), axis)
    found = found or _interleaved(operand.node, axis)
    if found is None and flat is not None:
        found = _expanded(graph, *flat, axis)
        operand = operand if found is None else _swapped(operand)
    if found is None:
        return Shared(operand, 1)
    node, times = found
    return Shared(untransposed(graph, replace(operand, node=node)), times)


def _expanded(graph: Graph, wide: Any, result: Sequence[Any] | None, axis: int) -> tuple[fx.Node, int] | None:
    """x when `wide`, reshaped to `result`, is expand(unsqueeze(x, axis + 1)), or with a tile instead of expand."""
    wide = _copied(graph, wide)
    spread = _spread(graph, wide) if isinstance(wide, fx.Node) else None
    if spread is None:
        return None
    inserted = _unsqueezed(graph, spread, axis + 1)
    before, after = shape_of(spread), shape_of(wide)
    if inserted is None or before is None or after is None or result is None or len(after) != len(before):
        return None
    times = after[axis + 1]
    if not isinstance(times, int) or not is_one(before[axis + 1]):
        return None
    others = [size for index, size in enumerate(after) if index != axis + 1]
    known = [size for index, size in enumerate(before) if index != axis + 1]
    if not same_sizes(others, known) or not isinstance(others[axis], int):
        return None
    wanted = [*others[:axis], others[axis] * times, *others[axis + 1 :]]
    return (inserted, times) if same_sizes(result, wanted) else None


def _copied(graph: Graph, node: Any) -> Any:
    found = read(graph, node, "identity")
    return node if found is None else found[0]


def _spread(graph: Graph, node: fx.Node) -> fx.Node | None:
    """What is broadcast or tiled; whether only along one new axis is seen from the shapes."""
    wide = read(graph, node, "expand")
    if wide is not None:
        return wide[0] if isinstance(wide[0], fx.Node) else None
    tiled = is_onnx(node, "Tile") or is_aten(node, aten.repeat.default)
    return node.args[0] if tiled and isinstance(node.args[0], fx.Node) else None


def _unsqueezed(graph: Graph, node: fx.Node, axis: int) -> fx.Node | None:
    """x when the node is x with a new axis of size 1 there."""
    found = read(graph, node, "unsqueeze")
    if found is not None:
        return found[0] if tuple(found[1]) == (axis,) and isinstance(found[0], fx.Node) else None
    shaped = read(graph, node, "reshape")
    given, made = (shape_of(shaped[0]), shape_of(node)) if shaped is not None else (None, None)
    if shaped is None or given is None or made is None:
        return None
    same = same_sizes(made, [*given[:axis], 1, *given[axis:]])
    return shaped[0] if same and isinstance(shaped[0], fx.Node) else None


def _interleaved(node: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """x when the node is x.repeat_interleave(times, axis)."""
    if not is_aten(node, aten.repeat_interleave.self_int):
        return None
    times, along = node.args[1], argument(node, 2, "dim")
    rank = len(shape_of(node) or ())
    if not isinstance(times, int) or not isinstance(along, int) or along % rank != axis:
        return None
    return (node.args[0], times) if isinstance(node.args[0], fx.Node) else None


def shared_heads(q: Operand, k: Shared, v: Shared) -> int | Refusal:
    """How many heads of q share one of k and v: by repetition, or because one head broadcasts."""
    if k.times != v.times:
        return Refusal("the heads of its keys are repeated {} times, those of its values {} times", k.times, v.times)
    shapes = [operand.shape for operand in (q, k.operand, v.operand)]
    heads = [shape[_HEADS] for shape in shapes if shape is not None and len(shape) >= 4]
    if len(heads) != 3:
        return 1
    if k.times > 1:
        return k.times
    if is_one(heads[1]) and is_one(heads[2]) and isinstance(heads[0], int) and heads[0] > 1:
        return int(heads[0])
    if str(heads[1]) != str(heads[2]):
        return Refusal("its keys have {} heads, its values {}", heads[1], heads[2])
    return 1
