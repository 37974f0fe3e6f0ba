"""Which dimensions of the inputs are dynamic, and what the user calls them.

`dynamic_shapes` is what `torch.export` takes, {argument: {axis: Dim}}, with a name allowed wherever a `Dim` is
("batch"; equal names are equal sizes) and arguments left out that have none; "auto" lets torch find out.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxopt.errors import InvalidInput, unknown

AUTO = "auto"
Axes = dict[int, Any]  # axis -> Dim, or a hint such as Dim.DYNAMIC


@dataclass
class Dimensions:
    """One entry per flat tensor input."""

    names: list[str]
    axes: list[Axes]
    text_to_name: dict[str, str] = field(default_factory=dict)  # symbolic size as text -> the user's name for it

    def specification(self) -> list[Axes | None]:
        """The flat form for `torch.export`."""
        return [axes or None for axes in self.axes]

    def learn(self, values: Sequence[Any]) -> None:
        """Take the symbols of the traced inputs; anonymous dynamic dimensions are called `<input>_<axis>`."""
        for axes, value in zip(self.axes, values, strict=True):
            for axis, dim in axes.items():
                if isinstance(dim, Dim) and isinstance(value.shape[axis], torch.SymInt):
                    self.text_to_name[str(value.shape[axis].node.expr)] = dim.__name__
        for name, value in zip(self.names, values, strict=True):
            for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt):
                    self.text_to_name.setdefault(str(size.node.expr), f"{name}_{axis}")

    def name_of(self, size: Any) -> int | str:
        """A size as a number, the name of a dimension, or an expression of names."""
        if isinstance(size, int):
            return size
        return self.named(str(size.node.expr))

    def named(self, text: str) -> str:
        """A symbolic size, given as text, in the user's names."""
        known = self.text_to_name
        return known.get(text) or re.sub(r"\bs\d+\b", lambda match: known.get(match[0], match[0]), text)


def read(
    dynamic_shapes: Any, arguments: Mapping[str, Any], signature: inspect.Signature, names: list[str]
) -> Dimensions:
    """The dynamic axes of every tensor among `arguments` ({argument name: value}), in order.

    Raises:
        InvalidInput: an axis does not exist, or equal names have different sizes.
        UnknownName: an argument does not exist.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(dict(arguments)) if isinstance(leaf, torch.Tensor)]
    if dynamic_shapes is None:
        return Dimensions(names, [{} for _ in tensors])
    if isinstance(dynamic_shapes, str):
        if dynamic_shapes != AUTO:
            raise InvalidInput(f'dynamic_shapes={dynamic_shapes!r}: expected "auto" or {{argument: {{axis: "batch"}}}}')
        return Dimensions(names, [dict.fromkeys(range(tensor.dim()), Dim.AUTO) for tensor in tensors])
    given = _by_argument(dynamic_shapes, arguments, signature)
    specs = [spec for key, value in arguments.items() for spec in _leaves(value, given.get(key), key)]
    dims = {dim.__name__: dim for _, spec in specs for dim in _entries(spec).values() if isinstance(dim, Dim)}
    axes = [_axes(name, tensor, spec, dims) for name, (tensor, spec) in zip(names, specs, strict=True)]
    _check_equal_sizes(names, tensors, axes)
    return Dimensions(names, axes)


def _by_argument(given: Any, arguments: Mapping[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    if isinstance(given, Mapping):
        extra = next((p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
        named = {key: value for key, value in given.items() if key in arguments}
        rest = {key: value for key, value in given.items() if key not in arguments}
        if extra is not None and rest and set(rest) <= set(arguments[extra]):
            return {**named, extra: {**named.get(extra, {}), **rest}}
        if rest:
            raise unknown("argument in dynamic_shapes:", next(iter(rest)), arguments)
        return named
    if isinstance(given, (tuple, list)) and len(given) <= len(arguments):
        return dict(zip(arguments, given, strict=False))
    raise InvalidInput(f"dynamic_shapes={given!r}: expected {{argument: {{axis: name}}}} for {', '.join(arguments)}")


def _leaves(value: Any, spec: Any, where: str) -> Iterator[tuple[torch.Tensor, Any]]:
    """(tensor, its part of `spec`) for every tensor in `value`."""
    if isinstance(value, torch.Tensor):
        yield value, spec
        return
    children, structure = pytree.tree_flatten(value, is_leaf=lambda item: item is not value)
    if structure.is_leaf():
        return
    if spec is None:
        specs: list[Any] = [None] * len(children)
    elif isinstance(spec, Mapping) and isinstance(value, Mapping):
        specs = [spec.get(key) for key in value]
    else:
        specs = list(spec.values()) if isinstance(spec, Mapping) else list(spec)
    if len(specs) != len(children):
        raise InvalidInput(f"dynamic_shapes of {where!r}: {spec!r} has {len(specs)} entries for {len(children)} values")
    for child, part in zip(children, specs, strict=True):
        yield from _leaves(child, part, where)


def _entries(spec: Any) -> dict[Any, Any]:
    if isinstance(spec, Mapping):
        return dict(spec)
    return dict(enumerate(spec)) if isinstance(spec, (tuple, list)) else {}


def _axes(name: str, tensor: torch.Tensor, spec: Any, dims: dict[str, Any]) -> Axes:
    found: Axes = {}
    for axis, dim in _entries(spec).items():
        if not isinstance(axis, int) or not -tensor.dim() <= axis < tensor.dim():
            raise InvalidInput(
                f"dynamic_shapes of {name!r}: no axis {axis!r} in a tensor of shape {list(tensor.shape)}"
            )
        if isinstance(dim, str):
            if not dim.isidentifier():
                raise InvalidInput(
                    f"dynamic_shapes of {name!r}: {dim!r} is not a name for a dimension, such as 'batch'"
                )
            dim = dims.setdefault(dim, Dim(dim))
        if isinstance(dim, int) and dim != tensor.shape[axis]:
            raise InvalidInput(f"dynamic_shapes of {name!r}: axis {axis} is {tensor.shape[axis]}, not {dim}")
        if dim is not None and not isinstance(dim, int) and dim is not Dim.STATIC:
            found[axis % tensor.dim()] = dim
    return found


def _check_equal_sizes(names: list[str], tensors: list[torch.Tensor], axes: list[Axes]) -> None:
    seen: dict[str, tuple[int, str]] = {}
    for name, tensor, found in zip(names, tensors, axes, strict=True):
        for axis, dim in found.items():
            if not isinstance(dim, Dim):
                continue
            size, first = seen.setdefault(dim.__name__, (tensor.shape[axis], name))
            if size != tensor.shape[axis]:
                raise InvalidInput(
                    f"dimension {dim.__name__!r} is {size} in {first!r} and {tensor.shape[axis]} in {name!r}"
                )


def enlarge(tensors: Sequence[torch.Tensor], dimensions: Dimensions) -> list[torch.Tensor]:
    """Examples whose named dynamic dimensions are at least 2: torch would take a size of 1 for a constant.

    The tensors are new objects (`torch.export` leaves marks on those that it is given), and dense: the strides of a
    slice of something larger would become conditions on sizes.
    """
    found = []
    for tensor, axes in zip(tensors, dimensions.axes, strict=True):
        fresh = _dense(tensor.detach())
        for axis, dim in axes.items():
            named = type(dim) is Dim or getattr(getattr(dim, "type", None), "name", "") == "DYNAMIC"
            if named and fresh.shape[axis] == 1:
                fresh = fresh.repeat_interleave(2, axis)
        found.append(fresh)
    return found


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if last else tensor.contiguous()
