"""The `@graph(...)` line of a text, and what its readers share (`fxopt.ir.text`)."""

from __future__ import annotations

import ast
from typing import Any

import torch

from fxopt.errors import GraphSyntaxError
from fxopt.ir.graph import Graph, ValueSpec
from fxopt.ir.structural_hash import expression, quoted


def refused(node: ast.AST, message: str) -> GraphSyntaxError:
    """The error of a text, with its line."""
    return GraphSyntaxError(f"line {getattr(node, 'lineno', 1)}: {message}")


def shown(node: ast.AST) -> str:
    """The beginning of an expression."""
    return f"{ast.unparse(node).splitlines()[0]:.80}"


def dotted(node: ast.expr) -> str:
    """`a.b.c` as text; "" for another expression."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def torch_constant(dotted: str) -> Any:
    """The object that `torch.name` spells; None for another text."""
    prefix, _, name = dotted.rpartition(".")
    return getattr(torch, name, None) if prefix == "torch" else None


def header_text(graph: Graph, at: str = "") -> list[str]:
    """The keywords of `@graph(...)`, one per line."""
    options = [f"origin={quoted(graph.origin)}"]
    for key, specs in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        options.append(f"{key}={expression(list(map(_spec_entry, specs)), {})}")
    if graph.name != "main":
        options.append(f"name={quoted(graph.name)}")
    if graph.sizes:
        options.append(f"sizes={expression(graph.sizes, {})}")
    found = {node.name: str(node.meta["sparsity"]) for node in graph.nodes if "sparsity" in node.meta}
    if found:
        options.append(f"sparsity={expression(found, {})}")
    if graph.captures:
        options.append(f"captures={expression(list(graph.captures), {})}")
    if at:
        options.append(f"at={quoted(at)}")
    return options


def _spec_entry(spec: ValueSpec) -> tuple[Any, ...]:
    dtype = None if spec.dtype is None else str(spec.dtype).removeprefix("torch.")
    return spec.name, dtype, None if spec.shape is None else list(spec.shape)


def read_header(node: ast.Call) -> dict[str, Any]:
    """The keywords of `@graph(...)`, as arguments of `Graph`."""
    given: dict[str, Any] = {"name": "main"}
    for item in node.keywords:
        try:
            given[item.arg or "**"] = ast.literal_eval(item.value)
        except (ValueError, TypeError) as error:
            raise refused(item, f"{item.arg}: {shown(item.value)!r} is not a literal") from error
    wanted = {"origin", "inputs", "outputs", "name"}
    if dotted(node.func) != "graph" or node.args or set(given) - {"sizes", "sparsity", "captures", "at"} != wanted:
        raise refused(node, f"expected @graph(origin, inputs, outputs, name, sizes), got {sorted(given)}")
    sizes = given.get("sizes", {})
    if not isinstance(sizes, dict) or any((type(name), type(size)) != (str, int) for name, size in sizes.items()):
        raise refused(node, f"sizes is {sizes!r}, expected the size of each named dimension")
    if given["origin"] not in ("torch", "onnx") or not isinstance(given["name"], str):
        raise refused(node, f"origin is {given['origin']!r}, expected 'torch' or 'onnx'; name is {given['name']!r}")
    found = given.get("sparsity", {})
    if not isinstance(found, dict) or any((type(name), type(mark)) != (str, str) for name, mark in found.items()):
        raise refused(node, f"sparsity is {found!r}, expected the mark of each node, a text")
    captures = given.get("captures", [])
    if not isinstance(captures, list) or not all(type(name) is str for name in [*captures, given.get("at", "")]):
        raise refused(node, f"captures is {captures!r}, expected a list of names; `at` is a text")
    if "captures" in given:
        given["captures"] = tuple(captures)
    try:
        for key in ("inputs", "outputs"):
            given[key] = tuple(map(read_spec, given[key] if isinstance(given[key], list) else [given[key]]))
    except (ValueError, TypeError, LookupError, NotImplementedError) as error:
        raise refused(node, f"{error}") from error
    return given


def read_spec(entry: Any) -> ValueSpec:
    """An input or output from `(name, dtype, shape)`.

    Raises:
        ValueError: the entry has another form.
    """
    if not isinstance(entry, tuple) or len(entry) != 3 or not isinstance(entry[0], str):
        raise ValueError(f"{entry!r} is not (name, dtype, shape)")
    name, dtype_name, shape = entry
    dtype = None if dtype_name is None else torch_constant(f"torch.{dtype_name}")
    if dtype_name is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r}: {dtype_name!r} is not a dtype of torch")
    if shape is not None and not isinstance(shape, list):
        raise ValueError(f"{name!r}: the shape {shape!r} is neither a list nor None")
    wrong = [dim for dim in shape or () if dim is not None and type(dim) not in (int, str)]
    if wrong:
        raise ValueError(f"{name!r}: the dimension {wrong[0]!r} is not a number, a name or None")
    return ValueSpec(name, dtype, None if shape is None else tuple(shape))
