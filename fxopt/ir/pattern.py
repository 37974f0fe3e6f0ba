"""Rules: a pattern of neutral operators, a check and a replacement, with the same parameter names in the three.

    class DropReciprocalPair(Rule):
        \"\"\"1 / (1 / x)  ->  x\"\"\"

        def pattern(self, op: OpNames, /, x: P) -> P:
            return op.reciprocal(op.reciprocal(x))

        def check(self, match: Match, /, x: fx.Node) -> Refusal | None:
            return None if match.shape(x) else Refusal("{} has no axes", x)

        def replace(self, b: Builder, /, x: fx.Node) -> fx.Node:
            return x

`pattern` runs once, on symbols; a parameter binds a node or, where `neutral` reads one, a Python value (shape, axes,
number, element type). Twice the same parameter is the same node or an equal constant. Commutative operators match in
both orders. A number matches a Python number or a constant all of whose elements have that value; 0.0 and -0.0 differ.
Every node between the root and the parameters may be used inside the match only, unless the rule says `shares_inner`.
A rule keeps nothing between matches. Where it fires and why not: `fxopt.ir.matching`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.errors import InvalidOption, unknown
from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, Origin, merged_shape, type_of
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import AXES, COMMUTATIVE, COMPOSED, operators, parameters

__all__ = [
    "Builder", "Match", "Mismatch", "OpNames", "Operation", "P", "Parameter", "Pattern", "Refusal", "Rule", "compiled"
]  # fmt: skip


class Mismatch(Refusal):
    """The structure is there but is nothing that the rule is about: `why_not` tells, the ledger does not."""


class P:
    """A value in a pattern: a parameter, or what an operator makes of others."""

    def __add__(self, other: Any) -> P:
        return Operation("add", (self, other))

    def __radd__(self, other: Any) -> P:
        return Operation("add", (other, self))

    def __sub__(self, other: Any) -> P:
        return Operation("sub", (self, other))

    def __rsub__(self, other: Any) -> P:
        return Operation("sub", (other, self))

    def __mul__(self, other: Any) -> P:
        return Operation("mul", (self, other))

    def __rmul__(self, other: Any) -> P:
        return Operation("mul", (other, self))

    def __truediv__(self, other: Any) -> P:
        return Operation("div", (self, other))

    def __rtruediv__(self, other: Any) -> P:
        return Operation("div", (other, self))

    def __pow__(self, other: Any) -> P:
        return Operation("pow", (self, other))

    def __matmul__(self, other: Any) -> P:
        return Operation("matmul", (self, other))

    def __neg__(self) -> P:
        return Operation("neg", (self,))


@dataclass(frozen=True, eq=False)
class Parameter(P):
    """What a pattern binds."""

    name: str


class Operation(P):
    """A neutral operator; arguments are `P`, lists of them, or Python values."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name = name
        self.arguments = arguments
        self.commutes = name in COMMUTATIVE
        names = parameters(name).parameters
        self.axes = tuple(  # positions of axes that the pattern writes as numbers
            index
            for index, (key, value) in enumerate(zip(names, arguments, strict=True))
            if key in AXES and not isinstance(value, P)
        )


class OpNames:
    """`op.softmax(x, -1)`: the neutral operators by name, with the parameters of the builder's methods."""

    def __init__(self, origin: Origin) -> None:
        self._composed = COMPOSED.get(origin, {})

    def __getattr__(self, name: str) -> Callable[..., P]:
        if name not in operators():
            raise unknown("operator in a pattern", name, operators())
        signature = parameters(name)

        def operation(*args: Any, **kwargs: Any) -> P:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            if name not in self._composed:
                return Operation(name, tuple(given.arguments.values()))
            outer, inner = self._composed[name]
            return Operation(outer, (Operation(inner, tuple(given.arguments.values())),))

        return operation


@dataclass(frozen=True)
class Match:
    """Where a pattern was found: `bound` by parameter name, `inner` the nodes between root and parameters."""

    graph: Graph
    root: fx.Node
    bound: Mapping[str, Any]
    inner: tuple[fx.Node, ...]
    types: Mapping[fx.Node, Any] = field(default_factory=dict)  # (val, probe) of nodes made in this run

    def type(self, node: object) -> tuple[Any, Any] | None:
        """The fake values of a node at the sizes of both of its runs (`fxopt.ir.shapes`); None when they are unknown.

        Only what agrees in both holds for every size of the inputs.
        """
        if not isinstance(node, fx.Node):
            return None
        made: tuple[Any, Any] | None = self.types.get(node)
        return type_of(node) if made is None else made

    def known(self, node: object) -> Any:
        """The fake value of a node (tensor, host array, tuple); None when it is unknown."""
        known = self.type(node)
        return None if known is None else known[0]

    def value(self, node: object) -> torch.Tensor | None:
        """The fake tensor of a node; None when it is unknown."""
        known = self.known(node)
        return known if isinstance(known, torch.Tensor) else None

    def shape(self, node: object) -> tuple[Any, ...] | None:
        """The shape of a node, with an int where a dimension is fixed; None when it is unknown."""
        known = self.type(node)
        return None if known is None else merged_shape(*known)

    def dtype(self, node: object) -> torch.dtype | None:
        """The element type of a node; None when it is unknown."""
        value = self.value(node)
        return None if value is None else value.dtype

    def constant(self, node: object) -> torch.Tensor | None:
        """The tensor of a constant; None for every other argument."""
        return self.graph.constant(node)


class Rule:
    """One rewrite; the first line of the docstring is its equation."""

    shares_inner: ClassVar[bool] = False  # nodes inside the match may have users outside; they stay

    @property
    def name(self) -> str:
        """The class name in kebab case."""
        return _kebab(type(self).__name__)

    def pattern(self, op: OpNames, /, *args: Any, **kwargs: Any) -> P | tuple[P, ...]:
        """What to look for; a tuple lists alternatives."""
        raise NotImplementedError(f"{type(self).__name__} must define pattern(op, ...)")

    def check(self, match: Match, /, *args: Any, **kwargs: Any) -> Refusal | None:
        """Why the rule does not apply to the match, or None."""
        return None

    def replace(self, b: Builder, /, *args: Any, **kwargs: Any) -> fx.Node:
        """The node whose value the root's users get: one that `b` makes, or one that exists."""
        raise NotImplementedError(f"{type(self).__name__} must define replace(b, ...)")


@cache
def _kebab(name: str) -> str:
    return "".join(f"-{char.lower()}" if char.isupper() else char for char in name).lstrip("-")


@dataclass(frozen=True)
class Pattern:
    """A rule and one of its patterns, ready to be matched."""

    rule: Rule
    root: Operation


def compiled(rule: Rule, origin: Origin) -> tuple[Pattern, ...]:
    """The rule's patterns for graphs of one origin.

    Raises:
        InvalidOption: `check` or `replace` has other parameters than `pattern`, or a pattern has no operator.
        UnknownName: the pattern uses an operator that does not exist.
    """
    names = _parameter_names(rule.pattern)
    for method in (rule.check, rule.replace):
        if (given := _parameter_names(method)) not in (names, None):
            raise InvalidOption(f"rule {rule.name}: {method.__name__} takes {given}, pattern takes {names}")
    made = rule.pattern(OpNames(origin), **{name: Parameter(name) for name in names or ()})
    roots = made if isinstance(made, tuple) else (made,)
    for root in roots:
        if not isinstance(root, Operation):
            raise InvalidOption(f"rule {rule.name}: the pattern is {root!r}; expected an operator")
    return tuple(Pattern(rule, root) for root in roots if isinstance(root, Operation))


def _parameter_names(method: Callable[..., Any]) -> list[str] | None:
    """The names after the first one; None for the methods of the base class, which take all."""
    found = list(inspect.signature(method).parameters.values())[1:]
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in found):
        return None
    return [each.name for each in found]
