"""`ResidualBlock`: x + f(x), where f mixes features (a product with a weight, a convolution, attention)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxopt.ir.graph import Graph, shape_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.views.common import escapes, is_onnx, reads_shape

_MIXING_ONNX = ("MatMul", "Gemm", "Conv", "Attention", "MultiHeadAttention", "GroupQueryAttention", "Einsum")
_MIXING_ATEN = (
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "convolution",
    "conv1d",
    "conv2d",
    "conv3d",
    "einsum",
)
_MIXING_ATEN_PREFIX = ("scaled_dot_product", "_scaled_dot_product")


@dataclass(frozen=True)
class ResidualBlock:
    """`node` = `entry` + `branch`; every path from the branch back to the entry stays among the `inner` nodes.

    The inner nodes depend on the entry and the branch on them, so that without the block `node` is `entry`. What the
    branch takes from elsewhere (masks, constants, positions) is not part of the block, nor are shapes; a shape that is
    read from an inner value may be used elsewhere.
    """

    node: fx.Node
    entry: fx.Node
    branch: fx.Node
    inner: tuple[fx.Node, ...]


def residual(graph: Graph, node: fx.Node) -> ResidualBlock | Refusal | None:
    """The block that ends in the addition `node`; None when it is something else, a refusal when it is almost one."""
    operands = node.args if is_onnx(node, "Sum") else read(graph, node, "add")
    if operands is None or len(operands) != 2 or operands[0] is operands[1]:
        return None
    for entry, branch in (operands, operands[::-1]):
        if not isinstance(entry, fx.Node) or not isinstance(branch, fx.Node) or not entry < branch:
            continue
        if entry.op == "get_attr" or _broadcasts(entry, node):
            continue
        inner = between(entry, branch)
        if not inner or not any(map(_mixes, inner)):
            continue
        outside = escapes(inner, node)
        if outside is not None:
            return Refusal("its inner value {} is also used by {}", outside[0].name, outside[1].name)
        return ResidualBlock(node, entry, branch, inner)
    return None


def residuals(graph: Graph) -> Iterator[ResidualBlock | tuple[fx.Node, Refusal]]:
    """Every residual block of the graph in execution order, and what is almost one with the reason."""
    for node in list(graph.calls()):
        view = residual(graph, node)
        if isinstance(view, ResidualBlock):
            yield view
        elif view is not None:
            yield node, view


def between(entry: fx.Node, last: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes on paths from `entry` (left out) to `last` (included), in execution order."""
    behind: set[fx.Node] = set()
    pending = [last]
    while pending:
        node = pending.pop()
        if node not in behind and entry < node:
            behind.add(node)
            pending.extend(node.all_input_nodes)
    found: set[fx.Node] = set()
    for node in sorted(behind):
        if not reads_shape(node) and any(used is entry or used in found for used in node.all_input_nodes):
            found.add(node)
    return tuple(sorted(found)) if last in found else ()


def _broadcasts(entry: fx.Node, node: fx.Node) -> bool:
    """True when the entry is known to be smaller than the sum (an attention mask)."""
    given, result = shape_of(entry), shape_of(node)
    return given is not None and result is not None and str(given) != str(result)


def _mixes(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, OnnxOp):
        return target.op_type in _MIXING_ONNX or target.domain == "fxopt"
    packet = getattr(target, "overloadpacket", None)
    name = str(getattr(packet, "__name__", ""))
    if getattr(target, "namespace", "") == "fxopt":
        return True
    return name in _MIXING_ATEN or name.startswith(_MIXING_ATEN_PREFIX)
