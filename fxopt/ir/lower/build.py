"""An exported program as a `Graph` of torch origin, with the names and the provenance of the ONNX graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxopt.ir.exported import drop_checks, is_same_value
from fxopt.ir.graph import Dim, Graph, ValueSpec, set_attribute
from fxopt.ir.lower.trace import KEY, SEPARATOR, Traced


def built(
    source: Graph,
    inputs: tuple[ValueSpec, ...],
    traced: Traced,
    exported: ExportedProgram,
    axes: Sequence[Mapping[int, Any]],
    names: Mapping[str, str],
) -> Graph:
    """The graph of the program.

    Args:
        inputs: the signature of `source` with a name for every dynamic dimension.
        axes: the dynamic axes of each input.
        names: the graph's name of each `Dim`.
    """
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    drop_checks(module.graph)
    dynamic = [{axis: names[dim.__name__] for axis, dim in found.items()} for found in axes]
    return _Builder(source, inputs, traced, module, dynamic).graph()


class _Builder:
    def __init__(
        self,
        source: Graph,
        inputs: tuple[ValueSpec, ...],
        traced: Traced,
        module: fx.GraphModule,
        dynamic: Sequence[Mapping[int, str]],
    ) -> None:
        self.source = source
        self.inputs = inputs
        self.module = module
        self.dynamic = dynamic  # the name of each dynamic axis
        self.fx = fx.Graph()
        self.root = torch.nn.Module()
        self.nodes: dict[fx.Node, fx.Node] = {}
        self.symbols: dict[str, str] = {}  # symbolic size as text -> name of the dimension
        self.prefixes = tuple(f"roots.{index}." for index in range(len(traced.roots)))

    def graph(self) -> Graph:
        inputs: list[ValueSpec] = []
        results: tuple[fx.Node, ...] = ()
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.placeholder(node, inputs)
            elif node.op == "get_attr":
                self.nodes[node] = self.constant(node)
            elif node.op == "output":
                results = tuple(self.nodes[item] for item in pytree.tree_leaves(node.args[0]))
            elif is_same_value(node):
                self.nodes[node] = self.nodes[node.args[0]]
            else:
                self.nodes[node] = self.call(node)
        self.fx.output(results)
        outputs = tuple(self.spec(spec.name, node) for spec, node in zip(self.source.outputs, results, strict=True))
        used = {dim for spec in inputs for dim in spec.shape or ()}
        sizes = {name: size for name, size in self.source.sizes.items() if name in used}
        return Graph(self.fx, self.root, "torch", tuple(inputs), outputs, self.source.name, sizes=sizes)

    def placeholder(self, node: fx.Node, inputs: list[ValueSpec]) -> None:
        spec = self.inputs[len(inputs)]
        value: torch.Tensor = node.meta["val"]
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                given = self.dynamic[len(inputs)].get(axis, f"{spec.name}_{axis}")
                self.symbols.setdefault(str(size.node.expr), given)
        made = self.fx.placeholder(self.source.placeholders[len(inputs)].name)
        made.meta = {"val": value, "provenance": (spec.name,)}
        self.nodes[node] = made
        inputs.append(self.spec(spec.name, made))

    def constant(self, node: fx.Node) -> fx.Node:
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        name = str(node.target)
        name = next((name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix)), name)
        name = name.replace(".", "_")
        while hasattr(self.root, name):
            name += "_"
        set_attribute(self.root, name, value.detach() if isinstance(value, torch.Tensor) else value)
        made = self.fx.create_node("get_attr", name, name=name)
        made.meta = {"provenance": (name.removeprefix("c_"),)}
        if isinstance(node.meta.get("val"), torch.Tensor):
            made.meta["val"] = node.meta["val"].detach()
        return made

    def call(self, node: fx.Node) -> fx.Node:
        made = self.fx.node_copy(node, self.nodes.__getitem__)
        made.meta = {key: value for key, value in node.meta.items() if key == "val"}
        origin = (node.meta.get("custom") or {}).get(KEY)
        around = next((used.meta["provenance"] for used in made.all_input_nodes), (made.name,))  # of a size: its tensor
        made.meta["provenance"] = tuple(origin.split(SEPARATOR)) if origin else around
        return made

    def spec(self, name: str, node: fx.Node) -> ValueSpec:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return ValueSpec(name, None, None)
        return ValueSpec(name, value.dtype, tuple(map(self.dim, value.shape)))

    def dim(self, size: Any) -> Dim:
        if isinstance(size, int):
            return size
        text = str(size.node.expr)
        if re.search(r"\bu\d+\b", text):
            return None  # it depends on data
        return self.symbols.get(text) or re.sub(r"\bs\d+\b", lambda found: self.symbols.get(found[0], found[0]), text)
