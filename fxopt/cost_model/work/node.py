"""`node_cost`: the work of one node, dispatched by dialect."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxopt.cost_model.work.aten import aten_cost
from fxopt.cost_model.work.call import Call
from fxopt.cost_model.work.onnx import onnx_cost
from fxopt.ir.graph import Graph, hint, shape_of, tensor_value
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.op import declaration
from fxopt.ir.target import Cost, Zeros

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
        return _declared_cost(graph, node, declared)
    call = Call(graph, node)
    return onnx_cost(call) if isinstance(node.target, OnnxOp) else _with_zeros(node, aten_cost(call))


def _with_zeros(node: fx.Node, cost: Cost) -> Cost:
    """The work of a linear of aten, with the zeros that a compiler of these operators may skip."""
    mark, shape = node.meta.get("sparsity"), shape_of(node)
    if mark is None or shape is None or cost.kind != "linear":
        return cost
    rows = math.prod(hint(dim) for dim in shape[:-1])
    return replace(cost, zeros=Zeros(str(mark.pattern), mark.zeros, rows))


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
