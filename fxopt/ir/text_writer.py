"""Write the text form of a graph (`fxopt.ir.text`)."""

from __future__ import annotations

import base64
import keyword
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx as onnx_package
import torch
from torch import fx

from fxopt.errors import Unsupported
from fxopt.ir.graph import Dim, Graph, Opaque, label
from fxopt.ir.structural_hash import expression, quoted, target_text
from fxopt.ir.text_header import header_text
from fxopt.ir.text_parser import BODY_NAME, HELPERS


def to_text(graph: Graph, *, title: str = "") -> str:
    """The graph as a Python file; linear in its size. Constants are named, not written: see `constants_of`.

    Raises:
        Unsupported: an operator, argument or constant has no text form; the message names the node.
    """
    about = ", ".join(filter(None, [f"fxopt graph {graph.name!r}", f"origin {graph.origin}", title]))
    functions = _Functions()
    functions.add(graph, "main", "")
    more = "attribute, " if any("attribute(" in line for line in functions.lines[1:]) else ""
    after = ", subgraph" if functions.count else ""
    return "\n".join([
        f'"""{_printable(about).translate(_PLAIN)}."""',
        "import math",
        "import operator",
        "",
        "import torch",
        "",
        f"from fxopt.ir.text import {more}const, graph, onnx, opaque, ops, overload, run_file{after}",
        "",
        "",
        *functions.lines,
        'if __name__ == "__main__":',
        "    run_file(main, __file__)",
        "",
    ])  # fmt: skip


class _Functions:
    """The functions of a text: bodies (`body_1`, `body_2`, ...) come before what holds them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def add(self, graph: Graph, name: str, at: str) -> None:
        """Append a graph as the function `name`; `at` is what the names of its constants begin with."""
        bodies: dict[str, str] = {}
        for target, body in bodies_of(graph).items():
            self.count += 1
            bodies[target] = f"body_{self.count}"
            self.add(body, bodies[target], f"{at}{target}.")
        names = _variables(graph)
        annotated = {
            node: f"{variable}: {quoted(node.name)}" if variable != node.name else variable
            for node, variable in names.items()
        }
        dims = DimNames(graph)
        self.lines += ["@graph(", *[f"    {option}," for option in header_text(graph, at)], ")"]
        self.lines.append(f"def {name}({', '.join([annotated[node] for node in graph.placeholders])}):")
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            try:
                line = f"    {annotated[node]} = {_right_side(graph, node, names, bodies, at)}"
            except Unsupported as error:
                raise Unsupported(f"node {node.name!r}: {error}") from error
            comment = _comment(graph, node, dims)
            self.lines.append(f"{line:<70}  # {comment}" if comment else line)
        self.lines += [f"    return {expression(graph.result_nodes, names)}", "", ""]


def bodies_of(graph: Graph) -> dict[str, Graph]:
    """The graphs that the constants of a graph are, by the constants' names."""
    targets = dict.fromkeys(str(node.target) for node in graph.fx.find_nodes(op="get_attr"))
    held = {target: graph.attribute(target) for target in targets}
    return {target: value for target, value in held.items() if isinstance(value, Graph)}


_PLAIN = str.maketrans('"\\', "'/")


def _printable(text: str) -> str:
    return "".join([char if char.isprintable() else "?" for char in text])


def _variables(graph: Graph) -> dict[fx.Node, str]:
    """A legal and unique variable for each node: its name where that is one."""
    taken = {node.name for node in graph.nodes} | HELPERS
    names: dict[fx.Node, str] = {}
    for node in graph.nodes:
        name = node.name
        taken_name = name in HELPERS or BODY_NAME.fullmatch(name) is not None
        if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name) or taken_name:
            name = "".join([char if char.isascii() and char.isalnum() else "_" for char in f"{name}_"])
            name = f"_{name}" if name[0].isdigit() else name
            while name in taken:
                name += "_"
            taken.add(name)
        names[node] = name
    return names


def _right_side(graph: Graph, node: fx.Node, names: Mapping[fx.Node, str], bodies: Mapping[str, str], at: str) -> str:
    if node.op == "get_attr":
        target = str(node.target)
        if target in bodies:
            return f"subgraph({quoted(target)}, {bodies[target]})"
        return _constant(graph, target, at)
    if node.op != "call_function":
        raise Unsupported(f"{node.op} has no text form")
    target = target_text(node.target)
    args = [expression(value, names) for value in node.args]
    if target == "operator.getitem" and isinstance(node.args[0], fx.Node) and type(node.args[1]) is int:
        return f"{args[0]}[{args[1]}]"
    if all(key.isidentifier() and key.isascii() and not keyword.iskeyword(key) for key in node.kwargs):
        args += [f"{key}={expression(value, names)}" for key, value in node.kwargs.items()]
    else:
        args.append(f"**{expression(dict(node.kwargs), names)}")
    return f"{target}({', '.join(args)})"


def _constant(graph: Graph, target: str, at: str) -> str:
    value = graph.attribute(target)
    target = f"{at}{target}"
    if isinstance(value, torch.Tensor):
        return f"const({quoted(target)})"
    if isinstance(value, np.ndarray):
        return f"const({quoted(target)}, host=True)"
    kind = type(getattr(value, "proto", None))
    if not isinstance(value, Opaque) or getattr(onnx_package, kind.__name__, None) is not kind:
        raise Unsupported(f"constant {target!r} is a {type(value).__name__}, which has no text form")
    content = base64.b64encode(value.proto.SerializeToString(deterministic=True)).decode()
    return f'opaque({quoted(target)}, "{kind.__name__}", "{content}")'


def _comment(graph: Graph, node: fx.Node, dims: DimNames) -> str:
    """Type and origin of a value: `float32[batch, 10]   /fc/MatMul > fuse-rms-norm`."""
    value = graph.attribute(str(node.target)) if node.op == "get_attr" else node.meta.get("val")
    kind = type_text(value, dims.of(node) if isinstance(node.meta.get("val"), torch.Tensor) else None)
    origins: tuple[str, ...] = node.meta.get("provenance") or (label(node),)
    origin = " > ".join(origins) if origins != (node.name,) else ""
    return _printable("   ".join(filter(None, [kind, origin])))


def type_text(value: Any, shape: Sequence[Any] | None = None) -> str:
    """The type of a value: `float32[2, 3]`, `(float32[2], int64[])`, a number; "" for others."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        sizes = ", ".join(["?" if size is None else str(size) for size in (value.shape if shape is None else shape)])
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(type_text, value))})"
    return str(value) if isinstance(value, (int, torch.SymInt)) else ""


class DimNames:
    """Which names of the signature the sizes of values have, from the inputs' `meta["val"]` and `meta["probe"]`."""

    def __init__(self, graph: Graph) -> None:
        found: dict[tuple[str, str], set[str]] = {}
        for node, spec in zip(graph.placeholders, graph.inputs, strict=False):
            for key, name in zip(self._keys(node), spec.shape or (), strict=False):
                if isinstance(name, str):
                    found.setdefault(key, set()).add(name)
        self.names = {key: min(names) for key, names in found.items() if len(names) == 1}

    @staticmethod
    def _keys(node: fx.Node) -> list[tuple[str, str]]:
        shape = getattr(node.meta.get("val"), "shape", ())
        probe = getattr(node.meta.get("probe"), "shape", shape)
        return [(str(size), str(other)) for size, other in zip(shape, probe, strict=False)]

    def of(self, node: fx.Node) -> tuple[Dim, ...]:
        """The shape of a tensor: fixed sizes as numbers, dynamic ones by name or symbol, None where it has none."""
        return tuple(map(self._dim, self._keys(node)))

    def _dim(self, key: tuple[str, str]) -> Dim:
        if not key[0].isdigit():
            return self.names.get(key, key[0])
        return int(key[0]) if key[0] == key[1] else self.names.get(key)
