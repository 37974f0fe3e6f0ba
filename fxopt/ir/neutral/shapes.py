"""How operators that move, cut and join values are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxopt.ir.graph import Graph, shape_of
from fxopt.ir.neutral.readers import Arguments, Readers, argument, aten, ints, key_of, normal_axes, operand, rank_of

readers = Readers()
reads = readers.reads


@reads("reshape", "Reshape")
def _onnx_reshape(graph: Graph, node: fx.Node) -> Arguments | None:
    x, shape = node.args[0], operand(graph, node, 1, "shape")
    if isinstance(shape, tuple) and 0 in shape and not node.kwargs.get("allowzero"):
        known = _without_zeros(shape, shape_of(x))
        shape = node.args[1] if known is None and len(node.args) > 1 else known
    return None if shape is None else (x, shape)


def _without_zeros(shape: tuple[int, ...], given: Sequence[Any] | None) -> tuple[int, ...] | None:
    """The shape with each 0, a copy of the size of x, replaced by that size, or by the -1 that will be inferred."""
    sizes = list(shape)
    for axis, size in enumerate(shape):
        if size != 0:
            continue
        if given is None or axis >= len(given):
            return None
        sizes[axis] = given[axis] if isinstance(given[axis], int) else -1
    return tuple(sizes) if sizes.count(-1) <= 1 else None


@reads("reshape", "Flatten")
def _onnx_flatten(graph: Graph, node: fx.Node) -> Arguments | None:
    shape = shape_of(node)
    if shape is None:
        return None
    sizes = tuple(size if isinstance(size, int) else -1 for size in shape)
    return (node.args[0], sizes) if sizes.count(-1) <= 1 else None


@reads("reshape", aten.view.default, aten.reshape.default, aten._unsafe_view.default)
@reads("expand", aten.expand.default)
def _torch_shape(graph: Graph, node: fx.Node) -> Arguments | None:
    return None if node.kwargs else (node.args[0], tuple(node.args[1]))  # type: ignore[arg-type]


@reads("expand", "Expand")
def _onnx_expand(graph: Graph, node: fx.Node) -> Arguments | None:
    return node.args[0], operand(graph, node, 1, "")


@reads("transpose", "Transpose")
def _onnx_transpose(graph: Graph, node: fx.Node) -> Arguments | None:
    perm: Any = node.kwargs.get("perm")
    if perm is None:
        rank = rank_of(node.args[0])
        perm = None if rank is None else range(rank - 1, -1, -1)
    return None if perm is None else (node.args[0], tuple(perm))


@reads("transpose", aten.permute.default)
def _permute(graph: Graph, node: fx.Node) -> Arguments | None:
    perm: Any = node.args[1]
    return node.args[0], normal_axes(perm, len(perm))


@reads("transpose", aten.t.default, aten.transpose.int)
def _torch_swap(graph: Graph, node: fx.Node) -> Arguments | None:
    rank = rank_of(node.args[0])
    if rank is None:
        return None
    first, second = node.args[1:] if node.target is aten.transpose.int else ((0, 1) if rank == 2 else (0, 0))
    perm = list(range(rank))
    if perm:
        a, b = normal_axes((first, second), rank)
        perm[a], perm[b] = perm[b], perm[a]
    return node.args[0], tuple(perm)


@reads("squeeze", "Squeeze")
@reads("unsqueeze", "Unsqueeze")
def _onnx_axes(graph: Graph, node: fx.Node) -> Arguments | None:
    x, axes = node.args[0], operand(graph, node, 1, "axes")
    return None if axes is None else (x, normal_axes(axes, rank_of(x if key_of(node) == "Squeeze" else node)))


@reads("squeeze", aten.squeeze.dim, aten.squeeze.dims)
@reads("unsqueeze", aten.unsqueeze.default)
def _torch_axes(graph: Graph, node: fx.Node) -> Arguments | None:
    x, axes = node.args[:2]
    axes = (axes,) if isinstance(axes, int) else axes
    return x, normal_axes(axes, rank_of(node if node.target is aten.unsqueeze.default else x))


@reads("slice", "Slice")
def _onnx_slice(graph: Graph, node: fx.Node) -> Arguments | None:
    x, starts, ends = node.args[0], operand(graph, node, 1, "starts"), operand(graph, node, 2, "ends")
    axes, steps = operand(graph, node, 3, "axes"), operand(graph, node, 4, "")
    if isinstance(starts, tuple):
        axes = tuple(range(len(starts))) if axes is None else axes
        steps = (1,) * len(starts) if steps is None else steps
    return x, starts, ends, normal_axes(axes, rank_of(x)), steps


@reads("slice", aten.slice.Tensor)
def _torch_slice(graph: Graph, node: fx.Node) -> Arguments | None:
    x, axis = node.args[0], argument(node, 1, "dim", 0)
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    bounds = (0 if start is None else start,), (2**63 - 1 if end is None else end,)
    return x, *bounds, normal_axes((axis,), rank_of(x)), (argument(node, 4, "step", 1),)


@reads("pad", "Pad")
def _onnx_pad(graph: Graph, node: fx.Node) -> Arguments | None:
    given = node.kwargs.get("paddings")
    return node.args[0], operand(graph, node, 1, "pads") if given is None else ints(graph, given)


@reads("pad", aten.constant_pad_nd.default, aten.pad.default)
def _torch_pad(graph: Graph, node: fx.Node) -> Arguments | None:
    pads, rank = tuple(node.args[1]), rank_of(node.args[0])  # type: ignore[arg-type]
    if rank is None:
        return None
    pairs = [*(pads[index : index + 2] for index in range(0, len(pads), 2)), *[(0, 0)] * (rank - len(pads) // 2)]
    return node.args[0], tuple(pair[side] for side in (0, 1) for pair in reversed(pairs))


@reads("concat", "Concat")
def _onnx_concat(graph: Graph, node: fx.Node) -> Arguments | None:
    return node.args, normal_axes(node.kwargs.get("axis", 1), rank_of(node.args[0]))


@reads("concat", aten.cat.default)
def _torch_concat(graph: Graph, node: fx.Node) -> Arguments | None:
    parts: Any = node.args[0]
    return tuple(parts), normal_axes(argument(node, 1, "dim", 0), rank_of(parts[0]))
