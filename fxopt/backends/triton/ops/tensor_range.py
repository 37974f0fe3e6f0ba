"""Scale and zero point that map a tensor onto codes 0 ... 255, zero exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.backends.triton.launch import launch
from fxopt.backends.triton.ops.registry import KernelOp
from fxopt.ir.ops.linear_w8a8 import dynamic_range

_PROGRAMS, _BLOCK = 512, 1024


def _reference(x: Tensor) -> tuple[Tensor, Tensor]:
    scale, zero = dynamic_range(x.float())
    return scale, zero


def _kernels(*flat: Any) -> tuple[Tensor, Tensor]:
    """The same with kernels."""
    from fxopt.backends.triton.kernels.tensor_range import range_parts, range_whole

    (x,) = flat
    x = x.contiguous()
    count = x.numel()
    programs = max(1, min(_PROGRAMS, -(-count // _BLOCK)))
    parts = torch.empty(2, programs, dtype=torch.float32, device=x.device)
    scale, zero = (torch.empty((), dtype=torch.float32, device=x.device) for _ in range(2))
    launch(range_parts, (programs,), (x, parts, count, -(-count // programs)), {"BLOCK": _BLOCK}, 4, 1)
    launch(range_whole, (1,), (parts, scale, zero, programs), {"BLOCK": _PROGRAMS}, 4, 1)
    return scale, zero


tensor_range = KernelOp("tensor_range", _reference, _kernels)
