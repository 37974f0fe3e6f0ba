"""Bodies of If, Loop, Scan, SequenceMap and the like: graphs that a constant of another graph holds.

    owner:  y = onnx("", "If", 16)(c, then_branch=t, else_branch=e, _captured=(x, w), _captured_names=("x", "w"))
    t:      a `get_attr` node, whose constant is a `Graph` with captures ("x",)

A function of the model, or the body that the schema gives an operator, is held in the same way by the keyword
`_function`; it belongs to all of its calls, so passes do not enter it and `subgraphs` does not give it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.ir.graph import Graph, label

FUNCTION = "_function"  # keyword of the constant that holds the function which a node calls
CAPTURED, CAPTURED_NAMES = "_captured", "_captured_names"


@dataclass(frozen=True)
class Subgraph:
    """A body and its place: `holder` is the graph of the node `owner`, whose keyword `attribute` is `constant`."""

    holder: Graph
    owner: fx.Node
    attribute: str
    constant: fx.Node
    graph: Graph
    path: str  # as in ledger rows: the owners' names and attributes from outside to inside, "loop/body/if/then_branch"


def subgraphs(graph: Graph, *, recursive: bool = True, above: str = "") -> Iterator[Subgraph]:
    """The bodies of a graph's nodes, in execution order, each before the bodies in it."""
    for constant in graph.fx.find_nodes(op="get_attr"):
        body = graph.attribute(str(constant.target))
        if not isinstance(body, Graph):
            continue
        for owner in constant.users:
            for attribute in _keywords(owner, constant):
                found = Subgraph(graph, owner, attribute, constant, body, f"{above}{label(owner)}/{attribute}")
                yield found
                if recursive:
                    yield from subgraphs(body, above=f"{found.path}/")


def _keywords(owner: fx.Node, constant: fx.Node) -> Iterator[str]:
    for name, value in owner.kwargs.items():
        items = value if isinstance(value, (list, tuple)) else (value,)
        if not name.startswith("_") and any(item is constant for item in items):
            yield name


def has_bodies(node: fx.Node, graph: Graph) -> bool:
    """True when a keyword of the node is a body of its own (a function that it calls is not)."""
    return any(
        isinstance(graph.attribute(str(item.target)), Graph)
        for name, value in node.kwargs.items()
        for item in (value if isinstance(value, (list, tuple)) else (value,))
        if isinstance(item, fx.Node) and item.op == "get_attr" and not name.startswith("_")
    )


def formals(body: Graph) -> int:
    """The number of inputs that the owner gives a body; the captured values come after them."""
    return len(body.inputs) - len(body.captures)


def without_unused_captures(graph: Graph) -> int:
    """Drop captured values that no body of their owner needs any more; returns how many were dropped."""
    dropped = 0
    owners: dict[fx.Node, list[Graph]] = {}
    for found in subgraphs(graph, recursive=False):
        owners.setdefault(found.owner, []).append(found.graph)
    for owner, bodies in owners.items():
        needed = {name for body in bodies for name in _trimmed(body)}
        names: Any = owner.kwargs.get(CAPTURED_NAMES, ())
        if all(name in needed for name in names):
            continue
        values: Any = owner.kwargs[CAPTURED]
        pairs = [(value, name) for value, name in zip(values, names, strict=True) if name in needed]
        kept = {key: value for key, value in owner.kwargs.items() if key not in (CAPTURED, CAPTURED_NAMES)}
        if pairs:
            kept[CAPTURED] = tuple(value for value, _ in pairs)
            kept[CAPTURED_NAMES] = tuple(name for _, name in pairs)
        dropped += len(names) - len(pairs)
        owner.kwargs = kept
    return dropped


def _trimmed(body: Graph) -> tuple[str, ...]:
    """The captures of a body after those that it does not use are dropped."""
    captured = body.placeholders[formals(body) :]
    unused = {index for index, node in enumerate(captured) if not node.users}
    if unused:
        first = formals(body)
        for index in unused:
            body.fx.erase_node(captured[index])
        body.captures = tuple(name for index, name in enumerate(body.captures) if index not in unused)
        body.inputs = tuple(spec for index, spec in enumerate(body.inputs) if index - first not in unused)
    return body.captures
