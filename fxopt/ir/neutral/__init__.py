"""Neutral operators: one name and one list of arguments for what both dialects spell in their own ways.

`read(graph, node, "transpose")` gives the arguments that `Builder.transpose` would take to make the node, or None when
the node is something else. Nodes stay nodes; shapes, axes and permutations are tuples of integers (of nodes where torch
computes them), numbers and element types are Python values. What is known only at run time stays the node that computes
it. Axes count from 0 where the rank is known. A new spelling is one reader in one of the files of this folder.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

from torch import fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph
from fxopt.ir.neutral import convolutions, elementwise, passing, reductions, shapes
from fxopt.ir.neutral.readers import Arguments, Reader, key_of, normal_axes

__all__ = ["AXES", "COMMUTATIVE", "COMPOSED", "names_of", "normal_axes", "operators", "parameters", "read"]

COMMUTATIVE = frozenset({"add", "mul", "maximum", "minimum"})
AXES = frozenset({"axis", "axes"})  # parameters that count axes of the first argument (of the result in `unsqueeze`)
COMPOSED = {"onnx": {"rsqrt": ("reciprocal", "sqrt")}}  # what an origin spells with several operators, outermost first
_READ_ONLY = {  # the builder does not make them
    "pad": ("x", "pads"),  # begins of all axes, then ends
    "convolution": ("x", "weight", "bias", "groups", "transposed"),
    "batch_norm": ("x", "weight", "bias", "mean", "variance", "epsilon", "training"),
}


@cache
def _table() -> dict[Any, dict[str, Reader]]:
    """The readers of all files, by target and name."""
    merged: dict[Any, dict[str, Reader]] = {}
    for module in (convolutions, elementwise, passing, shapes, reductions):
        for target, readers in module.readers.table.items():
            merged.setdefault(target, {}).update(readers)
    return merged


@cache
def operators() -> frozenset[str]:
    """The names of all neutral operators."""
    return frozenset(name for readers in _table().values() for name in readers)


@cache
def parameters(name: str) -> inspect.Signature:
    """The parameters of a neutral operator: those of the builder's method."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if name in _READ_ONLY:
        return inspect.Signature([inspect.Parameter(each, kind) for each in _READ_ONLY[name]])
    signature = inspect.signature(getattr(Builder, name))
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def names_of(node: fx.Node) -> tuple[str, ...]:
    """The neutral operators that the node may be, by its target alone."""
    return tuple(_table().get(key_of(node), ())) if node.op == "call_function" else ()


def read(graph: Graph, node: object, name: str) -> Arguments | None:
    """The arguments of the neutral operator `name` that `node` computes; None when it computes something else."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    reader = _table().get(key_of(node), {}).get(name)
    return None if reader is None else reader(graph, node)
