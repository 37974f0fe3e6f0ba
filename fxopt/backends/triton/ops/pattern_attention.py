"""Attention in which every head sees keys by a pattern of its own, in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.backends.triton.block_plan import block_plan, may_renumber
from fxopt.backends.triton.chips import chip_for
from fxopt.backends.triton.configs import ELEMENTS, padded, pattern_key
from fxopt.backends.triton.launch import launch
from fxopt.backends.triton.ops.registry import KernelOp, usable
from fxopt.ir.ops import attention_pattern


def _reference(q: Tensor, k: Tensor, v: Tensor, patterns: Sequence[int], scale: float) -> Tensor:
    return attention_pattern.attention_pattern.function(q, k, v, patterns, scale)


def refusal(width: int, element: torch.dtype) -> str:
    """Why attention of these operands has no such kernel; "" when it has."""
    if element not in ELEMENTS:
        return f"the operands are {element}; it takes float16 and bfloat16"
    return f"heads of width {width}; it takes 256" if width > 256 else ""


def _kernels(*flat: Any) -> Tensor:
    """The same with kernels; arguments as those of the reference."""
    from fxopt.backends.triton.kernels.pattern_attention import pattern_attention as kernel

    q, k, v, patterns, scale = flat
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    batch, heads, length, width = q.shape
    y = torch.empty(batch, heads, length, width, dtype=q.dtype, device=q.device)
    numbers = tuple(map(int, patterns))
    renumbered = may_renumber(numbers, length)
    choice = usable(chip_for(q), pattern_key(q.dtype, width, renumbered))
    plan = block_plan(numbers, length, choice["BQ"], choice["BK"], str(q.device))
    arguments = (
        q, k, v, y, plan.work, plan.first, plan.partial, plan.columns, plan.parameters, length, plan.blocks, heads,
        scale * math.log2(math.e), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
    )  # fmt: skip
    constants = {"D": width, "D2": padded(width), "RENUMBERED": renumbered, **choice.constants}
    launch(kernel, (len(plan.work), batch), arguments, constants, choice.warps, choice.stages)
    return y


pattern_attention = KernelOp("pattern_attention", _reference, _kernels)
