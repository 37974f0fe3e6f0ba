"""Small graphs whose shapes are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fxopt.cost_model.work import node_cost
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.shapes import infer
from fxopt.ir.target import Cost

FLOAT = TensorProto.FLOAT


def onnx_graph(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Sequence[int | str]],
    constants: Mapping[str, Any],
    outputs: Sequence[str] = ("y",),
    types: Mapping[str, int] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Graph:
    """An imported model; floats unless `types` says otherwise."""
    kinds = types or {}
    body = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info(name, kinds.get(name, FLOAT), shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kinds.get(name, FLOAT), None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    graph = load(helper.make_model(body, opset_imports=opsets, ir_version=10), check=False)
    infer(graph, sizes)
    return graph


def one(op: str, inputs: Mapping[str, Sequence[int | str]], constants: Mapping[str, Any], **attributes: Any) -> Cost:
    """The cost of a model of one node, whose inputs are the model's inputs, then the constants."""
    node = helper.make_node(op, [*inputs, *constants], ["y"], **attributes)
    graph = onnx_graph([node], inputs, constants)
    return node_cost(graph, next(graph.calls()))


def costs(graph: Graph) -> dict[str, Cost]:
    """The cost of every node by its operator (the last of each)."""
    from fxopt.cost_model.roofline import op_text

    return {op_text(node): node_cost(graph, node) for node in graph.calls()}


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


def linears(rows: int, widths: Sequence[int], int8: bool = False) -> Graph:
    """Linears in a row, in float or in the dynamically quantised form that ONNX Runtime fuses."""
    nodes, constants, x = [], {}, "x"
    for index, (inner, out) in enumerate(pairwise(widths)):
        last = index == len(widths) - 2
        y = "y" if last else f"y{index}"
        constants[f"b{index}"] = zeros(out)
        if int8:
            q, s, z, i, f, u, p = (f"{name}{index}" for name in "qszifup")
            constants[f"w{index}"] = zeros(inner, out, dtype=np.int8)
            constants[f"k{index}"] = zeros(out)
            nodes += [
                helper.make_node("DynamicQuantizeLinear", [x], [q, s, z]),
                helper.make_node("MatMulInteger", [q, f"w{index}", z], [i]),
                helper.make_node("Cast", [i], [f], to=FLOAT),
                helper.make_node("Mul", [s, f"k{index}"], [u]),
                helper.make_node("Mul", [f, u], [p]),
                helper.make_node("Add", [p, f"b{index}"], [y]),
            ]
        else:
            constants[f"w{index}"] = zeros(inner, out)
            nodes += [
                helper.make_node("MatMul", [x, f"w{index}"], [f"m{index}"]),
                helper.make_node("Add", [f"m{index}", f"b{index}"], [y]),
            ]
        x = y
    return onnx_graph(nodes, {"x": [rows, widths[0]]}, constants)


def torch_graph(module: torch.nn.Module, *inputs: torch.Tensor) -> Graph:
    """An exported module."""
    from fxopt.frontends.torch_export import load as capture

    return capture(module.eval(), inputs)
