"""The scan output of a loop that never ran; declares no operator."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.errors import MissingReference
from fxopt.ir.onnx.bodies import Body
from fxopt.ir.onnx.lane import to_tensor
from fxopt.ir.onnx.registry import Operators

operators = Operators()


def empty_scan(body: Body, output: int, inputs: tuple[Any, ...], axis: int) -> Tensor:
    """A tensor of size 0 along `axis`, of the type that the body declares, else of that of a run on fake tensors.

    Raises:
        MissingReference: neither tells the element type and the shape.
    """
    spec = body.inside.outputs[output]
    if spec.dtype is not None and spec.shape is not None and all(isinstance(dim, int) for dim in spec.shape):
        return torch.empty(_with_zero(spec.shape, axis), dtype=spec.dtype)
    mode = detect_fake_mode(inputs)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) if mode is None else nullcontext():
            element = to_tensor(body(*inputs)[output])
    except Exception as error:
        raise MissingReference(
            f"the loop did not run, and the type of its scan output {spec} cannot be told: {type(error).__name__}"
        ) from error
    if not isinstance(element, Tensor):
        raise MissingReference(f"the loop did not run, and its scan output {spec} is no tensor")
    return torch.empty(_with_zero(tuple(element.shape), axis), dtype=element.dtype)


def _with_zero(shape: tuple[Any, ...], axis: int) -> list[Any]:
    axis %= len(shape) + 1
    return [*shape[:axis], 0, *shape[axis:]]
