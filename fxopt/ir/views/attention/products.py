"""The two matrix products of attention in their spellings: matmul, bmm, baddbmm, einsum, FusedMatMul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.neutral import read
from fxopt.ir.views.attention.view import Operand
from fxopt.ir.views.common import aten, is_aten, is_onnx, scalar_constant


@dataclass(frozen=True)
class Product:
    """scale * left @ right + added: left [..., m, c], right [..., c, n]; `node` has the axes in the order `perm`."""

    node: fx.Node
    left: Operand
    right: Operand
    scale: float = 1.0
    added: fx.Node | None = None
    perm: tuple[int, ...] | None = None

    def holds_matrix(self, graph: Graph) -> bool:
        """Whether an operand is a constant matrix: it is a linear then."""
        constants = (graph.constant(operand.node) for operand in (self.left, self.right))
        return any(constant is not None and constant.dim() == 2 for constant in constants)


def swapped(rank: int) -> tuple[int, ...]:
    """The permutation that swaps the last two axes."""
    return (*range(rank - 2), rank - 1, rank - 2)


def turned(operand: Operand) -> Operand | None:
    """The operand with its last two axes swapped; None when its rank is unknown."""
    shape = operand.shape
    if shape is None or len(shape) < 2:
        return None
    order = operand.perm or tuple(range(len(shape)))
    perm = tuple(order[axis] for axis in swapped(len(shape)))
    return Operand(operand.node, None if perm == tuple(range(len(perm))) else perm, operand.replay)


def product(graph: Graph, node: object) -> Product | None:
    """The product that the node is; None when it is something else."""
    if not isinstance(node, fx.Node):
        return None
    plain = read(graph, node, "matmul")
    if plain is not None:
        return _product(node, *plain[:2])
    if is_aten(node, aten.baddbmm.default):
        return _added(graph, node)
    if is_onnx(node, "FusedMatMul", domain="com.microsoft"):
        return _fused(node)
    if is_onnx(node, "Einsum"):
        return _einsum(node, node.kwargs.get("equation"), node.args)
    if is_aten(node, aten.einsum.default):
        return _einsum(node, node.args[0], node.args[1])
    return None


def _product(node: fx.Node, left: Any, right: Any, scale: float = 1.0, added: Any = None) -> Product | None:
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    return Product(node, Operand(left), Operand(right), scale, added)


def _added(graph: Graph, node: fx.Node) -> Product | None:
    """beta * added + alpha * left @ right."""
    beta, alpha = (scalar_constant(graph, node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    added, left, right = node.args[:3]
    if alpha is None or beta not in (0.0, 1.0):
        return None
    return _product(node, left, right, alpha, added if beta else None)


def _fused(node: fx.Node) -> Product | None:
    options: Any = node.kwargs
    if options.get("transBatchA") or options.get("transBatchB"):
        return None
    operands: list[Operand] = []
    for value, flag in zip(node.args[:2], ("transA", "transB"), strict=True):
        if not isinstance(value, fx.Node):
            return None
        operand: Operand | None = Operand(value)
        if options.get(flag):
            operand = turned(Operand(value))
        if operand is None:
            return None
        operands.append(operand)
    return Product(node, operands[0], operands[1], float(options.get("alpha", 1.0)))


def _einsum(node: fx.Node, equation: Any, operands: Any) -> Product | None:
    """Two operands whose letters are those of a batched product: shared ones, one of each, and one that is summed."""
    text = "" if equation is None else str(equation).replace(" ", "")
    given, arrow, result = text.partition("->")
    names = given.split(",")
    if not arrow or len(names) != 2 or "." in text or any(len(set(part)) != len(part) for part in (*names, result)):
        return None
    first, second = names
    batch = [letter for letter in result if letter in first and letter in second]
    summed = [letter for letter in first if letter in second and letter not in result]
    rows = [letter for letter in first if letter not in second]
    columns = [letter for letter in second if letter not in first]
    if len(summed) != 1 or len(rows) != 1 or len(columns) != 1 or set(result) != {*batch, *rows, *columns}:
        return None
    lead = "".join(batch)
    left = _ordered(operands[0], first, lead + rows[0] + summed[0])
    right = _ordered(operands[1], second, lead + summed[0] + columns[0])
    made = Product(node, left, right, perm=_perm(lead + rows[0] + columns[0], result))
    other = flipped(made)
    return other if other is not None and other.perm is None else made


def _ordered(node: fx.Node, letters: str, wanted: str) -> Operand:
    return Operand(node, _perm(letters, wanted))


def _perm(letters: str, wanted: str) -> tuple[int, ...] | None:
    perm = tuple(letters.index(letter) for letter in wanted)
    return None if perm == tuple(range(len(perm))) else perm


def flipped(found: Product) -> Product | None:
    """The same product with the transposed operands in the other order: a @ b = (b.T @ a.T).T."""
    left, right = turned(found.right), turned(found.left)
    if left is None or right is None or left.shape is None:
        return None
    swap = swapped(len(left.shape))
    perm = swap if found.perm is None else tuple(swap[axis] for axis in found.perm)
    plain = perm == tuple(range(len(perm)))
    return Product(found.node, left, right, found.scale, found.added, None if plain else perm)
