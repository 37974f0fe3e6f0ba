"""Run a graph in torch, node by node: the reference that every backend is compared with.

Source of `widen`: the oracle of the verifier; float casts and constants become float64, integer operators stay exact.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_aggregate

from fxopt.errors import InvalidInput, MissingReference
from fxopt.ir.graph import Graph, Opaque, ValueSpec, label
from fxopt.ir.onnx.bodies import AttributeReference, bound

Evaluator = Callable[[Graph, fx.Node, tuple[Any, ...], dict[str, Any]], Any]
Observer = Callable[[fx.Node, Any], None]
_LOW_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_ONNX_LOW_FLOATS = (1, 10, 16)  # TensorProto FLOAT, FLOAT16, BFLOAT16
_ONNX_DOUBLE = 11
_FILLING = {torch.ops.aten.zeros.default, torch.ops.aten.ones.default, torch.ops.aten.empty.memory_format}


def run(
    graph: Graph,
    inputs: Sequence[Any],
    *,
    evaluator: Evaluator | None = None,
    observer: Observer | None = None,
    widen: bool = False,
) -> list[Any]:
    """The graph's outputs on flat `inputs` (tensors; `None` and lists for sequence or optional inputs).

    Args:
        evaluator: runs the operators that have no torch reference (`fxopt.backends.onnxruntime.evaluator`).
        observer: called with every node and its value; values are freed after their last use.
        widen: compute in float64: floating inputs, constants and casts are widened.

    Raises:
        InvalidInput: the number of inputs is wrong.
        MissingReference: an operator has no torch reference and there is no evaluator.
    """
    placeholders = graph.placeholders
    if len(inputs) != len(placeholders):
        expected = ", ".join(map(str, graph.inputs))
        raise InvalidInput(f"{len(inputs)} inputs given, the model takes {len(placeholders)}: {expected}")
    given = list(map(_widened, inputs)) if widen else list(inputs)
    with torch.no_grad():
        results = GraphRun(graph, evaluator, widen, observer).run(given)
    return [plain_tensor(value) for value in results]


class GraphRun:
    """A graph that is ready to run, once or many times; the `Runnable` of bodies and functions."""

    def __init__(
        self, graph: Graph, evaluator: Evaluator | None = None, widen: bool = False, observer: Observer | None = None
    ) -> None:
        self.graph = graph
        self.evaluator = evaluator
        self.widen = widen
        self.observer = observer
        self.placeholders = graph.placeholders
        self.last_use = _last_uses(graph)

    @property
    def captures(self) -> tuple[str, ...]:
        """The names of the last inputs, which come from the graphs around a body."""
        return self.graph.captures

    @property
    def formals(self) -> int:
        """The number of inputs that a caller gives."""
        return len(self.placeholders) - len(self.graph.captures)

    @property
    def outputs(self) -> Sequence[ValueSpec]:
        """The outputs as declared."""
        return self.graph.outputs

    def run(self, inputs: list[Any], attributes: Mapping[str, Any] | None = None) -> list[Any]:
        """The results as they are: tensors, host arrays, lists, None.

        Args:
            attributes: of the call, when the graph is (in) a function.
        """
        values: dict[fx.Node, Any] = dict(zip(self.placeholders, inputs, strict=True))
        for node in self.graph.fx.nodes:
            for used in node.all_input_nodes:
                if used not in values:
                    values[used] = self._value(used, values, attributes)
            if node.op == "output" or (node.op == "get_attr" and self.widen and self.observer is None):
                continue  # wide constants are made where they are used first: all at once would be twice the model
            if node.op != "placeholder":
                values[node] = self._value(node, values, attributes)
            if self.observer is not None:
                self.observer(node, values[node])
            for done in self.last_use.get(node, ()):
                del values[done]
        return [values[node] if isinstance(node, fx.Node) else node for node in self.graph.result_nodes]

    def _value(self, node: fx.Node, values: dict[fx.Node, Any], attributes: Mapping[str, Any] | None) -> Any:
        if node.op == "get_attr":
            value = self.constant_of(node)
            return _widened(value) if self.widen else value
        args = fx.map_arg(node.args, values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, values.__getitem__)
        return evaluate(self.graph, node, args, kwargs, self.evaluator, self.widen, attributes, self.inside)

    def constant_of(self, node: fx.Node) -> Any:
        """The value of a `get_attr` node."""
        return constant_value(self.graph, node)

    def inside(self, graph: Graph) -> GraphRun:
        """The run of a body or function of this graph."""
        return GraphRun(graph, self.evaluator, self.widen)


def _last_uses(graph: Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that are not needed after it."""
    seen: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.fx.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
    last.pop(graph.output, None)
    return last


def evaluate(
    graph: Graph,
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    evaluator: Evaluator | None = None,
    widen: bool = False,
    attributes: Mapping[str, Any] | None = None,
    inside: Callable[[Graph], GraphRun] | None = None,
) -> Any:
    """The value of one operator node on concrete (or fake) arguments.

    Args:
        attributes: those of the function around the node.
        inside: how the node's bodies run; like the graph itself by default.
    """
    target: Any = node.target
    if target is operator.getitem:
        return args[0][args[1]]
    if graph.origin == "onnx" and not hasattr(target, "op_type"):
        args, kwargs = map_aggregate(args, plain_tensor), map_aggregate(kwargs, plain_tensor)
    if widen:
        args, kwargs = _widened_casts(target, args, kwargs)
    try:
        if not any(map(_needs_binding, kwargs.values())):
            return target(*args, **kwargs)

        def body(value: Any) -> GraphRun | None:
            if not isinstance(value, Graph):
                return None
            return GraphRun(value, evaluator, widen) if inside is None else inside(value)

        return target(*args, **bound(kwargs, body, attributes or {}))
    except MissingReference as missing:
        if evaluator is None:
            raise MissingReference(f"node {label(node)!r}: {missing}") from missing
    return evaluator(graph, node, args, kwargs)


def _needs_binding(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(item, Graph) for item in value)
    return isinstance(value, (Graph, AttributeReference))


def constant_value(graph: Graph, node: fx.Node) -> Any:
    """The value of a `get_attr` node; in ONNX graphs small int64 constants travel in the host lane.

    Tensors of element types that torch lacks are numpy arrays; other opaque constants (sub-graphs) come as they are.
    """
    value = graph.attribute(str(node.target))
    if isinstance(value, Opaque):
        from fxopt.ir.onnx.values import opaque_value

        return opaque_value(value, graph.model.folder if graph.model is not None else None)
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if graph.origin != "onnx" or value.dtype != torch.int64:
        return value
    from fxopt.ir.onnx.lane import HOST_LIMIT

    return value.numpy() if value.numel() <= HOST_LIMIT else value


def plain_tensor(value: Any) -> Any:
    """The tensor of a host array; other values as they are."""
    if not isinstance(value, np.ndarray):
        return value
    from fxopt.ir.onnx.lane import to_tensor

    return to_tensor(value)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in _LOW_FLOATS:
        return value.double()
    return value


def _widened_casts(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Casts to a float type become casts to float64, and so do new tensors of the default type."""
    if getattr(target, "op_type", "") == "Cast" and kwargs.get("to") in _ONNX_LOW_FLOATS:
        return args, {**kwargs, "to": _ONNX_DOUBLE}
    if getattr(target, "op_type", "") == "ConstantOfShape" and kwargs.get("value") is None:
        return args, {**kwargs, "value": torch.zeros(1, dtype=torch.float64)}
    if target in _FILLING and kwargs.get("dtype") is None:
        kwargs = {**kwargs, "dtype": torch.float64}

    def wide(value: Any) -> Any:
        return torch.float64 if value in _LOW_FLOATS else value

    if hasattr(target, "op_type"):
        return args, kwargs
    wide_args = tuple(wide(value) if isinstance(value, torch.dtype) else value for value in args)
    return wide_args, {key: wide(value) if isinstance(value, torch.dtype) else value for key, value in kwargs.items()}


__all__ = ["Evaluator", "Observer", "Opaque", "constant_value", "evaluate", "run"]
