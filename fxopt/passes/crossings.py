"""Where values change between 8-bit levels and floats, for any choice among the candidates that work on such levels.

What lies between (additions, pooling: `quantize_between`) follows its neighbours. Times are from profiles of ONNX
Runtime: a value that crosses is reordered and converted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import combinations

from torch import fx

from fxopt.ir.graph import Graph, hint, shape_of
from fxopt.ir.target import Cost
from fxopt.ir.views.common import is_onnx
from fxopt.ir.views.eight_bit import passes_levels_on, saturated
from fxopt.passes.quantize_between import is_between, operands_of

# Bytes per element that crosses: several readings and writings, for layouts change too. From 0.3 ns (MobileNetV2) to
# 1 ns (ResNet-50) at 90 GB/s of the cache.
_BYTES = 40
_POOLED = 400  # per element before a MaxPool that floats enter and only codes leave: it is moved behind the rounding


@dataclass(frozen=True)
class Place:
    """One operator: what it reads, and by whose choice it works on levels."""

    reads: tuple[int, ...]  # the places of its operands
    candidate: str = ""  # the node of the candidate that decides; "" for the others
    kind: str = "float"  # "gives" (levels), "takes" (levels, and gives floats), "between", "moves" or "float"
    elements: int = 0  # of its result
    pooled: int = 0  # elements of what a MaxPool reads


class Crossings:
    """The operators of a graph in order; `of` counts the conversions of a choice."""

    def __init__(self, places: list[Place], predict: Callable[[Cost], float]) -> None:
        self.places = places
        self.predict = predict
        self.readers: list[list[int]] = [[] for _ in places]
        for index, place in enumerate(places):
            for operand in place.reads:
                self.readers[operand].append(index)
        self._known: dict[frozenset[str], tuple[float, frozenset[str]]] = {}

    def of(self, taken: Collection[str]) -> tuple[float, frozenset[str]]:
        """Seconds for conversions, and candidates that are not taken but run in 8 bits all the same.

        ONNX Runtime quantises the weights of a float convolution whose input and output both lie on levels.
        """
        key = frozenset(taken)
        if key not in self._known:
            self._known[key] = self._of(key)
        return self._known[key]

    def _of(self, taken: frozenset[str]) -> tuple[float, frozenset[str]]:
        on = self._on_levels(taken)
        asked = [self._asked(index, taken, on) for index in range(len(self.places))]
        lone = frozenset(
            place.candidate
            for place, (codes, floats) in zip(self.places, asked, strict=True)
            if place.kind == "gives" and place.candidate not in taken
            if codes and not floats and all(on[operand] for operand in place.reads)
        )
        if lone:
            return self.of(taken | lone)[0], lone
        moved = 0
        for place, (codes, floats), is_on in zip(self.places, asked, on, strict=True):
            if codes if not is_on else floats:
                moved += _BYTES * place.elements
            if codes and not floats and not is_on:
                moved += _POOLED * place.pooled
        return (self.predict(Cost(0.0, moved, kind="elementwise", launches=0)) if moved else 0.0), lone

    def _on_levels(self, taken: frozenset[str]) -> list[bool]:
        """Whether each result is made on levels."""
        on: list[bool] = []
        for place in self.places:
            if place.kind == "gives":
                on.append(place.candidate in taken)
            elif place.kind in ("between", "moves"):
                on.append(all(on[operand] or self._is_taken(operand, taken) for operand in place.reads))
            else:
                on.append(False)
        return on

    def _is_taken(self, index: int, taken: frozenset[str]) -> bool:
        return any(self.places[reader].candidate in taken for reader in self.readers[index])

    def _asked(self, index: int, taken: frozenset[str], on: list[bool]) -> tuple[bool, bool]:
        """Whether the result is asked for as codes, and as floats; what only moves elements takes both as they are."""
        codes = floats = False
        for reader in self.readers[index]:
            place = self.places[reader]
            if place.kind == "moves" and on[index]:
                continue
            if place.kind == "between":
                codes, floats = codes or on[reader], floats or not on[reader]
            elif place.candidate:
                codes, floats = codes or place.candidate in taken, floats or place.candidate not in taken
            else:
                floats = True
        return codes, floats

    @property
    def order(self) -> list[str]:
        """The candidates' nodes in the order of the graph."""
        return [place.candidate for place in self.places if place.candidate]

    def neighbours(self) -> list[tuple[str, str]]:
        """Pairs of candidates whose conversions depend on each other: there is one value that both read or give."""
        found: dict[tuple[str, str], None] = {}
        givers: list[frozenset[str]] = []
        for place in self.places:
            before: frozenset[str] = frozenset().union(*(givers[operand] for operand in place.reads))
            if place.candidate:
                found |= {(giver, place.candidate): None for giver in sorted(before)}
                before = frozenset([place.candidate]) if place.kind == "gives" else frozenset()
            elif place.kind == "between":
                found |= dict.fromkeys(combinations(sorted(before), 2))
                direct = [operand for operand in place.reads if self.places[operand].kind != "between"]
                before = frozenset().union(*(givers[operand] for operand in direct))
            elif place.kind != "moves":
                before = frozenset()
            givers.append(before)
        for readers in self.readers:
            names = sorted({self.places[reader].candidate for reader in readers} - {""})
            found |= dict.fromkeys(combinations(names, 2))
        return list(found)


def crossings(
    graph: Graph, levels: Mapping[str, tuple[fx.Node, fx.Node | None]], predict: Callable[[Cost], float]
) -> Crossings | None:
    """The conversions of a graph; None when no candidate works on fixed levels.

    Args:
        levels: of each such candidate, by node: the value it rounds, and the value it gives on levels (or None).
        predict: seconds of a cost.
    """
    if not levels:
        return None
    gives = {given: (name, x) for name, (x, given) in levels.items() if given is not None}
    takes = {name: x for name, (x, given) in levels.items() if given is None}
    places: list[Place] = []
    index: dict[fx.Node, int] = {}
    inside: set[str] = set(levels) - {given.name for given in gives}
    joined: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or node in joined:
            continue
        if node in gives:
            name, x = gives[node]
            place = Place(_known(index, [x]), name, "gives", _elements(node))
        elif node.name in takes:
            place = Place(_known(index, [takes[node.name]]), node.name, "takes", _elements(node))
        elif node.name in inside:
            continue
        elif is_between(graph, node):
            result = saturated(graph, node)
            place = Place(_known(index, operands_of(node)), "", "between", _elements(result))
            if result is not node:
                joined.add(result)
                index[result] = len(places)
        elif passes_levels_on(node):
            first = node.args[0]
            assert isinstance(first, fx.Node)
            pooled = _elements(first) if is_onnx(node, "MaxPool") else 0
            place = Place(_known(index, [first]), "", "moves", _elements(node), pooled)
        else:
            place = Place(_known(index, node.all_input_nodes), elements=_elements(node))
        index[node] = len(places)
        places.append(place)
    return Crossings(places, predict)


def _known(index: Mapping[fx.Node, int], nodes: list[fx.Node]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(index[node] for node in nodes if node in index))


def _elements(node: fx.Node) -> int:
    total = 1
    for dim in shape_of(node) or (0,):
        total *= hint(dim)
    return total
