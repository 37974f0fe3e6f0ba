"""Gradient through torch's reverse-mode differentiation.

Source: ai.onnx.preview.training, version 1. The importer gives the node the graph that computes `y` from `xs` and `zs`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.ir.onnx.bodies import Body
from fxopt.ir.onnx.lane import to_tensor
from fxopt.ir.onnx.references.common import first, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("ai.onnx.preview.training")


@operators.reference("Gradient")
def gradient(
    call: Call, *values: Any, xs: list[str], y: str, zs: list[str] | None = None, _graph: Body | None = None
) -> Any:
    """The derivatives of the sum of `y` with respect to the first `len(xs)` values; 0 where `y` does not depend."""
    require(_graph is not None, f"the graph that computes {y!r} is not known")
    assert _graph is not None
    again = torch.is_grad_enabled()  # inside the graph of another gradient
    with torch.enable_grad():
        given = [value if index >= len(xs) else _variable(value, again) for index, value in enumerate(values)]
        result = to_tensor(_graph(*given)[0])
        require(isinstance(result, Tensor) and result.dtype.is_floating_point, f"{y!r} is no floating-point tensor")
        found = torch.autograd.grad(
            result,
            given[: len(xs)],
            torch.ones_like(result),
            create_graph=again,
            allow_unused=True,
            materialize_grads=True,
        )
    return first(call, *(value if again else value.detach() for value in found))


def _variable(value: Tensor, keeps_history: bool) -> Tensor:
    """The value as something to differentiate by, for itself or as part of a larger graph."""
    if keeps_history and value.requires_grad:
        return value.view_as(value)
    return value.detach().clone().requires_grad_()
