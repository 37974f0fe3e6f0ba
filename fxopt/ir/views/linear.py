"""`Linear`: y = x @ weight.T + bias with constant weight, in all the spellings of both dialects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Refusal
from fxopt.ir.views.common import argument, aten, is_aten, is_onnx, only_user

_TRANSPOSES = (aten.t.default, aten.permute.default, aten.transpose.int)


@dataclass(frozen=True)
class Linear:
    """x [..., in] -> [..., out]. `weight_node` is the constant; `transposed` says that it is stored as [in, out]."""

    node: fx.Node  # its value is the result
    x: fx.Node
    weight_node: fx.Node
    transposed: bool
    bias_node: fx.Node | None
    inner: tuple[fx.Node, ...] = ()

    def weight(self, graph: Graph) -> torch.Tensor:
        """The weight as [out, in] (a view of the constant)."""
        stored = graph.constant(self.weight_node)
        assert stored is not None
        return stored.t() if self.transposed else stored

    def bias(self, graph: Graph) -> torch.Tensor | None:
        """The bias [out], or None."""
        return graph.constant(self.bias_node)

    def features(self, graph: Graph) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.weight(graph).shape
        return rows, columns


def linear(graph: Graph, node: fx.Node) -> Linear | Refusal | None:
    """The linear whose value `node` is; None when it is something else, a refusal when it is almost one."""
    if node.op != "call_function":
        return None
    if graph.origin == "onnx":
        return _onnx(graph, node)
    return _aten(graph, node)


def linears(graph: Graph) -> Iterator[Linear | tuple[fx.Node, Refusal]]:
    """Every linear of the graph in execution order, and what is almost one with the reason."""
    swallowed: set[fx.Node] = set()
    found: list[Linear | tuple[fx.Node, Refusal]] = []
    for node in reversed(graph.fx.nodes):
        if node in swallowed:
            continue
        view = linear(graph, node)
        if isinstance(view, Linear):
            swallowed.update(view.inner)
            found.append(view)
        elif view is not None:
            found.append((node, view))
    yield from reversed(found)


def _matrix(graph: Graph, node: object) -> tuple[fx.Node, bool] | None:
    """A constant matrix, also behind a transpose: (constant node, whether it is transposed)."""
    if not isinstance(node, fx.Node):
        return None
    constant = graph.constant(node)
    if constant is not None:
        return (node, False) if constant.dim() == 2 else None
    perm: Any = node.kwargs.get("perm") or [1, 0]
    swapped = is_onnx(node, "Transpose") and list(perm) == [1, 0]
    if is_aten(node, aten.t.default):
        swapped = True
    if is_aten(node, aten.permute.default):
        swapped = list(node.args[1]) in ([1, 0], [-1, 0], [1, -2], [-1, -2])  # type: ignore[arg-type]
    if is_aten(node, aten.transpose.int):
        swapped = sorted(axis % 2 for axis in node.args[1:3]) == [0, 1]  # type: ignore[operator]
    if not swapped:
        return None
    inner = node.args[0]
    stored = graph.constant(inner)
    return (inner, True) if isinstance(inner, fx.Node) and stored is not None and stored.dim() == 2 else None


def _not_constant(node: fx.Node) -> Refusal:
    return Refusal("the weight is computed at run time (by {}), not a constant", node.name)


def _aten(graph: Graph, node: fx.Node) -> Linear | Refusal | None:
    if is_aten(node, aten.linear.default):
        x, weight = node.args[0], node.args[1]
        found = _matrix(graph, weight)
        if found is None:
            return _not_constant(weight) if isinstance(weight, fx.Node) else None
        bias = argument(node, 2, "bias")
        return _linear(node, x, found[0], found[1], bias, ())
    if is_aten(node, aten.matmul.default, aten.mm.default):
        found = _matrix(graph, node.args[1])
        return None if found is None else _linear(node, node.args[0], found[0], not found[1], None, ())
    if is_aten(node, aten.addmm.default) and not ({"alpha", "beta"} & set(node.kwargs)):
        found = _matrix(graph, node.args[2])
        if found is None or graph.constant(node.args[0]) is None:
            return None
        return _linear(node, node.args[1], found[0], not found[1], node.args[0], ())
    if is_aten(node, aten.add.Tensor) and not node.kwargs:
        return _with_bias(graph, node, aten.matmul.default, aten.mm.default)
    return None


def _onnx(graph: Graph, node: fx.Node) -> Linear | Refusal | None:
    if is_onnx(node, "MatMul"):
        found = _matrix(graph, node.args[1])
        return None if found is None else _linear(node, node.args[0], found[0], not found[1], None, ())
    if is_onnx(node, "Gemm"):
        return _gemm(graph, node)
    if is_onnx(node, "Add") and not node.kwargs:
        return _with_bias(graph, node)
    return None


def _gemm(graph: Graph, node: fx.Node) -> Linear | Refusal | None:
    found = _matrix(graph, node.args[1])
    if found is None:
        weight = node.args[1]
        return _not_constant(weight) if isinstance(weight, fx.Node) else None
    for name, neutral in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
        if node.kwargs.get(name, neutral) != neutral:
            return Refusal("Gemm with {}={}; only {}={} is a linear", name, node.kwargs[name], name, neutral)
    stored_transposed = found[1] != (not node.kwargs.get("transB", 0))
    return _linear(node, node.args[0], found[0], stored_transposed, argument(node, 2), ())


def _with_bias(graph: Graph, node: fx.Node, *matmuls: object) -> Linear | None:
    """matmul followed by the addition of a constant row."""
    for product, bias in (node.args[:2], node.args[1::-1]):
        if not isinstance(product, fx.Node) or only_user(product) is None:
            continue
        if not (is_aten(product, *matmuls) if matmuls else is_onnx(product, "MatMul")):
            continue
        row = graph.constant(bias)
        found = _matrix(graph, product.args[1])
        if row is None or found is None or row.dim() != 1:
            continue
        stored = graph.constant(found[0])
        assert stored is not None
        if row.shape[0] == stored.shape[0 if found[1] else 1]:
            return _linear(node, product.args[0], found[0], not found[1], bias, (product,))
    return None


def _linear(
    node: fx.Node, x: object, weight: fx.Node, transposed: bool, bias: object, inner: tuple[fx.Node, ...]
) -> Linear | None:
    if not isinstance(x, fx.Node) or (bias is not None and not isinstance(bias, fx.Node)):
        return None
    return Linear(node, x, weight, transposed, bias, inner)
