"""`CallSpec`: between a module's own call convention and the flat tensors of a graph."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.errors import InvalidInput


@dataclass(frozen=True)
class CallSpec:
    """How a captured `forward` is called: `flatten` its arguments, `unflatten` the graph's results."""

    signature: inspect.Signature
    arguments: pytree.TreeSpec  # of {argument name: value}, defaults included
    constants: Mapping[int, Any]  # position among the leaves -> the value that the capture fixed
    result: pytree.TreeSpec
    result_constants: Mapping[int, Any]

    def flatten(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> list[torch.Tensor]:
        """The graph's inputs from a call's arguments; those that the capture fixed may be left out.

        Raises:
            InvalidInput: the arguments do not fit the signature, their structure or the values fixed by the capture.
        """
        try:
            binding = self.signature.bind(*args, **(kwargs or {}))
            binding.arguments = {**self._fixed(), **binding.arguments}
            binding.apply_defaults()
            leaves = self.arguments.flatten_up_to(dict(binding.arguments))
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"the arguments do not fit the captured call {self.signature}: {error}") from error
        tensors = []
        for index, (name, leaf) in enumerate(zip(leaf_names(self.arguments, self.signature), leaves, strict=True)):
            if index in self.constants:
                _check_constant(name, leaf, self.constants[index])
            elif isinstance(leaf, torch.Tensor):
                tensors.append(leaf)
            else:
                raise InvalidInput(
                    f"argument {name!r} is a {type(leaf).__name__}; the model was captured with a tensor"
                )
        return tensors

    def _fixed(self) -> dict[str, Any]:
        """The arguments that hold no tensor, with the values that the capture fixed."""
        found: dict[str, Any] = {}
        first = 0
        for name, child in zip(self.arguments.context, self.arguments.children(), strict=True):
            positions = range(first, first + child.num_leaves)
            first += child.num_leaves
            if all(position in self.constants for position in positions):
                found[name] = pytree.tree_unflatten([self.constants[position] for position in positions], child)
        return found

    def unflatten(self, values: Sequence[Any]) -> Any:
        """What `forward` returns, from the graph's results."""
        found = iter(values)
        count = self.result.num_leaves
        leaves = [self.result_constants[i] if i in self.result_constants else next(found) for i in range(count)]
        return pytree.tree_unflatten(leaves, self.result)

    def to_json(self) -> dict[str, Any] | None:
        """Plain data, or None when a default or a fixed argument is not plain."""
        parameters = [
            [name, item.kind.name, [] if item.default is inspect.Parameter.empty else [item.default]]
            for name, item in self.signature.parameters.items()
        ]
        data: dict[str, Any] = {
            "parameters": parameters,
            "constants": [list(item) for item in self.constants.items()],
            "result_constants": [list(item) for item in self.result_constants.items()],
        }
        try:
            data["arguments"] = pytree.treespec_dumps(self.arguments)
            data["result"] = pytree.treespec_dumps(self.result)
            plain = json.loads(json.dumps(data, allow_nan=False)) == data
        except (TypeError, ValueError, NotImplementedError):
            return None
        return data if plain else None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CallSpec:
        """The inverse of `to_json`."""
        kinds = inspect._ParameterKind
        parameters = [
            inspect.Parameter(name, kinds[kind], default=default[0] if default else inspect.Parameter.empty)
            for name, kind, default in data["parameters"]
        ]
        return cls(
            inspect.Signature(parameters),
            pytree.treespec_loads(data["arguments"]),
            dict(data["constants"]),
            pytree.treespec_loads(data["result"]),
            dict(data["result_constants"]),
        )

    def input_names(self) -> list[str]:
        """One name per graph input: the argument's, with keys and indices of nested ones: `past_0_key`."""
        names = leaf_names(self.arguments, self.signature)
        return [name for index, name in enumerate(names) if index not in self.constants]

    def output_names(self) -> list[str]:
        """One name per graph output: keys and indices of the result; "output" when it has none."""
        names = [name for i, name in enumerate(_paths(self.result, "")) if i not in self.result_constants]
        if len(names) == 1 and not names[0].strip("0123456789_"):
            return ["output"]
        return [f"output_{name}" if name[:1].isdigit() else name for name in names]


def bound(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """{argument name: value} of a call, defaults included."""
    binding = signature.bind(*args, **kwargs)
    binding.apply_defaults()
    return dict(binding.arguments)


def leaf_names(spec: pytree.TreeSpec, signature: inspect.Signature) -> list[str]:
    """A name for every leaf of {argument name: value}; keyword extras (`**kwargs`) go without the catch-all's name."""
    names: list[str] = []
    for argument, child in zip(spec.context, spec.children(), strict=True):
        extra = signature.parameters[argument].kind is inspect.Parameter.VAR_KEYWORD
        names += _paths(child, "" if extra else argument)
    return names


def _paths(spec: pytree.TreeSpec, prefix: str) -> Iterator[str]:
    if spec.is_leaf():
        yield prefix
        return
    children = spec.children()
    for key, child in zip(_keys(spec, len(children)), children, strict=True):
        yield from _paths(child, f"{prefix}_{key}" if prefix else key)


def _keys(spec: pytree.TreeSpec, count: int) -> list[str]:
    """Keys of a container's children, indices where it has none."""
    fields = getattr(spec.context, "_fields", None) or getattr(spec.type, "_fields", None)
    keys = fields if fields is not None else spec.context
    if isinstance(keys, (list, tuple)) and len(keys) == count and all(isinstance(key, (str, int)) for key in keys):
        return [str(key) for key in keys]
    return [str(index) for index in range(count)]


def _check_constant(name: str, value: Any, captured: Any) -> None:
    if value is captured:
        return
    if type(value) is type(captured) and not isinstance(value, torch.Tensor) and value == captured:
        return
    shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    raise InvalidInput(f"argument {name!r} is {shown}; the model was captured with {captured!r}: capture it again")
