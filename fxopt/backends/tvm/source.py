"""What is compiled: a function of a model at one set of sizes, as a graph of aten operators."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxopt.backends.tvm.buckets import all_sizes, combinations, shapes_at, suffix
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, label

Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Source:
    """A function of a model at fixed sizes.

    Attributes:
        function: its name.
        symbol: the name of its C function.
        sizes: of the named dimensions.
        graph: aten operators, perhaps with dimensions that `shapes` fixes.
        shapes: of the inputs.
    """

    function: str
    symbol: str
    sizes: dict[str, int]
    graph: Graph
    shapes: Shapes


def source_at(graph: Graph, sizes: Mapping[str, int], function: str, symbol: str) -> Source:
    """The source of a graph of either origin at sizes for all of its dimensions.

    Raises:
        Unsupported: an ONNX operator cannot be written in aten; the message names the nodes.
    """
    shapes = shapes_at(graph, sizes)
    if graph.origin == "onnx":
        _check_references(graph)
        known = all_sizes(graph, sizes)
        graph = graph.lower(sizes=known, fixed=tuple(known))
    return Source(function, symbol, dict(sizes), graph, shapes)


def sources(
    graph: Graph, buckets: Mapping[str, Sequence[int]], function: str, symbol: str | None = None
) -> list[Source]:
    """A source for each combination of sizes.

    Raises:
        Unsupported: a dimension has no sizes, or an ONNX operator cannot be written in aten.
    """
    base = identifier(function if symbol is None else symbol)
    sized = {name: tuple(sizes) for name, sizes in buckets.items()}
    return [source_at(graph, sizes, function, base + suffix(sizes)) for sizes in combinations(graph, sized)]


def _check_references(graph: Graph) -> None:
    """Name every operator without a definition in torch at once; `lower` would stop at the first."""
    from fxopt.ir.onnx.op import OnnxOp
    from fxopt.ir.subgraphs import FUNCTION

    lacking = [
        f"{label(node)}: {node.target.op_type}"
        for node in graph.calls()
        if isinstance(node.target, OnnxOp) and not node.target.has_reference and FUNCTION not in node.kwargs
    ]
    if lacking:
        raise Unsupported(f"{len(lacking)} operators have no definition in torch to compile: {'; '.join(lacking)}")


def identifier(name: str) -> str:
    """A C identifier like `name`.

    >>> identifier("Digits CNN-2")
    'digits_cnn_2'
    """
    found = re.sub(r"[^0-9A-Za-z]+", "_", name).strip("_").lower() or "model"
    return f"model_{found}" if found[0].isdigit() else found
