"""Attention with everything that changes its scores: masks, windows, a soft cap, sinks, shared keys and values.

Source: Vaswani et al., "Attention is all you need" (2017); Ainslie et al., "GQA" (2023); Beltagy et al., "Longformer"
(2020) for windows; Xiao et al., "Efficient streaming language models with attention sinks" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.target import Cost


@op
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> Tensor:
    """softmax(softcap(q @ k.T * scale) + mask) @ v: [..., heads, queries, value width], of the type of q.

    A query whose keys are all hidden gives zeros.

    Args:
        q: [..., heads, queries, width].
        k, v: [..., shared heads, keys, width and value width]; each of their heads serves as many heads of q in a row.
        mask: broadcasts to [..., heads, queries, keys]; added, or (boolean) true where a key is seen.
        sink: [heads]: one more score per head, of a key whose value is 0.
        softcap: c, where scores become c * tanh(scores / c); 0: they do not.
        left, right: a query at position i sees keys from i - left to i + right; -1: to the end. `right` 0 is causal.
    """
    mask = _seen(q, k, mask, left, right)
    grouped = bool(q.shape[-3] != k.shape[-3])
    if sink is None and softcap == 0:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if sink is not None:
        column = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v
    empty = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores, -1).masked_fill(empty, 0.0) @ v


def _seen(q: Tensor, k: Tensor, mask: Tensor | None, left: int, right: int) -> Tensor | None:
    """The mask with what lies outside of the window hidden."""
    if left < 0 and right < 0:
        return mask
    distance = torch.arange(k.shape[-2], device=q.device) - torch.arange(q.shape[-2], device=q.device).unsqueeze(1)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    if mask is None:
        return seen
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)


@attention.cost
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sink: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> Cost:
    from fxopt.ir.graph import hint

    *outer, queries, width = (hint(size) for size in q.shape)
    keys, value_width = hint(k.shape[-2]), hint(v.shape[-1])
    pairs = float(math.prod(outer)) * queries * keys
    elements = sum(math.prod(map(hint, x.shape)) for x in (q, k, v)) + math.prod(outer) * queries * value_width
    dtype = str(q.dtype).removeprefix("torch.")
    return Cost(2 * pairs * (width + value_width), float(elements * q.element_size()), dtype, "attention")


@attention.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        ((2, 4), (2, 4), 5, 5, 8), ((1, 4), (1, 2), 3, 7, 8), ((2, 6), (2, 1), 1, 9, 4), ((1, 2), (1, 2), 4, 0, 8)
    )  # fmt: skip
    for lead, shared, queries, keys, width in shapes:
        q = torch.randn(*lead, queries, width, generator=generator)
        k = torch.randn(*shared, keys, width, generator=generator)
        v = torch.randn(*shared, keys, width + 2, generator=generator)
        added = torch.randn(queries, keys, generator=generator)
        seen = torch.rand(lead[0], 1, queries, keys, generator=generator) < 0.7
        sink = torch.randn(lead[1], generator=generator)
        yield q, k, v, None, None, 0.3, 0.0, -1, -1
        yield q, k, v, added, None, 0.3, 0.0, -1, 0
        yield q, k, v, seen, None, 0.3, 0.0, 2, 1
        yield q, k, v, None, None, 0.3, 2.0, 1, 0
        yield q, k, v, seen, sink, 0.3, 0.0, -1, -1
