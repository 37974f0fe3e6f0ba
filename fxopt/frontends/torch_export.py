"""PyTorch modules and `ExportedProgram`s as graphs of functional aten operators (`linear`, `conv2d`, ... stay whole).

`torch.export(strict=False)`, then `run_decompositions({})`, which removes in-place operators and grad-mode regions but
keeps every operator that a pass thinks in. Weights become constants that share the module's memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError
from fxopt.frontends.capture.failures import source_line
from fxopt.frontends.capture.program import Examples, Program, export
from fxopt.ir.exported import drop_checks, is_same_value
from fxopt.ir.graph import Graph, ValueSpec


def load(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Examples = None,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Graph:
    """Capture `model` on example inputs; the module is left as it was, and its weights are shared.

    Args:
        example_inputs: positional arguments (a tuple), named ones (a dict), or one tensor.
        dynamic_shapes: {argument: {axis: "batch"}} with names or `torch.export.Dim`s, or "auto"; None: all fixed.
        kwargs: named arguments beside positional ones.

    Raises:
        CaptureError: torch cannot trace the model, or it changes buffers or inputs.
        InvalidInput: the examples or `dynamic_shapes` do not fit the model's `forward`.
    """
    return graph_of(export(model, example_inputs, dynamic_shapes, kwargs), type(model).__name__)


def graph_of(program: Program, name: str = "main") -> Graph:
    """The graph of a captured program."""
    module = program.exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return _Builder(program, module).graph(name)


class _Builder:
    def __init__(self, program: Program, module: fx.GraphModule) -> None:
        self.program = program
        self.source = module
        self.fx = fx.Graph()
        self.root = torch.nn.Module()
        self.nodes: dict[fx.Node, Any] = {}
        self.constants: dict[Any, fx.Node] = {}  # one node per storage and view: tied weights are one constant

    def graph(self, name: str) -> Graph:
        drop_checks(self.source.graph)
        inputs: list[ValueSpec] = []
        results: tuple[Any, ...] = ()
        for node in self.source.graph.nodes:
            if node.op == "placeholder":
                self.placeholder(node, inputs)
            elif node.op == "get_attr":
                self.nodes[node] = self.constant(node)
            elif node.op == "output":
                results = self.results(node)
            else:
                self.nodes[node] = self.call(node)
        self.fx.output(results)
        outputs = tuple(map(self.spec, self.program.outputs, results))
        call, sizes = self.program.call, dict(self.program.sizes)
        return Graph(self.fx, self.root, "torch", tuple(inputs), outputs, name, call_spec=call, sizes=sizes)

    def placeholder(self, node: fx.Node, inputs: list[ValueSpec]) -> None:
        if not isinstance(node.meta.get("val"), (torch.Tensor, torch.SymInt)):
            return  # a constant argument: the code that uses it has its value
        name = self.program.inputs[len(inputs)]
        made = self.fx.placeholder(name)
        made.meta = {"val": node.meta["val"], "provenance": (name,)}
        self.nodes[node] = made
        inputs.append(self.spec(name, made))

    def constant(self, node: fx.Node) -> fx.Node:
        value: Any = self.source
        for part in str(node.target).split("."):
            value = getattr(value, part)
        name = str(node.target).removeprefix(self.program.prefix)
        key = _identity(value)
        if key in self.constants:
            return self.constants[key]
        _set_attribute(self.root, name, value.detach() if isinstance(value, torch.Tensor) else value)
        made = self.fx.create_node("get_attr", name, name=name.replace(".", "_"))
        made.meta = {"provenance": (name,)}
        if isinstance(node.meta.get("val"), torch.Tensor):
            made.meta["val"] = node.meta["val"].detach()
        self.constants[key] = made
        return made

    def call(self, node: fx.Node) -> fx.Node:
        if node.op != "call_function":
            raise CaptureError(f"the exported program calls {node.op} {node.target}; export it without unflattening")
        if is_same_value(node):
            source: fx.Node = self.nodes[node.args[0]]  # type: ignore[index]
            return source
        made = self.fx.node_copy(node, self.nodes.__getitem__)
        made.meta = {key: value for key, value in node.meta.items() if key in ("val", "stack_trace")}
        stack = {
            key: (f"{path}.".removeprefix(self.program.prefix).removesuffix("."), kind)
            for key, (path, kind) in node.meta.get("nn_module_stack", {}).items()
            if f"{path}.".startswith(self.program.prefix)
        }
        if stack:
            made.meta["nn_module_stack"] = stack
        made.meta["provenance"] = (origin(made),)
        return made

    def results(self, node: fx.Node) -> tuple[Any, ...]:
        leaves = pytree.tree_leaves(node.args[0])
        return tuple(self.nodes[leaf] for leaf in leaves if isinstance(leaf, fx.Node))

    def spec(self, name: str, node: Any) -> ValueSpec:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return ValueSpec(name, torch.int64 if isinstance(value, torch.SymInt) else None, ())
        return ValueSpec(name, value.dtype, tuple(map(self.program.dimensions.name_of, value.shape)))


def origin(node: fx.Node) -> str:
    """Where a node came from: the path of the module that called it, else the user's source line, else its name."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(list(stack.values()))), "")
    if path and not path.startswith("_empty_nn_module_stack"):
        return re.sub(r"@\d+$", "", path)
    line = source_line(node.meta.get("stack_trace"))
    return Path(line).name if line else node.name


def _identity(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return id(value)
    return value.data_ptr(), tuple(value.shape), value.stride(), value.dtype, value.device


def _set_attribute(root: torch.nn.Module, name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, torch.nn.Module())
        root = root.get_submodule(part)
    if isinstance(value, torch.Tensor):
        root.register_buffer(last, value)
    else:
        setattr(root, last, value)


__all__ = ["graph_of", "load", "origin"]
