"""`torch.fx.GraphModule`s, symbolically traced or exported, as graphs of functional aten operators."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.errors import InvalidInput
from fxopt.frontends import torch_export
from fxopt.frontends.capture.program import Examples
from fxopt.ir.graph import Graph


def load(module: fx.GraphModule, example_inputs: Examples = None, dynamic_shapes: Any = None) -> Graph:
    """Re-trace `module` (it may call modules and methods) with `torch.export`; see `torch_export.load`.

    Raises:
        CaptureError: torch cannot trace it.
        InvalidInput: it is not a GraphModule, or the examples do not fit it.
    """
    if not isinstance(module, fx.GraphModule):
        raise InvalidInput(f"expected a torch.fx.GraphModule, got a {type(module).__name__}")
    return torch_export.load(module, example_inputs, dynamic_shapes)
