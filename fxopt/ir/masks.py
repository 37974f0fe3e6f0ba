"""Zeros that were paid for with accuracy survive: the marks of nodes, and whether their weights still keep them.

A mark (`meta["sparsity"]`) lies on every node of a view that holds a weight. `Graph.call` and `Graph.replace` hand it
on to what takes their place, so it may also reach nodes without a weight, which lose it here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from fxopt.errors import VerificationError
from fxopt.ir.graph import Graph, label, provenance
from fxopt.ir.sparsity import Mark
from fxopt.ir.views.linear import Linear, linear, linears
from fxopt.ir.views.weights import weight_of

KEY = "sparsity"
Marks = Mapping[str, Mark]


def mark_of(node: fx.Node) -> Mark | None:
    """The zeros that the node's weight must keep."""
    found: Mark | None = node.meta.get(KEY)
    return found


def marks(graph: Graph) -> dict[str, Mark]:
    """The marks of the nodes that hold weights, by the name of the node that each came from."""
    marked = [node for node in graph.nodes if KEY in node.meta]
    return {provenance(node)[0]: node.meta[KEY] for node in marked if not _adds_bias(graph, node)}


def _adds_bias(graph: Graph, node: fx.Node) -> bool:
    """Whether the node adds the bias to a product, which has the mark too."""
    view = linear(graph, node)
    return isinstance(view, Linear) and bool(view.inner)


def set_mark(graph: Graph, node: fx.Node, mark: Mark) -> None:
    """Mark the linear or convolution whose value the node is: a product and the addition of its bias both."""
    view = linear(graph, node)
    for part in (node, *(view.inner if isinstance(view, Linear) else ())):
        part.meta[KEY] = mark


def settle(graph: Graph) -> None:
    """Mark all nodes of a linear of which one is marked, as they come from a file."""
    if not any(KEY in node.meta for node in graph.nodes):
        return
    for view in linears(graph):
        if isinstance(view, Linear):
            found = next((mark for part in (view.node, *view.inner) if (mark := mark_of(part)) is not None), None)
            if found is not None:
                set_mark(graph, view.node, found)


def carry(before: Graph, after: Graph) -> None:
    """Mark the nodes of a graph that was made of another one, by the names of the nodes they came from."""
    known = marks(before)
    for node in after.calls() if known else ():
        if provenance(node)[0] in known and KEY not in node.meta and weight_of(after, node) is not None:
            node.meta[KEY] = known[provenance(node)[0]]
    settle(after)


def verify_masks(graph: Graph, before: Marks | None = None, changed: Iterable[fx.Node] | None = None) -> None:
    """Check that marked weights have their zeros, and that no mark was lost.

    Args:
        before: the marks as they were (`marks`).
        changed: the nodes to look at; None: all.

    Raises:
        VerificationError: a weight lacks zeros that its mark promises, or a node made of a marked one has no mark.
    """
    for node in list(graph.nodes if changed is None else changed):
        mark = mark_of(node)
        if mark is None:
            continue
        weight = weight_of(graph, node)
        if weight is None:
            del node.meta[KEY]
            continue
        broken = mark.violation(weight)
        if broken:
            raise VerificationError(f"node {label(node)!r} lost zeros of its weight: {broken}")
    _check_lost(graph, before or {})


def _check_lost(graph: Graph, before: Marks) -> None:
    """A mark may go with its node, but what is computed instead of the node must not be without one."""
    gone = before.keys() - marks(graph).keys()
    for node in graph.calls() if gone else ():
        source = provenance(node)[0]
        if source in gone:
            raise VerificationError(
                f"node {label(node)!r} has lost the mark of {source!r}, whose weight has zeros of the pattern "
                f"{before[source].pattern}"
            )


def stale(graph: Graph) -> list[str]:
    """Remove marks that the weights of a file do not keep; returns what was wrong with them, in words."""
    found = []
    for node in list(graph.nodes):
        mark = mark_of(node)
        weight = None if mark is None else weight_of(graph, node)
        broken = "" if mark is None else "it has no weight" if weight is None else mark.violation(weight)
        if broken:
            del node.meta[KEY]
            found.append(f"node {label(node)!r} is not {mark}, as the file says: {broken}")
    return found
