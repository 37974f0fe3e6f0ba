"""8-bit linears on codes whose weight is block-sparse: most blocks of 4 outputs x 1 input hold zeros only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.ops.linear_u8s8 import linear_u8s8
from fxopt.ir.target import Cost

BLOCK = 4  # consecutive outputs


def block_density(codes: Tensor) -> float:
    """Share of the blocks of an int8 weight [out, in] that hold anything but zeros."""
    outputs, inner = codes.shape
    padding = codes.new_zeros((-outputs % BLOCK, inner))
    blocks = torch.cat([codes, padding]).reshape(-1, BLOCK, inner)
    return float((blocks != 0).any(1).double().mean()) if blocks.numel() else 0.0


@op
def sparse_linear_u8s8(
    q: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    zero: int,
    epilogue: str,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    density: float,
) -> Tensor:
    """`linear_u8s8`, from the same integer sums; the weight is kept whole, with its zeros.

    Args:
        density: `block_density(codes)`, which the work is in proportion to. The result does not depend on it.
    """
    return linear_u8s8.function(q, codes, scales, bias, zero, epilogue, residual, gamma, beta, eps)


@sparse_linear_u8s8.cost
def _(
    q: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
    zero: int,
    epilogue: str,
    residual: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    density: float,
) -> Cost:
    whole = linear_u8s8.cost_of(q, codes, scales, bias, zero, epilogue, residual, gamma, beta, eps)
    return replace(whole, flops=whole.flops * density, macs=whole.multiply_adds * density)


@sparse_linear_u8s8.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    shares = (0.3, 0.0, 1.0, 0.5)
    for index, (q, codes, *rest) in enumerate(linear_u8s8.sample_arguments()):
        outputs, inner = codes.shape
        kept = torch.rand(-(-outputs // BLOCK), inner, generator=generator) < shares[index % len(shares)]
        sparse = codes * kept.repeat_interleave(BLOCK, 0)[:outputs]
        yield q, sparse, *rest, block_density(sparse)
