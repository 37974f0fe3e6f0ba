"""Rotary position embedding in front of queries and keys: x * cos + turned(x) * sin, of all features or of some.

Features are turned in pairs, halves apart or (interleaved) neighbours.

Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding" (2021).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.ir.graph import Graph, shape_of
from fxopt.ir.neutral import read
from fxopt.ir.views.attention.softmax import cast_below, is_last
from fxopt.ir.views.attention.view import Rotary
from fxopt.ir.views.common import argument, aten, is_aten, is_onnx

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def rotary(graph: Graph, node: fx.Node) -> Rotary | None:
    """The rotary embedding that the node is, or that some of its features are; None when there is none."""
    if is_onnx(node, "RotaryEmbedding") or is_onnx(node, "RotaryEmbedding", domain="com.microsoft"):
        return _operator(node)
    found = _pairs_turned(graph, node) or _complex(graph, node)
    if found is not None:
        return found
    return next(filter(None, (rotary(graph, part) for part in _parts(graph, node))), None)


def _operator(node: fx.Node) -> Rotary:
    arguments, options = node.args, node.kwargs
    first = 2 if is_onnx(node, "RotaryEmbedding", domain="com.microsoft") else 1
    width: Any = options.get("rotary_embedding_dim") or (shape_of(node) or (None,))[-1]
    cos, sin = arguments[first : first + 2]
    return Rotary(arguments[0], cos, sin, bool(options.get("interleaved", 0)), width)  # type: ignore[arg-type]


def _pairs_turned(graph: Graph, node: fx.Node) -> Rotary | None:
    """x * cos + turned * sin"""
    total = read(graph, node, "add")
    for straight, crossed in (total, total[::-1]) if total is not None else ():
        for x, cos in _factors(graph, straight):
            for turned, sin in _factors(graph, crossed):
                interleaved = _interleaved(graph, turned, x)
                if interleaved is not None:
                    return Rotary(x, cos, sin, interleaved, (shape_of(x) or (None,))[-1])
    return None


def _factors(graph: Graph, node: Any) -> Iterator[tuple[fx.Node, fx.Node]]:
    pair = read(graph, node, "mul")
    if pair is not None and all(isinstance(operand, fx.Node) for operand in pair):
        yield pair[0], pair[1]
        yield pair[1], pair[0]


def _interleaved(graph: Graph, turned: fx.Node, x: fx.Node) -> bool | None:
    """How pairs of x are turned by a right angle: False: halves, True: neighbours; None: it is something else."""
    size = (shape_of(x) or (None,))[-1]
    if not isinstance(size, int):
        return None
    halves: Any = read(graph, turned, "concat")
    if halves is not None and len(halves[0]) == 2 and is_last(halves[1], turned):
        second, first = (_piece(graph, part) for part in (_negated(graph, halves[0][0]), halves[0][1]))
        if first == _Piece(x, 0, size // 2, 1) and second == _Piece(x, size // 2, size, 1):
            return False
    pairs = _stacked(graph, turned)
    if pairs is not None:
        odd, even = (_piece(graph, part) for part in (_negated(graph, pairs[0]), pairs[1]))
        if even == _Piece(x, 0, size, 2) and odd == _Piece(x, 1, size, 2):
            return True
    return None


def _negated(graph: Graph, node: Any) -> Any:
    found = read(graph, node, "neg")
    return None if found is None else found[0]


def _stacked(graph: Graph, node: fx.Node) -> tuple[Any, Any] | None:
    """(a, b) when the node is reshape(stack([a, b], -1))."""
    flat = read(graph, node, "reshape")
    source = None if flat is None else flat[0]
    if is_aten(source, aten.stack.default):
        parts: Any = source.args[0]
        return (parts[0], parts[1]) if len(parts) == 2 and is_last(argument(source, 1, "dim", 0), source) else None
    joined: Any = read(graph, source, "concat")
    if joined is None or len(joined[0]) != 2 or not is_last(joined[1], source):
        return None
    columns = [read(graph, part, "unsqueeze") for part in joined[0]]
    if any(column is None or not is_last(column[1][0], part) for column, part in zip(columns, joined[0], strict=True)):
        return None
    first, second = (column[0] for column in columns if column is not None)
    return first, second


@dataclass(frozen=True)
class _Piece:
    """x[..., start:stop:step]"""

    x: fx.Node
    start: int
    stop: int
    step: int


def _piece(graph: Graph, node: Any) -> _Piece | None:
    """The piece of the last axis that the node is."""
    cut = read(graph, node, "slice")
    if cut is not None:
        return _sliced(cut)
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return None
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return None
    x, axis = _split(source)
    sizes = [(shape_of(part) or (None,))[-1] for part in sorted(source.users, key=_index)]
    known = [size for size in sizes if isinstance(size, int)]
    if x is None or not is_last(axis, x) or len(sizes) <= index or len(known) < len(sizes):
        return None
    start = sum(known[:index])
    return _Piece(x, start, start + known[index], 1)


def _index(node: fx.Node) -> int:
    return int(node.args[1]) if node.target is operator.getitem else 0  # type: ignore[arg-type]


def _split(node: fx.Node) -> tuple[fx.Node | None, Any]:
    if is_onnx(node, "Split"):
        return node.args[0], node.kwargs.get("axis", 0)  # type: ignore[return-value]
    if is_aten(node, *_SPLITS):
        return node.args[0], argument(node, 2, "dim", 0)  # type: ignore[return-value]
    return None, None


def _sliced(cut: tuple[Any, ...]) -> _Piece | None:
    x, starts, ends, axes, steps = cut
    size = (shape_of(x) or (None,))[-1]
    tuples = all(isinstance(value, tuple) and len(value) == 1 for value in (starts, ends, axes, steps))
    if not tuples or not isinstance(size, int) or not is_last(axes[0], x):
        return None
    start, stop, step = slice(starts[0], ends[0], steps[0]).indices(size)
    return _Piece(x, start, stop, step)


def _complex(graph: Graph, node: fx.Node) -> Rotary | None:
    """Pairs of neighbours as complex numbers, times unit numbers; `cos` and `sin` are both these."""
    flat = read(graph, node, "reshape")
    source = None if flat is None else flat[0]
    if not is_aten(source, aten.view_as_real.default):
        return None
    for number, angle in _factors(graph, source.args[0]):
        pairs = number.args[0] if is_aten(number, aten.view_as_complex.default) else None
        shaped = read(graph, pairs, "reshape")
        if shaped is not None and isinstance(shaped[0], fx.Node):
            return Rotary(shaped[0], angle, angle, True, (shape_of(shaped[0]) or (None,))[-1])
    return None


def _parts(graph: Graph, node: fx.Node) -> Iterator[fx.Node]:
    """The values whose features the node joins along its last axis, also by writing into an empty tensor."""
    joined: Any = read(graph, node, "concat")
    if joined is not None and is_last(joined[1], node):
        for part in joined[0]:
            yield _unspread(graph, part)
    elif is_aten(node, aten.slice_scatter.default) and is_last(argument(node, 2, "dim", 0), node):
        base, written = node.args[:2]
        if isinstance(base, fx.Node) and isinstance(written, fx.Node):
            copied = written.args[1] if is_aten(written, aten.copy.default) else written
            yield from (_unspread(graph, copied), base)


def _unspread(graph: Graph, node: Any) -> Any:
    """What is cast, or broadcast over heads."""
    while isinstance(node, fx.Node):
        wide = read(graph, node, "expand")
        below = cast_below(graph, node) if wide is None else wide[0]
        if not isinstance(below, fx.Node):
            break
        node = below
    return node
