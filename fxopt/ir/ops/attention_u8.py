"""Attention on bytes around 128: both products are sums of integers, the probabilities are codes too.

Source: Vaswani et al., "Attention is all you need" (2017); Kim et al., "I-BERT" (2021) for integer-only attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.target import Cost

MIDDLE = 128  # the code of the value 0


@op
def attention_u8(
    q: Tensor, k: Tensor, v: Tensor, inverse: Tensor, mask: Tensor | None, heads: int, factor: float, zero: int
) -> Tensor:
    """Codes of softmax((q - 128) @ (k - 128).T * factor + mask) @ (v - 128) * inverse, by heads: uint8 as q.

    A probability is round(255 * e**(score - highest)) over the sum of these codes. A query whose keys are all hidden
    gets the code of 0.

    Args:
        q: uint8 [batch, queries, heads * width].
        k, v: uint8 [batch, keys, heads * width].
        inverse: float32 [heads * width]: scale of v over that of the result.
        mask: float32 [1 or batch, 1, 1 or queries, keys], or None.
        factor: scales of q and k, and that of the scores.
        zero: the code of 0 in the result.
    """
    a, b, c = ((x.double() - MIDDLE).view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    scores = a @ b.transpose(-1, -2) * factor
    if mask is not None:
        scores = scores + mask.double()
    if k.shape[1] == 0:
        return torch.full_like(q, zero)
    highest = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    codes = torch.round(255 * torch.exp(scores - highest))
    mixed = (codes / codes.sum(-1, keepdim=True).clamp(min=1)) @ c
    y = mixed.transpose(1, 2).reshape(q.shape) * inverse.double()
    return (torch.round(y) + zero).clamp(0, 255).to(torch.uint8)


@attention_u8.cost
def _(
    q: Tensor, k: Tensor, v: Tensor, inverse: Tensor, mask: Tensor | None, heads: int, factor: float, zero: int
) -> Cost:
    from fxopt.ir.graph import hint

    batch, queries, size = (hint(dim) for dim in q.shape)
    keys = hint(k.shape[1])
    pairs, moved = float(batch * queries * keys), float(2 * batch * (queries + keys) * size)
    # the softmax, in operations of the products' own rate per score: from whole encoders (benchmarks/cpu_int8.py)
    return Cost(4 * pairs * size + 60 * pairs * heads, moved, "int8", "attention", 1, 2 * pairs * size)


@attention_u8.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for batch, queries, keys, heads, width in ((1, 1, 1, 1, 32), (2, 5, 3, 3, 32), (1, 13, 40, 1, 64)):
        shapes = ((batch, queries, heads * width), *((batch, keys, heads * width),) * 2)
        q, k, v = (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for shape in shapes)
        inverse = torch.rand(heads * width, generator=generator) + 0.5
        for size in (None, (1, 1, queries, keys), (batch, 1, 1, keys)):
            mask = None if size is None else torch.randn(size, generator=generator)
            if mask is not None:
                mask = torch.where(torch.rand(mask.shape, generator=generator) < 0.2, -math.inf, mask)
            yield q, k, v, inverse, mask, heads, 2e-4, 40
