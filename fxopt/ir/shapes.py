"""Shapes and element types of every value, by running the graph on fake tensors.

`infer` fills `node.meta["val"]`. In graphs of ONNX origin named dimensions take the sizes for which costs are computed;
a second run with other sizes, `node.meta["probe"]`, tells fixed dimensions from dynamic ones, so that a rewrite that
fixes a dynamic dimension is found. (Symbolic sizes would say the same a hundred times more slowly.) Graphs of torch
origin keep the symbolic sizes of `torch.export`. A value that depends on data, or whose operator has no torch
reference, takes its declared type from the ONNX file where there is one, and stays unknown otherwise.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from fxopt.errors import MissingReference
from fxopt.ir.body_types import OwnerRun, owner_types
from fxopt.ir.fake_values import UNKNOWN, same_type
from fxopt.ir.graph import Dim, Graph, ValueSpec
from fxopt.ir.interpreter import constant_value, evaluate
from fxopt.ir.onnx.foreign import is_foreign
from fxopt.ir.onnx.lane import HOST_LIMIT
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.subgraphs import has_bodies

_DEPENDS_ON_DATA = (  # or fake tensors cannot run it
    MissingReference,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
)
Run = tuple[str, FakeTensorMode, dict[str, int]]  # meta key, mode, sizes of named dimensions
Runs = list[Run]
_BODY_RUNS: WeakKeyDictionary[fx.Graph, dict[str, Run]] = WeakKeyDictionary()  # of bodies: those of what holds them


def infer(graph: Graph, sizes: Mapping[str, int] | None = None) -> None:
    """Derive the types of all nodes (of torch origin: of those that have none yet).

    Args:
        sizes: the size of each named dimension for which costs are computed; 1 if not given.
    """
    captured = graph.origin == "torch" and any("val" in node.meta for node in graph.placeholders)
    if not captured:
        graph.sizes = dict(sizes or {})
        _fake_inputs(graph)
    for found in graph.subgraphs():
        _BODY_RUNS.pop(found.graph.fx, None)
    runs = _runs(graph)
    with _quiet():
        for node in graph.fx.nodes:
            if node.op in ("get_attr", "call_function"):
                if captured and "val" in node.meta:
                    continue  # torch.export knows
                for run in runs:
                    _set(node, run[0], _value_of(graph, node, run))


def update(graph: Graph, changed: Iterable[fx.Node]) -> list[tuple[fx.Node, Any, Any]]:
    """Derive the values of `changed` nodes and, while they differ from before, of their users.

    Returns:
        (node, value before, value now) of every node whose known type changed.
    """
    runs = _runs(graph)
    queue = list(dict.fromkeys(changed))
    pending = set(queue)
    heapq.heapify(queue)
    differences = []
    with _quiet():
        while queue:
            node = heapq.heappop(queue)
            pending.discard(node)
            if node.op not in ("get_attr", "call_function"):
                continue
            differs = False
            for run in runs:
                key = run[0]
                before, now = node.meta.get(key, UNKNOWN), _value_of(graph, node, run)
                if same_type(before, now):
                    continue
                _set(node, key, now)
                differs = True
                if before is not UNKNOWN:
                    differences.append((node, before, now))
            if not differs:
                continue
            for user in node.users:
                if user not in pending:
                    pending.add(user)
                    heapq.heappush(queue, user)
    return differences


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The fake mode that the values in `meta["val"]` belong to."""
    return _runs(graph)[0][1]


def dims_of(graph: Graph, node: fx.Node) -> tuple[Dim, ...] | None:
    """The node's shape as in a signature: fixed sizes as numbers, dynamic ones by name where it is clear, else None."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    probe = node.meta.get("probe", value)
    named = _pairs(graph)
    found: list[Dim] = []
    for size, other in zip(value.shape, probe.shape, strict=True):
        if isinstance(size, int) and isinstance(other, int):
            found.append(size if size == other else named.get((size, other)))
        else:
            found.append(str(size))
    return tuple(found)


def _runs(graph: Graph) -> Runs:
    if graph.fx in _BODY_RUNS:
        return list(_BODY_RUNS[graph.fx].values())
    found: Runs = []
    for key in ("val", "probe"):
        mode = _mode_of(graph, key)
        if mode is not None:
            found.append((key, mode, graph.sizes if key == "val" else _probe_sizes(graph)))
    if found:
        return found
    return [("val", FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), graph.sizes)]


def _mode_of(graph: Graph, key: str) -> FakeTensorMode | None:
    for nodes in (graph.placeholders, graph.fx.nodes):
        for node in nodes:
            value = node.meta.get(key)
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return None


def _value_of(graph: Graph, node: fx.Node, run: Run) -> Any:
    """The fake value of a node from those of its arguments, or UNKNOWN; `meta["failure"]` says what went wrong."""
    key, mode, _ = run
    if key == "val":
        node.meta.pop("failure", None)
    cache: dict[Any, Any] = mode.__dict__.setdefault("_fxopt_results", {})
    if node.op == "get_attr":
        value = constant_value(graph, node)
        if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
            return value
        signature = _signature(value)
        if signature not in cache:
            cache[signature] = mode.from_tensor(value, static_shapes=True)
        return cache[signature]
    if isinstance(node.target, OnnxOp) and has_bodies(node, graph):
        return _owner_value(graph, node, run)
    known: dict[fx.Node, Any] = {}
    for used in node.all_input_nodes:
        value = used.meta.get(key, UNKNOWN)
        if value is UNKNOWN:
            return _declared(graph, node, run)
        known[used] = value
    args = fx.map_arg(node.args, known.__getitem__)
    kwargs = fx.map_arg(node.kwargs, known.__getitem__)
    if node.target is operator.getitem:
        source: Any = args[0]
        part = source[args[1]]
        return _declared(graph, node, run) if part is UNKNOWN else part
    signature = _signature((node.target, args, kwargs))
    if signature is not None and signature in cache:
        return cache[signature]
    try:
        with mode, torch.no_grad():
            value = evaluate(graph, node, args, kwargs)
            if signature is not None:
                cache[signature] = value
            return value
    except _DEPENDS_ON_DATA:
        value = _with_constants(graph, node, args, kwargs, mode)
        return _declared(graph, node, run) if value is UNKNOWN else value
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        sizes = ", ".join(f"{name}={size}" for name, size in run[2].items())
        node.meta.setdefault("failure", f"does not take its inputs{f' at {sizes}' if sizes else ''}: {reason}")
        return _declared(graph, node, run)


def _with_constants(graph: Graph, node: fx.Node, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """The fake value where an operator reads a small int32 constant (the axis of a sum): fake tensors hold no data."""
    given = list(args)
    for index, argument in enumerate(node.args):
        constant = graph.constant(argument)
        if constant is not None and constant.dtype == torch.int32 and constant.numel() <= HOST_LIMIT:
            given[index] = constant.numpy()
    if graph.origin != "onnx" or all(new is old for new, old in zip(given, args, strict=True)):
        return UNKNOWN
    try:
        with mode, torch.no_grad():
            return evaluate(graph, node, tuple(given), kwargs)
    except _DEPENDS_ON_DATA:
        return UNKNOWN


def _owner_value(graph: Graph, node: fx.Node, run: Run) -> Any:
    """The fake value of a node with bodies; the types of what is in the bodies are derived with it."""
    key = run[0]
    values = {used: used.meta.get(key, UNKNOWN) for used in node.all_input_nodes}
    args, kwargs = fx.map_arg(node.args, values.__getitem__), fx.map_arg(node.kwargs, values.__getitem__)
    found, reason = owner_types(
        graph, node, args, kwargs, OwnerRun(run[1], lambda body, inputs: _body_values(body, inputs, run))
    )
    node.meta.pop("unknown", None)
    if reason:
        node.meta["unknown"] = reason
    if len(found) == 1:
        return _declared(graph, node, run) if found[0] is UNKNOWN else found[0]
    return tuple(found)


def _body_values(body: Graph, inputs: Sequence[Any], run: Run) -> list[Any]:
    """Derive the types of a body from those of its inputs; returns those of its outputs."""
    key = run[0]
    _BODY_RUNS.setdefault(body.fx, {})[key] = run
    for node, value in zip(body.placeholders, inputs, strict=True):
        _set(node, key, value)
    for node in body.fx.nodes:
        if node.op in ("get_attr", "call_function"):
            _set(node, key, _value_of(body, node, run))
    return [node.meta.get(key, UNKNOWN) if isinstance(node, fx.Node) else node for node in body.result_nodes]


def _signature(value: Any) -> Any:
    """What a result's type depends on, hashable; None when it cannot be told (symbolic sizes, opaque constants)."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride())
        return (value.dtype, sizes) if all(type(size) is int for size in sizes) else None
    if isinstance(value, (tuple, list)):
        parts = tuple(map(_signature, value))
        return None if None in parts else (type(value), parts)
    if isinstance(value, dict):
        return _signature(tuple(value.items()))
    if isinstance(value, np.ndarray):
        if is_foreign(value):  # its elements decide no type
            return (value.dtype.name, value.shape)
        return (value.dtype.str, value.shape, value.tobytes()) if value.dtype != object else None
    if value is None or isinstance(value, (int, float, str, torch.dtype, torch.device)):
        return (type(value), value)
    return ("callable", value) if callable(value) and not isinstance(value, torch.SymInt) else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log of torch's symbolic shapes: a data-dependent value is an answer here, not an error."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch._subclasses")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _set(node: fx.Node, key: str, value: Any) -> None:
    if value is UNKNOWN:
        node.meta.pop(key, None)
    else:
        node.meta[key] = value


# ---- inputs of ONNX graphs


def _fake_inputs(graph: Graph) -> None:
    names = _dimension_names(graph)
    for key, sizes in (("val", graph.sizes), ("probe", _probe_sizes(graph))):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for node, spec in zip(graph.placeholders, graph.inputs, strict=True):
            with mode:
                _set(node, key, _fake_value(spec, sizes) if key == "val" or names else UNKNOWN)


def _dimension_names(graph: Graph) -> list[str]:
    return list(dict.fromkeys(dim for spec in graph.inputs for dim in spec.shape or () if isinstance(dim, str)))


def _probe_sizes(graph: Graph) -> dict[str, int]:
    """Another size for every named dimension: half where it is even and large (limits still fit), else more."""
    sizes: dict[str, int] = {}
    for index, name in enumerate(_dimension_names(graph)):
        size = graph.sizes.get(name, 1)
        sizes[name] = size // 2 if size >= 4 and size % 2 == 0 else 2 * size + 1 + index
    return sizes


def _pairs(graph: Graph) -> dict[tuple[int, int], str]:
    """The name of each dimension by its two sizes, where only one has them."""
    probe = _probe_sizes(graph)
    pairs: dict[tuple[int, int], list[str]] = {}
    for name, other in probe.items():
        pairs.setdefault((graph.sizes.get(name, 1), other), []).append(name)
    return {pair: names[0] for pair, names in pairs.items() if len(names) == 1}


def _fake_value(spec: ValueSpec, sizes: Mapping[str, int]) -> Any:
    if spec.dtype is None or spec.shape is None or any(dim is None for dim in spec.shape):
        return UNKNOWN
    shape = [sizes.get(dim, 1) if isinstance(dim, str) else int(dim or 0) for dim in spec.shape]
    return torch.empty(shape, dtype=spec.dtype)


def _declared(graph: Graph, node: fx.Node, run: Run) -> Any:
    """The value that the ONNX file declares for the node (`value_info` or output), or UNKNOWN."""
    source, index = node.args if node.target is operator.getitem else (node, 0)
    record = source.meta.get("onnx") if isinstance(source, fx.Node) else None
    if graph.model is None or record is None or not isinstance(index, int):
        return UNKNOWN
    outputs: tuple[str, ...] = getattr(record, "outputs", ())
    if (source is node and len(outputs) != 1) or index >= len(outputs):
        return UNKNOWN
    spec = _declarations(graph).get(outputs[index])
    names = _dimension_names(graph)
    if spec is None or any(isinstance(dim, str) and dim not in names for dim in spec.shape or ()):
        return UNKNOWN
    with run[1]:
        return _fake_value(spec, run[2])


def _declarations(graph: Graph) -> dict[str, ValueSpec]:
    assert graph.model is not None
    if "declared" not in graph.model.extra:
        from fxopt.ir.onnx.signature import value_spec

        body = graph.model.proto.graph
        declared = {value.name: value_spec(value) for value in (*body.value_info, *body.output)}
        graph.model.extra["declared"] = {**graph.model.extra.get("inferred", {}), **declared}
    found: dict[str, ValueSpec] = graph.model.extra["declared"]
    return found


def size_of(dim: Any) -> int | None:
    """A dimension as the number for which costs are computed; None for one that depends on data."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, torch.SymInt) and dim.node.has_hint():
        return int(dim.node.hint)
    return None
