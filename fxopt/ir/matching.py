"""Where the patterns of rules are found in a graph, and why they are not.

Matching starts at a root and follows operands, so its cost does not depend on the size of the graph. Operators that
commute are tried in both orders where both are possible; what is possible is remembered per operand, so that nested
ones do not multiply, and the number of steps is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx

from fxopt.ir.graph import Graph, label, tensor_value
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import normal_axes, read
from fxopt.ir.pattern import Match, Mismatch, Operation, P, Parameter, Pattern, Rule, compiled

Types = Mapping[fx.Node, Any]
Readings = dict[tuple[fx.Node, str], Any]
_MOST_STEPS = 2_000  # of one pattern at one node


_State = tuple[Any, dict[str, Any], dict[Operation, fx.Node]]  # pending pairs as a linked list, bound, assigned


def matches(
    graph: Graph,
    pattern: Pattern,
    root: fx.Node,
    types: Types | None = None,
    trace: Trace | None = None,
    readings: Readings | None = None,
) -> Iterator[Match]:
    """Every way in which the pattern's structure is found at `root`; users and `check` are not looked at.

    Args:
        types: fake values of nodes that have none yet.
        trace: receives the failure that came furthest.
        readings: what was read before, for several patterns on an unchanged graph.
    """
    search = _Search(graph, trace, {} if readings is None else readings)
    if trace is None and not search.possible(pattern.root, root):
        return
    stack: list[_State] = [(((pattern.root, root), None), {}, {})]
    while stack:
        state = stack.pop()
        search.steps += 1
        if search.steps > _MOST_STEPS:
            search.failed(state, Refusal("the operands match in more than {} ways", _MOST_STEPS))
            return
        pending, bound, assigned = state
        if pending is None:
            inner = tuple(dict.fromkeys(node for node in assigned.values() if node is not root))
            yield Match(graph, root, bound, inner, types or {})
        else:
            stack.extend(search.step(state))


@dataclass
class Trace:
    """The failure that came furthest: most operators matched, the first one found."""

    depth: int = -1
    reason: Refusal | None = None

    def note(self, depth: int, reason: Refusal) -> None:
        """Keep the reason when it came further than the one kept."""
        if depth > self.depth:
            self.depth, self.reason = depth, reason


class _Search:
    """One pattern at one root."""

    def __init__(self, graph: Graph, trace: Trace | None, readings: Readings) -> None:
        self.graph = graph
        self.trace = trace
        self.steps = 0
        self.readings = readings
        self.known: dict[tuple[Operation, Any], bool] = {}

    def failed(self, state: _State, reason: Refusal) -> list[_State]:
        """No way on from here."""
        if self.trace is not None:
            self.trace.note(len(state[2]), reason)
        return []

    def step(self, state: _State) -> list[_State]:
        """The states after the first pending pair, the one to be tried first last."""
        ((wanted, value), rest), bound, assigned = state
        if isinstance(wanted, Parameter):
            if wanted.name not in bound:
                return [(rest, {**bound, wanted.name: value}, assigned)]
            if same(self.graph, bound[wanted.name], value):
                return [(rest, bound, assigned)]
            return self.failed(state, _twice(wanted.name, bound[wanted.name], value))
        if isinstance(wanted, Operation):
            return self.operation(state, wanted, value, rest)
        if _holds_patterns(wanted):
            if isinstance(value, (list, tuple)) and len(value) == len(wanted):
                return [(_pushed(wanted, value, rest), bound, assigned)]
            return self.failed(state, Refusal("expected {} values, found {}", len(wanted), value))
        if same(self.graph, wanted, value):
            return [(rest, bound, assigned)]
        return self.failed(state, _other(wanted, value))

    def operation(self, state: _State, wanted: Operation, value: Any, rest: Any) -> list[_State]:
        """An operator: its arguments are to be matched next, in each order that is possible."""
        _, bound, assigned = state
        if wanted in assigned:
            if assigned[wanted] is value:
                return [(rest, bound, assigned)]
            return self.failed(state, _twice(wanted.name, assigned[wanted], value))
        arguments = self.reading(value, wanted.name)
        if arguments is None:
            return self.failed(state, _other(wanted.name, value))
        orders = _orders(wanted, arguments)
        if self.trace is None and len(orders) > 1:  # with a trace the failure itself is of interest
            orders = [order for order in orders if self.all_possible(order, arguments)]
        assigned = {**assigned, wanted: value}
        return [(_pushed(order, arguments, rest), bound, assigned) for order in reversed(orders)]

    def reading(self, value: Any, name: str) -> tuple[Any, ...] | None:
        """`read`, once per node and operator."""
        if not isinstance(value, fx.Node):
            return None
        key = (value, name)
        if key not in self.readings:
            self.readings[key] = read(self.graph, value, name)
        found: tuple[Any, ...] | None = self.readings[key]
        return found

    def all_possible(self, wanted: Any, values: Any) -> bool:
        """Whether each value can be what is wanted, parameters aside."""
        for item, value in zip(wanted, values, strict=True):
            if not isinstance(item, Parameter) and not self.possible(item, value):
                return False
        return True

    def possible(self, wanted: Any, value: Any) -> bool:
        """Whether the operators and constants of `wanted` are there; remembered, so linear in the pattern."""
        if isinstance(wanted, Operation):
            key = (wanted, value if isinstance(value, fx.Node) else None)
            if key not in self.known:
                arguments = self.reading(value, wanted.name)
                self.known[key] = arguments is not None and any(
                    self.all_possible(order, arguments) for order in _orders(wanted, arguments)
                )
            return self.known[key]
        if _holds_patterns(wanted):
            fits = isinstance(value, (list, tuple)) and len(value) == len(wanted)
            return fits and self.all_possible(wanted, value)
        return same(self.graph, wanted, value)


def _holds_patterns(wanted: Any) -> bool:
    return isinstance(wanted, (list, tuple)) and any(isinstance(item, P) for item in wanted)


def _pushed(wanted: Any, values: Any, rest: Any) -> Any:
    for pair in reversed(list(zip(wanted, values, strict=True))):
        rest = (pair, rest)
    return rest


def _orders(wanted: Operation, arguments: tuple[Any, ...]) -> list[Any]:
    """The wanted arguments in each order; axes counted from the end count from 0 if the rank is known."""
    items = wanted.arguments
    if wanted.axes:
        first = arguments[0]
        value = tensor_value(first[0] if isinstance(first, (list, tuple)) else first)
        rank = None if value is None else value.dim()
        items = tuple(_axes(item, rank) if index in wanted.axes else item for index, item in enumerate(items))
    return [items, items[::-1]] if wanted.commutes else [items]


def _axes(item: Any, rank: int | None) -> Any:
    normal = normal_axes(item, rank)
    return tuple(sorted(normal)) if isinstance(normal, (list, tuple)) else normal


def _twice(name: str, one: Any, two: Any) -> Refusal:
    return Refusal("{} is {} in one place and {} in another", name, one, two)


def _other(wanted: Any, value: Any) -> Refusal:
    if not isinstance(value, fx.Node):
        return Refusal("expected {}, found {}", wanted, value)
    what = value.op if value.op != "call_function" else getattr(value.target, "__name__", value.target)
    return Refusal("expected {}, found {} ({})", wanted, label(value), what)


# ---- equality


def same(graph: Graph, a: Any, b: Any) -> bool:
    """Whether two arguments are the same node or equal constants; a constant that repeats a number equals it."""
    if a is b:
        return True
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(graph, mine, other) for mine, other in zip(a, b, strict=True))
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return _equal_constants(graph.constant(a), graph.constant(b))
    if isinstance(b, fx.Node):
        a, b = b, a
    if isinstance(a, fx.Node):
        return _is_number(b) and _is_all(graph.constant(a), b)
    if _is_number(a) and _is_number(b):
        return _same_number(a, b)
    return type(a) is type(b) and bool(a == b)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _same_number(a: float, b: float) -> bool:
    """Equal, with the same sign where one is a floating-point zero."""
    return a == b and (a != 0 or math.copysign(1, a) == math.copysign(1, b))


def _equal_constants(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or torch.equal(a, b)


def _is_all(constant: torch.Tensor | None, number: float) -> bool:
    if constant is None or constant.numel() == 0 or constant.dtype == torch.bool or constant.is_complex():
        return False
    flat = constant.reshape(-1)
    if not _same_number(flat[0].item(), number) or not bool((flat == flat[0]).all()):
        return False
    return number != 0 or not flat.is_floating_point() or not bool((flat.signbit() != flat[0].signbit()).any())


# ---- verdicts


def accepted(
    graph: Graph, pattern: Pattern, root: fx.Node, types: Types | None = None, readings: Readings | None = None
) -> Match | Refusal | None:
    """The first match that the rule accepts, else why the first one was refused, else None."""
    refused: Refusal | None = None
    for match in matches(graph, pattern, root, types, readings=readings):
        reason = None if pattern.rule.shares_inner else _outside_user(match)
        reason = reason or pattern.rule.check(match, **match.bound)
        if reason is None:
            return match
        if refused is None or isinstance(refused, Mismatch):
            refused = reason
    return refused


def _outside_user(match: Match) -> Refusal | None:
    """The refusal of a match whose inner values are needed elsewhere too."""
    own = {match.root, *match.inner}
    for node in match.inner:
        for user in node.users:
            if user not in own:
                return Refusal("the value of {} is also used by {}", label(node), label(user))
    return None


def why_not(graph: Graph, rule: Rule, node: fx.Node) -> Refusal | None:
    """Why the rule does not fire at a node: what failed in the match that came furthest; None: it fires."""
    trace = Trace()
    for pattern in compiled(rule, graph.origin):
        verdict = accepted(graph, pattern, node)
        if isinstance(verdict, Match):
            return None
        if verdict is not None:
            trace.note(_MOST_STEPS, verdict)
            continue
        for _ in matches(graph, pattern, node, trace=trace):
            pass
    return trace.reason
