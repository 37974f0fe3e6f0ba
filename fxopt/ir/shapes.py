"""Shapes and element types of every value, by running the graph on fake tensors; dynamic dimensions stay symbolic.

`infer` fills `node.meta["val"]`. A value that depends on data, or whose operator has no torch reference, takes its
declared type from the ONNX file where there is one, and stays unknown otherwise.
"""

from __future__ import annotations

import contextlib
import heapq
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from fxopt.ir.graph import Dim, Graph, ValueSpec
from fxopt.ir.interpreter import constant_value, evaluate

UNKNOWN = object()
_SIZES = "fxopt_sizes"  # attribute of a ShapeEnv: the size of each symbol for which costs are computed


def infer(graph: Graph, sizes: Mapping[str, int] | None = None) -> None:
    """Derive `meta["val"]` of all nodes anew.

    Args:
        sizes: the size of each named dimension for which costs are computed (`fxopt.ir.graph.hint`); 1 if not given.
    """
    if graph.origin == "onnx":
        _fake_inputs(graph, dict(sizes or {}))
    mode = fake_mode(graph)
    for node in graph.fx.nodes:
        if node.op in ("get_attr", "call_function"):
            _set(node, value_of(graph, node, mode))


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake mode that the graph's values belong to."""
    for node in graph.placeholders:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    for node in graph.fx.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def update(graph: Graph, changed: Iterable[fx.Node]) -> list[tuple[fx.Node, Any, Any]]:
    """Derive the values of `changed` nodes and, while they differ from before, of their users.

    Returns:
        (node, value before, value now) of every node whose known type changed.
    """
    mode = fake_mode(graph)
    queue = list(dict.fromkeys(changed))
    pending = set(queue)
    heapq.heapify(queue)
    differences = []
    while queue:
        node = heapq.heappop(queue)
        pending.discard(node)
        if node.op not in ("get_attr", "call_function"):
            continue
        before = node.meta.get("val", UNKNOWN)
        now = value_of(graph, node, mode)
        if same_type(before, now):
            continue
        _set(node, now)
        if before is not UNKNOWN:
            differences.append((node, before, now))
        for user in node.users:
            if user not in pending:
                pending.add(user)
                heapq.heappush(queue, user)
    return differences


def value_of(graph: Graph, node: fx.Node, mode: FakeTensorMode) -> Any:
    """The fake value of one node from those of its arguments, or UNKNOWN."""
    if node.op == "get_attr":
        value = constant_value(graph, node)
        if not isinstance(value, torch.Tensor):
            return value
        return value if isinstance(value, FakeTensor) else mode.from_tensor(value, static_shapes=True)
    known: dict[fx.Node, Any] = {}
    for used in node.all_input_nodes:
        value = used.meta.get("val", UNKNOWN)
        if value is UNKNOWN:
            return _declared(graph, node, mode)
        known[used] = value
    args = fx.map_arg(node.args, known.__getitem__)
    kwargs = fx.map_arg(node.kwargs, known.__getitem__)
    if node.target is operator.getitem:
        source: Any = args[0]
        return source[args[1]]
    try:
        with mode, torch.no_grad(), _quiet():
            return evaluate(graph, node, args, kwargs)
    except Exception as error:  # data-dependent, no reference, or a shape the operator does not take under fake tensors
        node.meta["unknown"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return _declared(graph, node, mode)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log of torch's symbolic shapes: a data-dependent value is an answer here, not an error."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch._subclasses")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _set(node: fx.Node, value: Any) -> None:
    if value is UNKNOWN:
        node.meta.pop("val", None)
    else:
        node.meta["val"] = value


def same_type(a: Any, b: Any) -> bool:
    """True when two fake values have the same shape and element type (or are equal host values)."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and len(a.shape) == len(b.shape) and all(map(_same_dim, a.shape, b.shape))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same_type, a, b))
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return False
    if a is UNKNOWN or b is UNKNOWN:
        return a is b
    return str(a) == str(b)


def _same_dim(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


# ---- inputs of ONNX graphs


def _fake_inputs(graph: Graph, sizes: dict[str, int]) -> None:
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    symbols = _symbols(mode, graph.inputs, sizes)
    with mode:
        for node, spec in zip(graph.placeholders, graph.inputs, strict=True):
            _set(node, _fake_value(spec, symbols))
    graph_symbols = {name: symbol for name, symbol in symbols.items() if isinstance(symbol, torch.SymInt)}
    bound = {symbol.node.expr: sizes.get(name, 1) for name, symbol in graph_symbols.items()}
    setattr(environment, _SIZES, bound)
    for node in graph.placeholders:
        node.meta["symbols"] = graph_symbols


def _fake_value(spec: ValueSpec, symbols: Mapping[str, Any]) -> Any:
    if spec.dtype is None or spec.shape is None or any(dim is None for dim in spec.shape):
        return UNKNOWN
    return torch.empty([_dim(dim, symbols) for dim in spec.shape], dtype=spec.dtype)


def _dim(dim: Dim, symbols: Mapping[str, Any]) -> Any:
    return symbols[dim] if isinstance(dim, str) else dim


def _symbols(mode: FakeTensorMode, specs: Iterable[ValueSpec], sizes: Mapping[str, int]) -> dict[str, Any]:
    """One symbolic integer per dimension name; traced with distinct sizes of at least 2, so that none is specialised."""
    names = dict.fromkeys(dim for spec in specs for dim in spec.shape or () if isinstance(dim, str))
    taken = {dim for spec in specs for dim in spec.shape or () if isinstance(dim, int)} | {1}
    symbols: dict[str, Any] = {}
    for name in names:
        size = sizes.get(name, 2)
        while size in taken:
            size += 1
        taken.add(size)
        dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        symbols[name] = mode.from_tensor(torch.empty(size), symbolic_context=dynamic).shape[0]
    return symbols


def _declared(graph: Graph, node: fx.Node, mode: FakeTensorMode) -> Any:
    """The value that the ONNX file declares for the node (`value_info` or output), or UNKNOWN."""
    record = node.meta.get("onnx")
    if graph.model is None or record is None:
        return UNKNOWN
    outputs: tuple[str, ...] = getattr(record, "outputs", ())
    if len(outputs) != 1:
        return UNKNOWN
    spec = _declarations(graph).get(outputs[0])
    if spec is None:
        return UNKNOWN
    symbols: dict[str, Any] = next((found.meta["symbols"] for found in graph.placeholders if "symbols" in found.meta), {})
    if any(isinstance(dim, str) and dim not in symbols for dim in spec.shape or ()):
        return UNKNOWN
    with mode:
        return _fake_value(spec, symbols)


def _declarations(graph: Graph) -> dict[str, ValueSpec]:
    assert graph.model is not None
    if "declared" not in graph.model.extra:
        from fxopt.ir.onnx.signature import value_spec

        body = graph.model.proto.graph
        graph.model.extra["declared"] = {value.name: value_spec(value) for value in (*body.value_info, *body.output)}
    found: dict[str, ValueSpec] = graph.model.extra["declared"]
    return found


def size_of(dim: Any) -> int | None:
    """A dimension as the number for which costs are computed; None for one that depends on data."""
    if isinstance(dim, int):
        return dim
    if not isinstance(dim, torch.SymInt):
        return None
    expression = sympy.sympify(dim.node.expr)
    bound = getattr(dim.node.shape_env, _SIZES, {})
    value = expression.xreplace({symbol: sympy.Integer(size) for symbol, size in bound.items()})
    if value.is_number:
        return int(value)
    return int(dim.node.hint) if dim.node.has_hint() else None
