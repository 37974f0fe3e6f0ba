"""The types of If, Loop, Scan and SequenceMap from those of their bodies.

A carried value has a type when the body gives back the type that it gets. The length of a scan output is known when
the number of iterations is; for a Loop: the trip count is a host value, and the condition always true or not given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.ir.fake_values import UNKNOWN, same_type
from fxopt.ir.graph import Graph, label
from fxopt.ir.onnx.lane import is_host, to_scalar, to_tensor
from fxopt.ir.subgraphs import CAPTURED, CAPTURED_NAMES, formals

_ROUNDS = 4  # types that still change after so many are unknown


@dataclass(frozen=True)
class OwnerRun:
    """How a body's types are derived: `infer(body, types of its inputs)` gives those of its outputs."""

    mode: FakeTensorMode
    infer: Callable[[Graph, Sequence[Any]], list[Any]]


@dataclass
class _Owner:
    graph: Graph
    node: fx.Node
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run: OwnerRun
    reason: str = ""

    @property
    def outputs(self) -> int:
        return int(self.kwargs.get("_outputs", 1))

    def infer(self, body: Graph, inputs: Sequence[Any]) -> list[Any]:
        """The types that the body gives for those of its own inputs."""
        captured = dict(zip(self.kwargs.get(CAPTURED_NAMES, ()), self.kwargs.get(CAPTURED, ()), strict=True))
        given = [*inputs, *[UNKNOWN] * (formals(body) - len(inputs))][: formals(body)]
        return self.run.infer(body, [*given, *(captured[name] for name in body.captures)])

    def fake(self, shape: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        with self.run.mode:
            return torch.empty(list(shape), dtype=dtype)

    def varying(self, value: Any) -> Any:
        """The type of a value that is not the same in every iteration: host arrays become tensors."""
        if not isinstance(value, np.ndarray):
            return value
        if not is_host(value):
            return UNKNOWN
        return self.fake(value.shape, torch.int64 if value.dtype == object else to_tensor(value).dtype)

    def join(self, first: Any, second: Any) -> Any:
        """The type of a value that is one or the other."""
        if same_type(first, second):
            return first
        if isinstance(first, np.ndarray) or isinstance(second, np.ndarray):
            first, second = self.varying(first), self.varying(second)
        return first if same_type(first, second) else UNKNOWN

    def carried(self, body: Graph, before: Sequence[Any], initial: Sequence[Any], after: Sequence[Any]) -> list[Any]:
        """The body's output types when its carried inputs have types that every iteration keeps."""
        types = [self.varying(value) for value in initial]
        first = 0 if not before else 1  # the condition of a Loop comes before what is carried
        for _ in range(_ROUNDS):
            results = self.infer(body, [*before, *types, *after])
            now = [self.join(old, self.varying(new)) for old, new in zip(types, results[first:], strict=False)]
            if all(map(same_type, types, now)):
                return results[first:]
            types = now
        self.infer(body, [*before, *[UNKNOWN] * len(types), *after])
        return [UNKNOWN] * (len(body.outputs) - first)

    def stacked(self, element: Any, length: Any, axis: int, batch: Sequence[int] = ()) -> Any:
        """The type of a scan output, from that of an element."""
        element = self.varying(element)
        if not isinstance(element, torch.Tensor) or length is None:
            return UNKNOWN
        axis %= element.dim() + 1
        return self.fake([*batch, *element.shape[:axis], length, *element.shape[axis:]], element.dtype)


def owner_types(
    graph: Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], run: OwnerRun
) -> tuple[list[Any], str]:
    """The fake value of each output of a node with bodies (UNKNOWN where there is none), and why one is unknown."""
    owner = _Owner(graph, node, args, kwargs, run)
    rule = _RULES.get(node.target.op_type)  # type: ignore[union-attr]
    found = _others(owner) if rule is None else rule(owner)
    found = (found + [UNKNOWN] * owner.outputs)[: owner.outputs]
    if UNKNOWN not in found:
        return found, ""
    return found, owner.reason or f"the bodies of {label(node)!r} give values of unknown or changing type"


def _if(owner: _Owner) -> list[Any]:
    then, other = (owner.infer(owner.kwargs[name], ()) for name in ("then_branch", "else_branch"))
    known = _flag(owner.graph, owner.node.args[0])
    if known is not None:
        return then if known else other
    owner.reason = "the branches give different types"
    return list(map(owner.join, then, other))


def _loop(owner: _Owner) -> list[Any]:
    body = owner.kwargs["body"]
    limit, _, *initial = (*owner.args, None, None)[: max(2, len(owner.args))]
    step, going = owner.fake((), torch.int64), owner.fake((), torch.bool)
    results = owner.carried(body, (step, going), initial, ())
    states = list(map(owner.join, map(owner.varying, initial), map(owner.varying, results)))
    cond = owner.node.args[1] if len(owner.node.args) > 1 else None
    runs_always = cond is None or (_flag(owner.graph, cond) is True and keeps_condition(body, _flag))
    length = max(0, int(to_scalar(limit))) if runs_always and is_host(limit) else None
    if length is None and len(results) > len(initial):
        owner.reason = "the number of iterations depends on data"
    return [*states, *(owner.stacked(element, length, 0) for element in results[len(initial) :])]


def keeps_condition(body: Graph, flag: Callable[[Graph, Any], bool | None]) -> bool:
    """Whether the condition that a Loop's body gives is the one that it gets, or true; `flag` reads constants."""
    result = body.result_nodes[0]
    while isinstance(result, fx.Node) and getattr(result.target, "op_type", "") == "Identity":
        result = result.args[0]
    return result is body.placeholders[1] or flag(body, result) is True


def _flag(graph: Graph, node: Any) -> bool | None:
    constant = graph.constant(node)
    return None if constant is None or constant.numel() != 1 else bool(constant)


def _scan(owner: _Owner) -> list[Any]:
    body, count = owner.kwargs["body"], owner.kwargs["num_scan_inputs"]
    old = owner.node.target.since_version == 8  # type: ignore[union-attr]
    args = list(map(owner.varying, owner.args[1:] if old else owner.args))
    initial, scanned = args[: len(args) - count], args[len(args) - count :]
    if not all(isinstance(value, torch.Tensor) for value in scanned):
        owner.infer(body, [UNKNOWN] * len(args))
        owner.reason = "the type of what is scanned is unknown"
        return []
    axes = owner.kwargs.get("scan_input_axes") or [1 if old else 0] * count
    if len(axes) != len(scanned) or not scanned:
        owner.infer(body, [UNKNOWN] * len(args))
        owner.reason = f"num_scan_inputs={count} and {len(axes)} scan_input_axes do not fit its {len(args)} inputs"
        return []
    slices = [owner.fake(_without(value, axis, old), value.dtype) for value, axis in zip(scanned, axes, strict=True)]
    length, batch = scanned[0].shape[axes[0]], [scanned[0].shape[0]] if old else []
    entries = [_entry(owner, value) if old else value for value in initial]
    results = owner.carried(body, (), entries, slices)
    states = initial if old else list(map(owner.join, initial, map(owner.varying, results)))
    elements = results[len(initial) :]
    output_axes = owner.kwargs.get("scan_output_axes") or [0] * len(elements)
    return [*states, *(owner.stacked(*item, batch) for item in _with(elements, length, output_axes))]


def _with(elements: list[Any], length: Any, axes: list[int]) -> list[tuple[Any, Any, int]]:
    return [(element, length, axis) for element, axis in zip(elements, axes, strict=False)]


def _without(value: torch.Tensor, axis: int, batched: bool) -> list[int]:
    axis %= value.dim()
    sizes = [size for index, size in enumerate(value.shape) if index != axis]
    return sizes[1:] if batched else sizes


def _entry(owner: _Owner, value: Any) -> Any:
    return owner.fake(value.shape[1:], value.dtype) if isinstance(value, torch.Tensor) else UNKNOWN


def _sequence_map(owner: _Owner) -> list[Any]:
    items, *others = owner.args
    if not isinstance(items, list) or not items:
        owner.infer(owner.kwargs["body"], [UNKNOWN, *(UNKNOWN if isinstance(x, list) else x for x in others)])
        owner.reason = "the number of items of the sequence is unknown"
        return []
    rows = []
    for index, item in enumerate(items):
        along = [other[index] if isinstance(other, list) else other for other in others]
        rows.append(owner.infer(owner.kwargs["body"], [item, *along]))
    mixed = any(not same_type(value, items[0]) for value in items)
    if mixed:  # what is kept of the body must hold for every item
        owner.infer(owner.kwargs["body"], [UNKNOWN] * len(owner.args))
    columns = [list(column) for column in zip(*rows, strict=True)]
    return [UNKNOWN if UNKNOWN in column else column for column in columns]


def _flex_attention(owner: _Owner) -> list[Any]:
    q, k, v = owner.args
    known = all(isinstance(value, torch.Tensor) for value in (q, k, v))
    wide = known and q.dtype == torch.float64
    scores = owner.fake((*q.shape[:3], k.shape[2]), torch.float64 if wide else torch.float32) if known else UNKNOWN
    for name in ("score_mod", "prob_mod"):
        if name in owner.kwargs:
            owner.infer(owner.kwargs[name], [scores if "softmax_precision" not in owner.kwargs else UNKNOWN])
    return [owner.fake((*q.shape[:3], v.shape[3]), q.dtype) if known else UNKNOWN]


def _others(owner: _Owner) -> list[Any]:
    for value in owner.kwargs.values():
        for body in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(body, Graph):
                owner.infer(body, ())
    owner.reason = "fxopt does not know how the operator calls its bodies"
    return []


_RULES: dict[str, Callable[[_Owner], list[Any]]] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
    "SequenceMap": _sequence_map,
    "FlexAttention": _flex_attention,
}
