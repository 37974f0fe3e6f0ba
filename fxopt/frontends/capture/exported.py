"""`adopt`: an `ExportedProgram` that the user made, as a `Program`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError
from fxopt.frontends.capture.call_spec import CallSpec, leaf_names
from fxopt.frontends.capture.dimensions import Dimensions, read
from fxopt.frontends.capture.program import Program, functional, unique, user_inputs


def adopt(exported: ExportedProgram, dynamic_shapes: Any = None) -> Program:
    """The program with names; `dynamic_shapes`, when given again, names its dynamic dimensions.

    Raises:
        CaptureError: the program does not say how it is called.
    """
    if exported.call_spec.in_spec is None or exported.call_spec.out_spec is None:
        raise CaptureError("the ExportedProgram has no call specification; export it again with torch.export.export")
    exported = functional(exported, "the exported program")
    result = exported.call_spec.out_spec
    assert exported.call_spec.in_spec is not None and result is not None
    positional, keywords = exported.call_spec.in_spec.children()
    signature = _signature(exported, positional.num_children, list(keywords.context))
    children = dict(zip(signature.parameters, (*positional.children(), *keywords.children()), strict=True))
    structure = pytree.tree_structure(
        {name: pytree.tree_unflatten([0] * child.num_leaves, child) for name, child in children.items()}
    )
    inputs = [spec.arg for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    constants = {index: arg.value for index, arg in enumerate(inputs) if isinstance(arg, ConstantArgument)}
    outputs = [spec.arg for spec in exported.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    fixed = {index: arg.value for index, arg in enumerate(outputs) if isinstance(arg, ConstantArgument)}
    call = CallSpec(signature, structure, constants, result, fixed)
    names = [name for index, name in enumerate(leaf_names(structure, signature)) if index not in constants]
    nodes = user_inputs(exported)
    values = [node.meta["val"] for node in nodes]
    dimensions = Dimensions(names, [{} for _ in names])
    if dynamic_shapes is not None:
        leaves = iter(values)
        filled = [constants[index] if index in constants else next(leaves) for index in range(structure.num_leaves)]
        dimensions = read(dynamic_shapes, pytree.tree_unflatten(filled, structure), signature, names)
    dimensions.learn(values)
    module = exported.module(check_guards=False)

    def run(tensors: Sequence[torch.Tensor]) -> list[Any]:
        given = iter(tensors)
        filled = [constants[index] if index in constants else next(given) for index in range(structure.num_leaves)]
        arguments = list(pytree.tree_unflatten(filled, structure).values())
        named = dict(zip(keywords.context, arguments[positional.num_children :], strict=True))
        with torch.no_grad():
            results = pytree.tree_leaves(module(*arguments[: positional.num_children], **named))
        return [value for index, value in enumerate(results) if index not in fixed]

    outs = unique(call.output_names(), names)
    return Program(exported, call, tuple(names), outs, dimensions, _examples(exported), run, prefix="")


def _examples(exported: ExportedProgram) -> tuple[torch.Tensor, ...]:
    if exported.example_inputs is None:
        return ()
    return tuple(leaf for leaf in pytree.tree_leaves(exported.example_inputs) if isinstance(leaf, torch.Tensor))


def _signature(exported: ExportedProgram, count: int, keywords: list[str]) -> inspect.Signature:
    """The signature of the exported forward, from the names that the program keeps."""
    root = exported.module_call_graph[0].signature if exported.module_call_graph else None
    names = list(getattr(root, "forward_arg_names", None) or [])
    if len(names) < count:
        names = [f"args_{index}" for index in range(count)]
    parameter = inspect.Parameter
    return inspect.Signature(
        [parameter(name, parameter.POSITIONAL_OR_KEYWORD) for name in names[:count]]
        + [parameter(name, parameter.KEYWORD_ONLY) for name in keywords]
    )
