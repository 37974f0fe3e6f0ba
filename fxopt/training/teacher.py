"""The model that a student learns from: a frozen graph, whose blocks can be compared too, or any function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxopt.errors import InvalidInput, InvalidOption, unknown
from fxopt.ir.graph import Graph, label, provenance
from fxopt.ir.interpreter import Evaluator, GraphRun, plain_tensor
from fxopt.ir.views.residual import ResidualBlock, residuals

_REARRANGES = "rearrange-channels"  # the pass


@dataclass(frozen=True)
class Given:
    """What a model gives: its results, and the values of its blocks."""

    results: list[Any]
    blocks: list[Tensor]

    @property
    def output(self) -> Tensor:
        """The first floating-point result."""
        for value in self.results:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
        raise InvalidInput("the model gives no floating-point output")


class Teacher(Protocol):
    """Gives its results on flat inputs, without gradients."""

    def __call__(self, inputs: Sequence[Any]) -> Given:
        """Run it."""
        ...


class Observed:
    """A run of a graph that keeps the values of some nodes.

    Args:
        run: makes the run, given what it must call with every node and value.
        blocks: the names of the nodes.
    """

    def __init__(self, run: Callable[[Callable[[fx.Node, Any], None]], GraphRun], blocks: Sequence[str]) -> None:
        self.blocks = blocks
        self.kept: dict[str, Any] = {}
        self.run = run(self._see)

    def _see(self, node: fx.Node, value: Any) -> None:
        if node.name in self.blocks:
            self.kept[node.name] = value

    def __call__(self, inputs: Sequence[Any]) -> Given:
        """Run it."""
        results = [plain_tensor(value) for value in self.run.run(list(inputs))]
        given = Given(results, [self.kept[name] for name in self.blocks])
        self.kept = {}
        return given


class GraphTeacher:
    """A graph with its constants as they are."""

    def __init__(self, graph: Graph, blocks: Sequence[str], evaluator: Evaluator | None) -> None:
        self.graph = graph
        self.run = Observed(lambda observer: GraphRun(graph, evaluator, observer=observer), blocks)

    def __call__(self, inputs: Sequence[Any]) -> Given:
        """Run it without gradients."""
        with torch.no_grad():
            return self.run(inputs)


class FunctionTeacher:
    """A function of the inputs; of what it returns, the first floating-point tensor counts."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, inputs: Sequence[Any]) -> Given:
        """Call it without gradients."""
        with torch.no_grad():
            found = [leaf.detach() for leaf in pytree.tree_leaves(self.function(*inputs)) if isinstance(leaf, Tensor)]
        return Given(found, [])


def block_names(graph: Graph, wanted: Sequence[str] | None) -> list[str]:
    """The nodes whose values are outputs of blocks: residual sums, or those that are named.

    Raises:
        UnknownName: there is no such node.
    """
    if wanted is None:
        return [view.node.name for view in residuals(graph) if isinstance(view, ResidualBlock)]
    if isinstance(wanted, str):
        raise InvalidOption(f"blocks={wanted!r}; expected a list of names of nodes")
    found = []
    for name in wanted:
        node = graph.find(name)
        if node is None or node.op != "call_function":
            raise unknown("node (of blocks=)", name, map(label, graph.calls()))
        found.append(node.name)
    return found


def paired_blocks(student: Graph, teacher: Graph, wanted: Sequence[str] | None) -> list[tuple[str, str]] | str:
    """(node of the student, node of the teacher) per block, by name or else by order; or why there are none."""
    names = block_names(student, wanted)
    if _is_rearranged(student) and not _is_rearranged(teacher):
        return "the channels of the model were rearranged; give the dense model with the same order as teacher"
    if not names:
        return "the model has no residual blocks; name the nodes to compare with blocks="
    if all(teacher.find(name) is not None for name in names):
        return [(name, found.name) for name in names if (found := teacher.find(name)) is not None]
    if wanted is not None:
        missing = next(name for name in names if teacher.find(name) is None)
        return f"the teacher has no node {missing!r}"
    others = block_names(teacher, None)
    if len(others) != len(names):
        return f"the model has {len(names)} residual blocks and the teacher {len(others)}"
    return list(zip(names, others, strict=True))


def _is_rearranged(graph: Graph) -> bool:
    """Whether its channels were put into another order, as far as the graph tells (a file does not)."""
    return any(_REARRANGES in provenance(node) for node in graph.fx.find_nodes(op="get_attr"))
