"""`node_cost`: the work of one node, dispatched by dialect."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.cost_model.work.aten import aten_cost
from fxopt.cost_model.work.call import Call
from fxopt.cost_model.work.onnx import onnx_cost
from fxopt.ir.graph import Graph, hint, shape_of, tensor_value
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.op import declaration
from fxopt.ir.sparsity import block_shares
from fxopt.ir.target import Cost, Zeros
from fxopt.ir.views.conv import Conv, conv
from fxopt.ir.views.linear import Linear, linear

NOTHING = Cost(0.0, 0.0, "float32", "shape", 0)


def node_cost(graph: Graph, node: fx.Node) -> Cost:
    """Operations and bytes of one call, as the default backend of the graph's origin executes it.

    A multiply-add is two operations. Bytes are those of all operands (constants too) and results; what the backend
    fuses into a neighbour moves and launches nothing. Where shapes are unknown only the launch is counted.
    Sizes of symbolic dimensions are those for which `fxopt.ir.shapes.infer` was asked.
    """
    if node.op != "call_function" or node.target is operator.getitem:
        return NOTHING
    declared = declaration(node.target)
    if declared is not None:
        return _with_zeros(graph, node, _declared_cost(graph, node, declared))
    call = Call(graph, node)
    cost = onnx_cost(call) if isinstance(node.target, OnnxOp) else aten_cost(call)
    return _with_zeros(graph, node, cost)


def _with_zeros(graph: Graph, node: fx.Node, cost: Cost) -> Cost:
    """The work of a linear or convolution, with the zeros of its weight that a compiler may skip."""
    shape, is_conv = shape_of(node), cost.kind.startswith("conv")
    if shape is None or cost.zeros is not None or not (is_conv or cost.kind == "linear"):
        return cost
    mark, weight = node.meta.get("sparsity"), _weight(graph, node)
    shares = () if weight is None else block_shares(weight)
    shares = shares if mark is None else ((str(mark.pattern), mark.zeros), *shares)
    rows = (*shape[:1], *shape[2:]) if is_conv else shape[:-1]
    return replace(cost, zeros=Zeros(shares, math.prod(hint(dim) for dim in rows))) if shares else cost


def _weight(graph: Graph, node: fx.Node) -> Tensor | None:
    """The weight [out, in] of a linear or of a convolution of one group, or its codes, if they are known."""
    if declaration(node.target) is not None:
        x, weight = (*node.args, None, None)[:2]
        found = graph.constant(weight) if isinstance(weight, fx.Node) else None
        given = shape_of(x) if isinstance(x, fx.Node) else None
        if found is None or not given or found.dtype != torch.int8 or found.dim() < 2:
            return None
        inner = given[1 if found.dim() > 2 and len(given) > 1 else len(given) - 1]
        return found.flatten(1) if hint(inner) == found.shape[1] else None
    view = linear(graph, node) or conv(graph, node)
    if not isinstance(view, (Linear, Conv)) or (isinstance(view, Conv) and view.groups > 1):
        return None
    return view.weight(graph).flatten(1)


def _declared_cost(graph: Graph, node: fx.Node, declared: Any) -> Cost:
    """What the fxopt operator declares; only the launch when an operand is unknown.

    Of constants it is given the types, of those that say what is left out (booleans) the values.
    """
    if any("val" not in used.meta for used in node.all_input_nodes) or tensor_value(node) is None:
        return Cost(0.0, 0.0, "float32", "other", 1)

    def given(used: fx.Node) -> Any:
        constant = graph.constant(used)
        return constant if constant is not None and constant.dtype == torch.bool else used.meta["val"]

    args, kwargs = fx.map_arg(node.args, given), fx.map_arg(node.kwargs, given)
    cost: Cost = declared.cost_of(*args, **kwargs)
    return cost
