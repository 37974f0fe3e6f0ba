"""What is computed beside a sparse weight: two thin matrices, or ARMOR's block-diagonal ones on both sides of it."""

from __future__ import annotations

from torch import Tensor, fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label, tensor_value
from fxopt.ir.masks import set_mark
from fxopt.ir.sparsity import Mark
from fxopt.ir.target import Cost
from fxopt.ir.views.common import aten
from fxopt.ir.views.linear import Linear
from fxopt.passes.sparsify.armor import Wrapped
from fxopt.passes.sparsify.layer import Layer


def rank_of(share: float, out: int, columns: int) -> int:
    """The rank of two thin matrices that have at most this share of the weight's parameters."""
    return int(share * out * columns / (out + columns))


def parameters(out: int, columns: int, *, rank: int = 0, block: int = 0) -> int:
    """Parameters of thin matrices of this rank, or of block-diagonal ones on both sides."""
    return (rank or block) * (out + columns)


def cost(layer: Layer, out: int, columns: int, itemsize: int, dtype: str, *, rank: int = 0, block: int = 0) -> Cost:
    """The work beside the product with the sparse weight."""
    rows, more = layer.positions(), parameters(out, columns, rank=rank, block=block)
    values = rows * (columns + 2 * out + 2 * rank) if rank else 2 * rows * (columns + out)
    return Cost(2.0 * rows * more, (values + more) * itemsize, dtype, "linear", 3 if rank else 2)


def add_low_rank(graph: Graph, layer: Layer, left: Tensor, right: Tensor, made_by: str) -> None:
    """y becomes y + (x @ right.T) @ left.T."""
    node = layer.node
    builder = Builder(graph, node.next, made_by, like=node)
    stem = label(layer.view.weight_node)
    thin = builder.linear(layer.x, right, None, f"{stem}_right")
    total = builder.add(node, builder.linear(thin, left, None, f"{stem}_left"))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    _unmarked(builder)


def wrap(graph: Graph, layer: Layer, found: Wrapped, mark: Mark, made_by: str) -> None:
    """Replace a linear by a block-diagonal one, a sparse one, which is marked, and another block-diagonal one."""
    view = layer.view
    assert isinstance(view, Linear)
    builder = Builder(graph, view.node, made_by, like=view.node)
    stem = label(view.weight_node)
    inner = _by_blocks(builder, view.x, found.right, f"{stem}_right")
    core = builder.linear(inner, found.core.contiguous(), None, stem)
    outer = _by_blocks(builder, core, found.left, f"{stem}_left", like=view.x)
    total = outer if view.bias_node is None else builder.add(outer, view.bias_node)
    _unmarked(builder)
    graph.replace(view.node, total)
    total.meta.pop("sparsity", None)
    for swallowed in view.inner:
        if not swallowed.users:
            graph.erase(swallowed)
    set_mark(graph, core, mark)


def _by_blocks(builder: Builder, x: fx.Node, blocks: Tensor, hint: str, like: fx.Node | None = None) -> fx.Node:
    """x @ blockdiag(blocks).T for blocks [n, d, d]; `like` has the rank of x, where that is not known yet."""
    count, size, _ = blocks.shape
    turned = builder.const(blocks.mT.contiguous(), hint)
    if not builder.is_onnx:
        cut = builder.call(aten.unflatten.int, x, -1, [count, 1, size])
        return builder.call(aten.flatten.using_ints, builder.matmul(cut, turned), -3, -1)
    value = tensor_value(x if like is None else like)
    assert value is not None
    kept = [0] * (value.dim() - 1)
    cut = builder.onnx("Reshape", x, builder.ints([*kept, count, 1, size], "blocks"))
    return builder.onnx("Reshape", builder.matmul(cut, turned), builder.ints([*kept, -1], "features"))


def _unmarked(builder: Builder) -> None:
    for node in builder.made:
        node.meta.pop("sparsity", None)
