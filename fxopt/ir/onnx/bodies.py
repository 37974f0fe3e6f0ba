"""`Body`: a sub-graph or function, bound to what it needs from around it, as references call it.

A GRAPH attribute reaches the reference of its operator as a `Body`; `body(*inputs)` gives the list of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from fxopt.errors import InvalidInput, InvalidModel
from fxopt.ir.graph import ValueSpec
from fxopt.ir.subgraphs import CAPTURED, CAPTURED_NAMES, FUNCTION

DEFAULTS = "_defaults"  # keyword of a function call: the attributes' defaults
_HIDDEN = (CAPTURED, CAPTURED_NAMES, DEFAULTS)


@dataclass(frozen=True)
class AttributeReference:
    """In a function: the value that the attribute `name` has at the call (`ref_attr_name` in the file)."""

    name: str

    def __repr__(self) -> str:
        return f"attribute({self.name!r})"


class Runnable(Protocol):
    """Something that can be bound: `run(inputs and captured values, attributes)` gives the outputs."""

    @property
    def captures(self) -> tuple[str, ...]:
        """The names of the last inputs, which come from around."""
        ...

    @property
    def formals(self) -> int:
        """The number of inputs that a caller gives."""
        ...

    @property
    def outputs(self) -> Sequence[ValueSpec]:
        """The outputs as declared."""
        ...

    def run(self, inputs: list[Any], attributes: Mapping[str, Any]) -> list[Any]:
        """The outputs."""
        ...


@dataclass(frozen=True)
class Body:
    """A sub-graph or function, with the captured values and the attributes of the function around it."""

    inside: Runnable
    captured: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def formals(self) -> int:
        """The number of inputs."""
        return self.inside.formals

    def __call__(self, *inputs: Any) -> list[Any]:
        """The outputs; omitted inputs at the end are None.

        Raises:
            InvalidInput: there are more inputs than the body takes.
        """
        if len(inputs) > self.inside.formals:
            raise InvalidInput(f"{len(inputs)} inputs given; the sub-graph or function takes {self.inside.formals}")
        omitted = [None] * (self.inside.formals - len(inputs))
        around = [self.captured[name] for name in self.inside.captures]
        return self.inside.run([*inputs, *omitted, *around], self.attributes)


def bound(kwargs: Mapping[str, Any], body: Callable[[Any], Runnable | None], attributes: Mapping[str, Any]) -> Any:
    """The keywords of a node with bodies for graphs, and the values of attribute references.

    Args:
        body: the runnable of a keyword's value, None for a value that is no graph.
        attributes: those of the function around.
    """
    captured = dict(zip(kwargs.get(CAPTURED_NAMES, ()), kwargs.get(CAPTURED, ()), strict=True))

    def value_of(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(body(item) is not None for item in value):
            return [value_of(item) for item in value]
        inside = body(value)
        return value if inside is None else Body(inside, captured, attributes)

    found: dict[str, Any] = {}
    for name, value in kwargs.items():
        if not isinstance(value, AttributeReference):
            found[name] = value_of(value)
        elif value.name in attributes:
            found[name] = attributes[value.name]
    return found


def call(function: Body, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: int) -> Any:
    """The result of a node that calls a function: bare, or a tuple when the node has several outputs.

    Raises:
        InvalidModel: the node wants more outputs than the function has.
    """
    given = {name: value for name, value in kwargs.items() if name not in (*_HIDDEN, FUNCTION)}
    results = replace(function, attributes={**kwargs.get(DEFAULTS, {}), **given})(*inputs)
    if len(results) < outputs:
        raise InvalidModel(f"a function of {len(results)} outputs is called for {outputs}")
    return results[0] if outputs == 1 else tuple(results[:outputs])


def visible(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords that a reference gets: without those that say what a body captures."""
    return {name: value for name, value in kwargs.items() if name not in _HIDDEN}
