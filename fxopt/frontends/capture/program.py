"""`export`: a module as an `ExportedProgram` over flat tensors, with the user's names beside it."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError, InvalidInput
from fxopt.frontends.capture.call_spec import CallSpec, bound, leaf_names
from fxopt.frontends.capture.dimensions import Dimensions, enlarge, read
from fxopt.frontends.capture.failures import explain, source_line
from fxopt.ir.lower.quiet import quiet
from fxopt.ir.lower.suggestions import narrowed

Examples = Sequence[Any] | Mapping[str, Any] | torch.Tensor | None
_MUTATIONS = {
    OutputKind.BUFFER_MUTATION: "the buffer",
    OutputKind.PARAMETER_MUTATION: "the parameter",
    OutputKind.USER_INPUT_MUTATION: "its input",
}
PREFIX = "model."  # of module paths in the exported program: the flat wrapper's attribute


@dataclass
class Program:
    """A captured module: flat tensors in, flat tensors out, no in-place operators."""

    exported: ExportedProgram
    call: CallSpec
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dimensions: Dimensions
    examples: tuple[torch.Tensor, ...]  # what it was traced with: named dynamic dimensions are at least 2
    run: Callable[[Sequence[torch.Tensor]], list[Any]]  # the module itself on flat inputs, in evaluation mode
    prefix: str = PREFIX
    sizes: dict[str, int] = field(default_factory=dict)  # of named dimensions in the user's examples


def export(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Examples = None,
    dynamic_shapes: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Program:
    """Trace `model` on example inputs, in evaluation mode; the module is left as it was.

    Raises:
        CaptureError: torch cannot trace it.
        InvalidInput: the examples or `dynamic_shapes` do not fit its `forward`.
    """
    if isinstance(model, ExportedProgram):
        from fxopt.frontends.capture.exported import adopt

        return adopt(model, dynamic_shapes)
    if not isinstance(model, torch.nn.Module):
        raise InvalidInput(f"expected a torch.nn.Module or an ExportedProgram, got a {type(model).__name__}")
    original: torch.nn.Module = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    return _export_module(original, example_inputs, dynamic_shapes, kwargs)


def _export_module(
    model: torch.nn.Module, example_inputs: Examples, dynamic_shapes: Any, kwargs: Mapping[str, Any] | None
) -> Program:
    args, named = arguments(example_inputs, kwargs)
    signature = inspect.signature(model.forward)
    try:
        binding = signature.bind(*args, **named)
    except TypeError as error:
        raise InvalidInput(
            f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}; "
            "give a tuple of positional arguments or a dict of named ones"
        ) from error
    flat = _Flat(model, binding, signature)
    names = [name for index, name in enumerate(flat.names) if index not in flat.constants]
    dimensions = read(dynamic_shapes, bound(signature, args, named), signature, names)
    examples = enlarge(flat.tensors, dimensions)
    title = type(model).__name__
    with evaluation(model), quiet():
        exported = functional(_export(flat, examples, dimensions), title, PREFIX, names)
    values = [node.meta.get("val") for node in user_inputs(exported)]
    dimensions.learn(values)
    call = flat.call()
    return Program(
        exported,
        call,
        tuple(names),
        unique(call.output_names(), names),
        dimensions,
        tuple(examples),
        run=flat.run,
        sizes=_sizes(values, flat.tensors, dimensions),
    )


def functional(exported: ExportedProgram, title: str, prefix: str = "", names: Sequence[str] = ()) -> ExportedProgram:
    """The program without in-place operators and grad-mode regions; operators that a pass thinks in stay whole.

    Raises:
        CaptureError: `forward` writes to a buffer or an input.
    """
    try:
        exported = exported.run_decompositions({})
    except Exception as error:
        raise explain(error, title) from error
    for spec in exported.graph_signature.output_specs:
        if spec.kind in _MUTATIONS:
            inputs = dict(zip(exported.graph_signature.user_inputs, names))
            target = inputs.get(spec.target, str(spec.target).removeprefix(prefix))
            what = f"{_MUTATIONS[spec.kind]} {target!r}"
            node = next((node for node in exported.graph.nodes if node.name == spec.arg.name), None)
            line = source_line(node.meta.get("stack_trace")) if node is not None else ""
            raise CaptureError(
                f"{title}.forward changes {what} in place; a graph is a function of its inputs."
                + (f"\n  at {line}" if line else "")
                + "\n  To fix it: return the new value as an output and take the old one as an input, or do not update "
                "it in evaluation mode."
            )
    return exported


def arguments(example_inputs: Examples, kwargs: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) from what a user gives as example inputs."""
    named = dict(kwargs or {})
    if example_inputs is None:
        return (), named
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), named
    if isinstance(example_inputs, Mapping):
        return (), {**example_inputs, **named}
    return tuple(example_inputs), named


def unique(names: Sequence[str], taken: Sequence[str]) -> tuple[str, ...]:
    """`names` without clashes among themselves and with `taken`."""
    used, found = set(taken), []
    for name in names:
        free = name if name not in used else f"{name}_out"
        count = 1
        while free in used:
            count += 1
            free = f"{name}_out_{count}"
        used.add(free)
        found.append(free)
    return tuple(found)


def user_inputs(exported: ExportedProgram) -> list[torch.fx.Node]:
    """The placeholders of the program that are the user's, in order."""
    names = set(exported.graph_signature.user_inputs)
    return [node for node in exported.graph.nodes if node.op == "placeholder" and node.name in names]


class _Result:
    """The structure of what forward returned, and its values that are not tensors."""

    structure: pytree.TreeSpec | None = None
    constants: Mapping[int, Any] = {}


class _Flat(torch.nn.Module):
    """`model` as a function of flat tensors to flat tensors."""

    def __init__(self, model: torch.nn.Module, binding: inspect.BoundArguments, signature: inspect.Signature) -> None:
        super().__init__()
        self.training = False
        self.model = model
        self.signature = signature
        self.leaves, self.structure = pytree.tree_flatten((binding.args, binding.kwargs))
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]
        complete, self.arguments = pytree.tree_flatten(bound(signature, binding.args, binding.kwargs))
        self.constants = {i: leaf for i, leaf in enumerate(complete) if not isinstance(leaf, torch.Tensor)}
        self.names = leaf_names(self.arguments, signature)
        self.recorded = _Result()  # an object beside the module: torch.export undoes assignments to attributes

    def forward(self, *tensors: torch.Tensor) -> tuple[Any, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        results, structure = pytree.tree_flatten(self.model(*args, **kwargs))
        values, constants = [], {}
        for index, value in enumerate(results):
            if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
                values.append(value)
            elif value is None or isinstance(value, (int, float, str, torch.dtype, torch.device)):
                constants[index] = value
            else:
                raise TypeError(f"forward returned a {type(value).__name__}, which is not a known type")
        self.recorded.structure, self.recorded.constants = structure, constants
        return tuple(values)

    def run(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        with quiet(), evaluation(self.model), torch.no_grad():
            return list(self(*tensors))

    def call(self) -> CallSpec:
        recorded = self.recorded
        assert recorded.structure is not None, "the export ran forward"
        return CallSpec(self.signature, self.arguments, self.constants, recorded.structure, recorded.constants)


def _export(flat: _Flat, examples: list[torch.Tensor], dimensions: Dimensions) -> ExportedProgram:
    shapes: Any = (tuple(dimensions.specification()),) if any(dimensions.axes) else None
    name = type(flat.model).__name__
    for attempt in range(3):
        fresh = tuple(tensor.detach() for tensor in examples)
        try:
            with torch.no_grad():
                return torch.export.export(flat, fresh, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            refined = narrowed(error, shapes) if attempt < 2 else None
            if refined is None:
                raise explain(error, name, dimensions.names) from error
            shapes = refined
    raise AssertionError("the last attempt returns or raises")


def _sizes(values: Sequence[Any], tensors: Sequence[torch.Tensor], dimensions: Dimensions) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for value, tensor in zip(values, tensors, strict=True):
        for symbolic, size in zip(value.shape, tensor.shape, strict=True):
            if isinstance(symbolic, torch.SymInt):
                sizes.setdefault(str(dimensions.name_of(symbolic)), int(size))
    return sizes


@contextlib.contextmanager
def evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no fused fast paths; the modes of all submodules are restored."""
    modes = [(module, module.training) for module in model.modules()]
    if any(training for _, training in modes):
        warnings.warn(f"{type(model).__name__} is in training mode; it is captured in evaluation mode", stacklevel=4)
        model.eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in modes:
            module.training = training


__all__ = ["CaptureError", "Examples", "Program", "arguments", "evaluation", "export", "quiet", "unique", "user_inputs"]
