"""Sampling of images: GridSample, AffineGrid, MaxUnpool."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.lane import to_ints, to_tensor
from fxopt.ir.onnx.references.common import pad_list, pad_with, product
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_MODES = {"linear": "bilinear", "bilinear": "bilinear", "cubic": "bicubic", "bicubic": "bicubic", "nearest": "nearest"}


@operators.reference("GridSample")
def grid_sample(
    call: Call,
    x: Tensor,
    grid: Tensor,
    align_corners: int = 0,
    mode: str = "linear",
    padding_mode: str = "zeros",
) -> Tensor:
    """x at the positions of the grid, whose coordinates run from -1 to 1."""
    method = _MODES[str(mode)]
    if x.dim() not in (4, 5) or (x.dim() == 5 and method == "bicubic"):
        raise MissingReference(f"GridSample over {x.dim() - 2} axes with mode {mode!r} has no torch reference")
    return F.grid_sample(x, grid, method, str(padding_mode), bool(align_corners))


@operators.reference("AffineGrid", raw=True)
def affine_grid(call: Call, theta: Any, size: Any, align_corners: int = 0) -> Tensor:
    """The positions of an output grid of this size under the affine maps theta, for GridSample."""
    return F.affine_grid(to_tensor(theta), to_ints(size) or [], bool(align_corners))


@operators.reference("MaxUnpool", raw=True)
def max_unpool(
    call: Call,
    x: Any,
    indices: Any,
    output_shape: Any = None,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Zeros with the values of x at the indices that MaxPool returned."""
    values: Tensor = to_tensor(x)
    kernel = kernel_shape or []
    steps, padding = strides or [1] * len(kernel), pads or [0] * 2 * len(kernel)
    sizes = [
        (size - 1) * step - low - high + length
        for size, step, length, low, high in zip(
            values.shape[2:], steps, kernel, padding[: len(kernel)], padding[len(kernel) :], strict=True
        )
    ]
    shape = [values.shape[0], values.shape[1], *sizes]
    flat = torch.zeros([product(shape)], dtype=values.dtype, device=values.device)
    y = flat.scatter(0, to_tensor(indices).reshape(-1), values.reshape(-1)).reshape(shape)
    if output_shape is None:
        return y
    missing = [want - have for want, have in zip(to_ints(output_shape) or [], shape)]
    return pad_with(y, pad_list([0] * len(missing), missing))
