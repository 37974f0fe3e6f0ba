"""`scaled_dot_product_attention` with each of its arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.attention.entries import B, D, Entry, Expected, H, L, S, heads, with_mask
from tests.attention.spelled import ALIBI, BAND, SHARED, SQUARE, TRIL, keys_seen, repeated

attend = F.scaled_dot_product_attention


def sdpa(**options: object) -> object:
    return lambda q, k, v: attend(q, k, v, **options)  # type: ignore[arg-type]


def whole(mask: str = "none", scale: float | None = None, groups: int = 1, fused: bool = False) -> tuple[Expected, ...]:
    return (Expected(mask, scale, groups, zero_rows=True, fused=fused),)


def causal_by_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    queries, keys = torch.arange(q.shape[-2]).unsqueeze(1), torch.arange(k.shape[-2])
    return attend(q, k, v, keys <= queries)


ONLY = ("torch",)  # exporters to ONNX spell it out
SDPA = [
    Entry("sdpa", sdpa(), heads(), whole(), only=ONLY),
    Entry("sdpa is_causal", sdpa(is_causal=True), heads(), whole("causal"), only=ONLY),
    Entry("sdpa scale", sdpa(scale=0.3), heads(), whole(scale=0.3), only=ONLY),
    Entry("sdpa scale on q too", lambda q, k, v: attend(q * 0.5, k, v, scale=0.3), heads(), whole(scale=0.15), only=ONLY),
    Entry("sdpa bias", lambda q, k, v, m: attend(q, k, v, m), with_mask(lambda: torch.randn(L, S)), whole("general"), only=ONLY),
    Entry("sdpa padding", lambda q, k, v, m: attend(q, k, v, m), with_mask(keys_seen), whole("padding"), only=ONLY),
    Entry("sdpa constant causal mask", sdpa(attn_mask=TRIL), heads(), whole("causal", fused=True), only=ONLY),
    Entry("sdpa constant that hides nothing", sdpa(attn_mask=torch.zeros(L, S)), heads(), whole(fused=True), only=ONLY),
    Entry("sdpa constant band", sdpa(attn_mask=BAND), heads(), whole("banded"), only=ONLY),
    Entry("sdpa ALiBi", sdpa(attn_mask=ALIBI), heads(), whole("general"), only=ONLY),
    Entry("sdpa causal by positions", causal_by_positions, heads(), whole("causal", fused=True), SQUARE, only=ONLY),
    Entry("sdpa enable_gqa", sdpa(enable_gqa=True), heads(*SHARED), whole(groups=2), only=ONLY),
    Entry("sdpa of repeated heads", lambda q, k, v: attend(q, repeated(k, 2), repeated(v, 2)), heads(*SHARED),
          whole(groups=2, fused=True), only=ONLY),
    Entry("sdpa of other lengths", sdpa(), heads((B, H, 3, D), (B, H, 7, D), (B, H, 7, 5)), whole(), only=ONLY),
    Entry("sdpa dropout_p", sdpa(dropout_p=0.1), heads(), ("dropout_p=0.1; attention with dropout is for training",),
          only=ONLY),
]  # fmt: skip
