"""Compute equal values once.

Two operators are equal when they call the same target with equal arguments; constants are equal when type, shape and
bytes are. Random and effectful operators, and operators with sub-graphs, are never equal.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.ir.graph import Graph, Opaque
from fxopt.ir.structural_hash import constant_digest, is_plain, tensor_bytes
from fxopt.passes.base import Context, ExactPass
from fxopt.passes.rules.apply import drop_unused
from fxopt.passes.rules.safety import base, is_pure, is_returned, is_view

_SAMPLE_BYTES = 1024  # constants up to this size are compared whole; of larger ones, at first, about so much


@dataclass(frozen=True)
class MergeCommonSubexpressions(ExactPass):
    """Compute equal values once."""

    enters_bodies: ClassVar[bool] = True

    constant_bytes: int = 1024  # equal constants of at least this size are stored once, also without a common operator

    def run(self, graph: Graph, ctx: Context) -> int:
        """One walk in execution order: the first of equal nodes serves the users of all."""
        run = _Run(graph, _contents(graph), self.constant_bytes)
        merged = sum(run.visit(node) for node in list(graph.nodes))
        if merged:
            graph.release_constants()
        return merged


@dataclass
class _Run:
    graph: Graph
    contents: dict[fx.Node, int]
    constant_bytes: int
    first: dict[Hashable, fx.Node] = field(default_factory=dict)
    gone: set[fx.Node] = field(default_factory=set)

    def visit(self, node: fx.Node) -> int:
        """Merge the node into an equal one before it; returns how many nodes went."""
        if node.op == "get_attr":
            return self.constant(node)
        key = self.key(node)
        if key is None:
            return 0
        kept = self.earlier(key, node)
        if kept is None:
            return 0
        constants = [used for used in node.all_input_nodes if used.op == "get_attr"]
        self.graph.replace(node, kept)
        self.gone |= drop_unused(self.graph, constants)
        return 1

    def constant(self, node: fx.Node) -> int:
        """Merge a large constant into an equal one."""
        value = self.graph.constant(node)
        if value is None or not node.users or value.nbytes < max(1, self.constant_bytes) or _is_attribute(node):
            return 0
        kept = self.earlier(("constant", self.contents.get(node, node)), node)
        if kept is None:
            return 0
        self.graph.replace(node, kept)
        return 1

    def earlier(self, key: Hashable, node: fx.Node) -> fx.Node | None:
        """The equal node before this one, unless two results would become one tensor; None when this is the first."""
        kept = self.first.get(key)
        if kept is None or kept in self.gone:
            self.first[key] = node
            return None
        if self.graph.origin != "onnx" and not is_view(node) and is_returned(node) and is_returned(base(kept)):
            return None
        return kept

    def key(self, node: fx.Node) -> Hashable:
        """What equal nodes have in common; None when nothing equals the node."""
        if not is_pure(node):
            return None
        if not node.kwargs and all(isinstance(value, fx.Node) and value.op != "get_attr" for value in node.args):
            return node.target, node.args
        record = node.meta.get("onnx")
        named = tuple(bool(name) for name in getattr(record, "outputs", ())) if "_outputs" in node.kwargs else ()
        try:
            return node.target, self.frozen(node.args), self.frozen(node.kwargs), named
        except _NoKey:
            return None

    def frozen(self, value: Any) -> Hashable:
        """An argument as something hashable that tells 1 from 1.0 and True."""
        if isinstance(value, fx.Node):
            if value.op != "get_attr":
                return value
            if value not in self.contents:
                raise _NoKey
            return "constant", self.contents[value]
        if isinstance(value, (list, tuple)):
            return tuple(self.frozen(item) for item in value)
        if isinstance(value, dict):
            return tuple((name, self.frozen(value[name])) for name in sorted(value))
        if isinstance(value, slice):
            return "slice", self.frozen(value.start), self.frozen(value.stop), self.frozen(value.step)
        if isinstance(value, float):
            return "float", value.hex()
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, torch.SymInt) or getattr(value, "__hash__", None) is None:
            raise _NoKey
        return type(value), value


class _NoKey(Exception):
    """An argument cannot be compared."""


def _is_attribute(node: fx.Node) -> bool:
    """Whether an ONNX file holds the constant in an attribute of its operator."""
    return getattr(node.meta.get("onnx"), "kind", "") == "attribute"


def _contents(graph: Graph) -> dict[fx.Node, int]:
    """A number per constant that is equal exactly for equal constants; many bytes are read only where samples agree."""
    groups: dict[Hashable, list[tuple[fx.Node, Any]]] = {}
    for node in graph.fx.find_nodes(op="get_attr"):
        value = graph.attribute(str(node.target))
        if isinstance(value, torch.Tensor) and is_plain(value):
            groups.setdefault(_sample(value), []).append((node, value))
        elif isinstance(value, Opaque) and type(value.proto).__name__ == "TensorProto":
            groups.setdefault(id(value), []).append((node, value))
    numbers: dict[Hashable, int] = {}
    contents: dict[fx.Node, int] = {}
    for sample, members in groups.items():
        single = members[0][1].nbytes <= _SAMPLE_BYTES if isinstance(members[0][1], torch.Tensor) else True
        single = single or len({id(value) for _, value in members}) == 1
        for node, value in members:
            key = sample if single else (sample, constant_digest(value))
            contents[node] = numbers.setdefault(key, len(numbers))
    return contents


def _sample(value: torch.Tensor) -> Hashable:
    """Type, shape and some bytes: all of them when they are few."""
    flat = value.detach().reshape(-1)
    some = flat[:: max(1, value.nbytes // _SAMPLE_BYTES)] if value.nbytes > _SAMPLE_BYTES else flat
    return value.dtype, tuple(value.shape), str(value.device), tensor_bytes(some).tobytes()
