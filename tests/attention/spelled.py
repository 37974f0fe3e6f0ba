"""Spellings of attention written by hand, as papers, tutorials and model code write them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.attention.entries import LOWEST, ROOT, B, D, Entry, Expected, H, L, S, heads, with_mask

INF = math.inf


def probabilities(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


def keys_seen() -> Tensor:
    """[batch, 1, 1, keys]: the last two keys of the second row of the batch are padding."""
    seen = torch.ones(B, 1, 1, S, dtype=torch.bool)
    seen[1, ..., -2:] = False
    return seen


TRIL = torch.ones(L, S, dtype=torch.bool).tril()
DISTANCE = torch.arange(S) - torch.arange(L).unsqueeze(1)
BAND = (DISTANCE >= -2) & (DISTANCE <= 1)
BLOCKS = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()
PADDED = (torch.arange(S) < 4).reshape(1, 1, 1, S)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625]).reshape(1, H, 1, 1)
ALIBI = SLOPES * DISTANCE
CAUSAL = torch.zeros(B, 1, L, S).masked_fill(~TRIL, LOWEST)
SINKS = torch.tensor([0.5, -1.0, 0.0, 2.0])


# ---- scales


def scaled_q(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities((q * 0.3) @ k.transpose(-2, -1), v)


def scaled_k(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(q @ (k / 4.0).transpose(-2, -1), v)


def scaled_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = math.sqrt(0.3)
    return probabilities((q * root) @ (k.transpose(-2, -1) * root), v)


def scaled_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), v)


def scaled_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities((q * 0.5) @ k.transpose(-2, -1) * 0.5, v)


def scaled_below_the_heads(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = (x * 0.25).view(B, L, H, D).transpose(1, 2)
    return probabilities(q @ k.transpose(-2, -1), v)


def transposed_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(q @ k, v)


SCALES = [
    Entry("plain", lambda q, k, v: probabilities(q @ k.transpose(-2, -1), v), heads(), (Expected(),)),
    Entry("scale on q", scaled_q, heads(), (Expected(scale=0.3),)),
    Entry("scale on k", scaled_k, heads(), (Expected(scale=0.25),)),
    Entry("root of the scale on both", scaled_both, heads(), (Expected(scale=0.3),)),
    Entry("scores over the root of the width", scaled_scores, heads(), (Expected(scale=ROOT),)),
    Entry("scale on q and on the scores", scaled_twice, heads(), (Expected(scale=0.25),)),
    Entry(
        "scale before the heads are separated", scaled_below_the_heads,
        heads((B, L, H * D), (B, H, S, D), (B, H, S, D)), (Expected(scale=0.25),),
    ),
    Entry("keys that come transposed", transposed_keys, heads((B, H, L, D), (B, H, D, S), (B, H, S, D)), (Expected(),)),
    Entry(
        "cross attention", lambda q, k, v: probabilities(q @ k.transpose(-2, -1) * 0.5, v),
        heads((B, H, 3, D), (B, H, 7, D), (B, H, 7, 5)), (Expected(scale=0.5),),
    ),
    Entry(
        "dynamic lengths", lambda q, k, v: probabilities(q @ k.transpose(-2, -1) * 0.5, v), heads(), (Expected(scale=0.5),),
        {0: {0: "batch", 2: "queries"}, 1: {0: "batch", 2: "keys"}, 2: {0: "batch", 2: "keys"}},
    ),
]  # fmt: skip


# ---- masks


def hidden(mask: Tensor, low: float) -> Any:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return probabilities((q @ k.transpose(-2, -1)).masked_fill(~mask, low), v)

    return attend


def biased(bias: Tensor) -> Any:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return probabilities(q @ k.transpose(-2, -1) * 0.5 + bias, v)

    return attend


def causal_by_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    low = torch.triu(torch.full((q.shape[-2], k.shape[-2]), -INF), 1)
    return probabilities(q @ k.transpose(-2, -1) + low, v)


def causal_by_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    queries, keys = torch.arange(q.shape[-2]), torch.arange(k.shape[-2])
    later = keys[None, :] > queries[:, None]
    return probabilities((q @ k.transpose(-2, -1)).masked_fill(later, LOWEST), v)


def causal_from_a_table(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = torch.ones(16, 16, dtype=torch.bool).tril().view(1, 1, 16, 16)
    seen = table[:, :, : q.shape[-2], : k.shape[-2]]
    return probabilities(torch.where(seen, q @ k.transpose(-2, -1), torch.full([], LOWEST)), v)


def window_by_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    queries, keys = torch.arange(q.shape[-2]).unsqueeze(1), torch.arange(k.shape[-2])
    seen = (keys <= queries) & (keys > queries - 3)
    return probabilities(torch.where(seen, q @ k.transpose(-2, -1), LOWEST), v)


def padding_as_numbers(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    low = (1.0 - seen.float()) * -1e9
    return probabilities(q @ k.transpose(-2, -1) * 0.5 + low, v)


def segments(q: Tensor, k: Tensor, v: Tensor, part: Tensor) -> Tensor:
    same = part[:, None, :, None] == part[:, None, None, :]
    return probabilities(torch.where(same, q @ k.transpose(-2, -1), LOWEST), v)


def causal_and_padding(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    queries, keys = torch.arange(q.shape[-2]).unsqueeze(1), torch.arange(k.shape[-2])
    mask = (keys <= queries) & seen
    return probabilities(q @ k.transpose(-2, -1) + torch.where(mask, 0.0, LOWEST), v)


def blended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = TRIL.float()
    return probabilities(q @ k.transpose(-2, -1) * keep - 1e4 * (1 - keep), v)


def scaled_after_the_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return probabilities((q @ k.transpose(-2, -1) + bias) * 0.5, v)


def guarded(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    found = torch.softmax((q @ k.transpose(-2, -1)).masked_fill(~seen, -INF), -1)
    return torch.where(torch.isnan(found), 0.0, found) @ v


SQUARE = {index: {2: "length"} for index in range(3)}
MASKS = [
    Entry("bias that is an input", lambda q, k, v, m: probabilities(q @ k.transpose(-2, -1) * 0.5 + m, v),
          with_mask(lambda: torch.randn(B, 1, L, S)), (Expected("general", 0.5),)),
    Entry("scale behind the bias", scaled_after_the_mask, with_mask(lambda: torch.randn(L, S)), (Expected("general", 0.5),)),
    Entry("where keeps", lambda q, k, v, m: probabilities(torch.where(m, q @ k.transpose(-2, -1), LOWEST), v),
          with_mask(lambda: torch.rand(B, 1, L, S) < 0.6), (Expected("general"),)),
    Entry("where hides", lambda q, k, v, m: probabilities(torch.where(m, torch.tensor(-1e9), q @ k.transpose(-2, -1)), v),
          with_mask(lambda: torch.rand(L, S) < 0.4), (Expected("general"),)),
    Entry("masked_fill of padding", lambda q, k, v, m: probabilities((q @ k.transpose(-2, -1)).masked_fill(~m, LOWEST), v),
          with_mask(keys_seen), (Expected("padding"),)),
    Entry("masked_fill of numbers that are 0", lambda q, k, v, m: probabilities((q @ k.transpose(-2, -1)).masked_fill(m == 0, -1e9), v),
          with_mask(lambda: keys_seen().float()), (Expected("padding"),)),
    Entry("padding as numbers", padding_as_numbers, with_mask(keys_seen), (Expected("padding", 0.5),)),
    Entry("rows without keys become zeros", guarded, with_mask(keys_seen), (Expected("padding", zero_rows=True),)),
    Entry("constant causal, minus infinity", hidden(TRIL, -INF), heads(), (Expected("causal"),)),
    Entry("constant causal, lowest number", hidden(TRIL, LOWEST), heads(), (Expected("causal"),)),
    Entry("constant causal, -10000", hidden(TRIL, -1e4), heads(), (Expected("causal"),)),
    Entry("constant causal that is added", biased(torch.zeros(L, S).masked_fill(~TRIL, -INF)), heads(), (Expected("causal", 0.5),)),
    Entry("constant band", hidden(BAND, LOWEST), heads(), (Expected("banded"),)),
    Entry("constant blocks", hidden(BLOCKS, -INF), heads(), (Expected("block-diagonal"),)),
    Entry("constant padding", hidden(PADDED, -INF), heads(), (Expected("padding"),)),
    Entry("constant that hides nothing", hidden(torch.ones(L, S, dtype=torch.bool), -INF), heads(), (Expected(),)),
    Entry("constant causal and padding", hidden(TRIL & PADDED, LOWEST), heads(), (Expected("general"),)),
    Entry("ALiBi", biased(ALIBI), heads(), (Expected("general", 0.5),)),
    Entry("ALiBi and causal", biased(ALIBI.masked_fill(~TRIL, -INF)), heads(), (Expected("general", 0.5),)),
    Entry("bias of windows, -100 where they do not meet", biased(torch.where(BLOCKS, 0.0, -100.0)), heads(),
          (Expected("general", 0.5),)),
    Entry("causal by size", causal_by_size, heads(), (Expected("causal"),), SQUARE),
    Entry("causal by positions", causal_by_positions, heads(), (Expected("causal"),), SQUARE),
    Entry("causal from a table", causal_from_a_table, heads(), (Expected("causal"),)),
    Entry("window by positions", window_by_positions, heads(), (Expected("banded"),), SQUARE),
    Entry("segments of a packed row", segments, with_mask(lambda: torch.tensor([[0, 0, 0, 1, 1, 2]] * B)),
          (Expected("block-diagonal"),)),
    Entry("causal and padding", causal_and_padding, with_mask(keys_seen), (Expected("causal + padding"),)),
    Entry("scores times the mask", blended, heads(), (Expected("causal"),)),
    Entry("two masks", lambda q, k, v, m: probabilities(q @ k.transpose(-2, -1) + ALIBI + m, v),
          with_mask(lambda: torch.randn(B, 1, L, S)), (Expected("general"),)),
    Entry("a bias, then a mask", lambda q, k, v, m: probabilities((q @ k.transpose(-2, -1) + ALIBI).masked_fill(~m, LOWEST), v),
          with_mask(keys_seen), (Expected("general"),)),
]  # fmt: skip


# ---- what changes scores and probabilities


def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(torch.tanh(q @ k.transpose(-2, -1) * 0.5 / 3.0) * 3.0, v)


def softcapped_and_masked(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return probabilities(3.0 * torch.tanh(q @ k.transpose(-2, -1) / 3.0) + torch.where(m, 0.0, LOWEST), v)


def with_sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sinks = SINKS.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    scores = torch.cat([q @ k.transpose(-2, -1) * 0.5, sinks], -1)
    scores = scores - scores.max(-1, keepdim=True).values
    return torch.softmax(scores, -1)[..., :-1] @ v


def wide_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.transpose(-2, -1) * 0.5).float(), -1).to(q.dtype) @ v


def typed_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1, dtype=torch.float32).type_as(q) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.5
    power = torch.exp(scores - scores.amax(-1, keepdim=True))
    return power / power.sum(-1, keepdim=True) @ v


def without_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.5
    return probabilities(scores - scores.max(-1, keepdim=True).values, v)


def half() -> tuple[Tensor, ...]:
    return tuple(x.half() for x in heads()())


SOFTMAXES = [
    Entry("soft cap", softcapped, heads(), (Expected(scale=0.5, softcap=3.0),)),
    Entry("soft cap, then a mask", softcapped_and_masked, with_mask(keys_seen), (Expected("padding", softcap=3.0),)),
    Entry("sinks", with_sinks, heads(), (Expected(scale=0.5, sink=True),)),
    Entry("softmax in float32", wide_softmax, half, (Expected(scale=0.5),)),
    Entry("softmax of another type", typed_softmax, half, (Expected(scale=0.5),)),
    Entry("softmax by hand", by_hand, heads(), (Expected(scale=0.5),)),
    Entry("scores without their maximum", without_maximum, heads(), (Expected(scale=0.5),)),
    Entry("dropout of probability 0", lambda q, k, v: F.dropout(torch.softmax(q @ k.transpose(-2, -1), -1), 0.0, True) @ v, heads(),
          (Expected(),), only=("torch", "dynamo")),
    Entry("dropout at inference", lambda q, k, v: F.dropout(torch.softmax(q @ k.transpose(-2, -1), -1), 0.3, False) @ v, heads(),
          (Expected(),)),
]  # fmt: skip


# ---- products


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5, -1)
    return torch.einsum("bhqk,bkhd->bqhd", found, v)


def einsum_in_another_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = torch.softmax(torch.einsum("bkhd,bqhd->bhqk", k, q) * 0.5, -1)
    return torch.einsum("bkhd,bhqk->bqhd", v, found)


def values_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in autoencoders of images: [batch, width, positions]."""
    found = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * 0.5, 2)
    return torch.bmm(v, found.permute(0, 2, 1))


def folded(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q3, k3, v3 = (x.reshape(B * H, -1, D) for x in (q, k, v))
    scores = torch.bmm(q3 * 0.5, k3.transpose(1, 2)).view(B, H, L, S) + m
    found = torch.softmax(scores.view(B * H, L, S), -1)
    return torch.bmm(found, v3).view(B, H, L, D)


def folded_with_constants(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in Bloom: slopes per head meet the scores before batch and heads are apart, the causal mask behind."""
    q3, k3, v3 = (x.reshape(B * H, -1, D) for x in (q, k, v))
    slopes = (SLOPES * torch.arange(S)).expand(B, H, 1, S).reshape(B * H, 1, S)
    scores = torch.baddbmm(slopes, q3, k3.transpose(1, 2), alpha=0.5).view(B, H, L, S)
    found = torch.softmax(scores + CAUSAL, -1)
    return torch.bmm(found.view(B * H, L, S), v3).view(B, H, L, D)


def added_product(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.baddbmm(m, q, k.transpose(1, 2), beta=1.0, alpha=0.3), -1), v)


def nothing_added(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = torch.baddbmm(m, q, k.transpose(1, 2), beta=0, alpha=0.3)
    return torch.bmm(torch.softmax(scores, -1), v)


THREE = ((B, L, D), (B, S, D), (B, S, D))
BY_POSITION = ((B, L, H, D), (B, S, H, D), (B, S, H, D))
PRODUCTS = [
    Entry("einsum", einsum, heads(*BY_POSITION), (Expected(scale=0.5),)),
    Entry("einsum with keys and values first", einsum_in_another_order, heads(*BY_POSITION), (Expected(scale=0.5),)),
    Entry("values first", values_first, heads((B, D, L), (B, D, S), (B, D, S)), (Expected(scale=0.5),)),
    Entry("heads folded into the batch", folded, with_mask(lambda: torch.randn(B, 1, L, S)), (Expected("general", 0.5),)),
    Entry("heads folded into the batch, with constants", folded_with_constants, heads(), (Expected("general", 0.5),),
          only=("torch", "script")),  # as dynamo exports it, it is refused: batch and heads are not apart again
    Entry("baddbmm", added_product, with_mask(lambda: torch.randn(B, L, S), *THREE), (Expected("general", 0.3),)),
    Entry("baddbmm that adds nothing", nothing_added, with_mask(lambda: torch.randn(B, L, S), *THREE),
          (Expected(scale=0.3),), only=("torch",)),  # exporters add 0 times it
    Entry("one head", lambda q, k, v: probabilities(q @ k.transpose(-2, -1) * 0.5, v), heads(*THREE), (Expected(scale=0.5),)),
]  # fmt: skip


# ---- heads that share keys and values


def repeated(x: Tensor, times: int) -> Tensor:
    batch, shared, length, width = x.shape
    return x[:, :, None].expand(batch, shared, times, length, width).reshape(batch, shared * times, length, width)


def repeated_before_the_transpose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in code that keeps [batch, length, heads, width]."""
    k, v = (x.unsqueeze(3).expand(B, S, 2, 2, D).reshape(B, S, H, D).transpose(1, 2) for x in (k, v))
    return probabilities(q.transpose(1, 2) @ k.transpose(-2, -1), v)


def repeated_and_turned_in_three_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As exporters of ONNX write scaled_dot_product_attention, with reshapes in a row made one."""
    turned = k[:, :, None].expand(B, 2, 2, S, D).reshape(B * H, S, D).transpose(1, 2).reshape(B, H, D, S)
    return probabilities(q @ turned, repeated(v, 2))


def five_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = torch.softmax(q.view(B, 2, 2, L, D) @ k.unsqueeze(2).transpose(-2, -1), -1)
    return (found @ v.unsqueeze(2)).reshape(B, H, L, D)


SHARED = ((B, H, L, D), (B, 2, S, D), (B, 2, S, D))
GROUPS = [
    Entry("repeated by expanding", lambda q, k, v: probabilities(q @ repeated(k, 2).transpose(-2, -1), repeated(v, 2)), heads(*SHARED),
          (Expected(groups=2),)),
    Entry("repeated by repeat_interleave",
          lambda q, k, v: probabilities(q @ k.repeat_interleave(2, 1).transpose(-2, -1), v.repeat_interleave(2, 1)), heads(*SHARED),
          (Expected(groups=2),)),
    Entry("repeated before the transpose", repeated_before_the_transpose,
          heads((B, L, H, D), (B, S, 2, D), (B, S, 2, D)), (Expected(groups=2),)),
    Entry("repeated and turned in three axes", repeated_and_turned_in_three_axes, heads(*SHARED), (Expected(groups=2),)),
    Entry("one head for all", lambda q, k, v: probabilities(q @ k.transpose(-2, -1), v), heads((B, H, L, D), (B, 1, S, D), (B, 1, S, D)),
          (Expected(groups=4),)),
    Entry("groups on an axis of their own", five_axes, heads(*SHARED), (Expected(groups=2),)),
    Entry("scaled before they are repeated",
          lambda q, k, v: probabilities(q @ repeated(k * 0.5, 2).transpose(-2, -1), repeated(v, 2)), heads(*SHARED),
          (Expected(scale=0.5, groups=2),)),
]  # fmt: skip


# ---- rotary embedding


def turned(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), -1)


def neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def angles(width: int) -> tuple[Tensor, Tensor]:
    found = torch.arange(L).unsqueeze(1) * 0.5 ** torch.arange(width)
    return found.cos(), found.sin()


def by_halves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cos, sin = angles(D)
    q, k = (x * cos + turned(x) * sin for x in (q, k))
    return probabilities(q @ k.transpose(-2, -1), v)


def by_neighbours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cos, sin = angles(D)
    q, k = (x * cos + neighbours(x) * sin for x in (q, k))
    return probabilities(q @ k.transpose(-2, -1), v)


def of_some_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cos, sin = angles(4)
    q, k = (torch.cat([x[..., :4] * cos + turned(x[..., :4]) * sin, x[..., 4:]], -1) for x in (q, k))
    return probabilities(q @ k.transpose(-2, -1), v)


def as_complex_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    unit = torch.polar(torch.ones(L, D // 2), torch.arange(L).unsqueeze(1) * 0.5 ** torch.arange(D // 2))
    q, k = (
        torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * unit).flatten(3) for x in (q, k)
    )
    return probabilities(q @ k.transpose(-2, -1), v)


ROTARY = [
    Entry("rotary, halves", by_halves, heads(), (Expected(rotary=(8, 8)),)),
    Entry("rotary, neighbours", by_neighbours, heads(), (Expected(rotary=(8, 8)),)),
    Entry("rotary of some features", of_some_features, heads(), (Expected(rotary=(4, 4)),)),
    Entry("rotary as complex numbers", as_complex_numbers, heads(), (Expected(rotary=(8, 8)),), only=("torch",)),
]


# ---- whole modules


class VisionAttention(nn.Module):
    """One product for q, k and v, whose heads are separated together."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.proj = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax((q * ROOT) @ k.transpose(-2, -1), -1) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class WindowAttention(nn.Module):
    """Windows of an image in the batch; those at the border must not see across it."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows = windows
        self.qkv = nn.Linear(H * D, 3 * H * D)
        self.register_buffer("position", torch.randn(1, H, L, L))
        border = torch.zeros(windows, L, L)
        border[-1, :2, 2:] = border[-1, 2:, :2] = -100.0
        self.register_buffer("border", border)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        q, k, v = self.qkv(x).reshape(count, length, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * ROOT) @ k.transpose(-2, -1) + self.position
        scores = scores.view(-1, self.windows, H, length, length) + self.border.unsqueeze(1).unsqueeze(0)
        found = torch.softmax(scores.view(-1, H, length, length), -1)
        return (found @ v).transpose(1, 2).reshape(count, length, width)


class LatentAttention(nn.Module):
    """Keys and values from a narrow projection; some features of the keys, turned, are shared by all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.narrow, self.wide = nn.Linear(32, H * 12), nn.Linear(32, 12), nn.Linear(8, H * 14)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, H, 12).transpose(1, 2)
        latent, shared = self.narrow(x).split([8, 4], -1)
        plain, v = self.wide(latent).view(batch, length, H, 14).transpose(1, 2).split([8, 6], -1)
        cos, sin = angles(4)
        q_plain, q_turned = q.split([8, 4], -1)
        q_turned, shared = (y * cos + turned(y) * sin for y in (q_turned, shared.unsqueeze(1)))
        q = torch.cat([q_plain, q_turned], -1)
        k = torch.cat([plain, shared.expand(batch, H, length, 4)], -1)
        return probabilities(q @ k.transpose(-2, -1) * 12**-0.5, v).transpose(1, 2).reshape(batch, length, -1)


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` on one input, with options of its call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.call = {"need_weights": options.pop("need_weights", False), "average": options.pop("average", True)}
        self.inner = nn.MultiheadAttention(H * D, H, batch_first=True, **options)

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.inner(
            x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=self.call["need_weights"],
            average_attn_weights=self.call["average"],
        )[0]  # fmt: skip
        return found


X = heads((B, L, H * D))
ENCODER = nn.TransformerEncoderLayer(H * D, H, 64, batch_first=True)
DECODER = nn.TransformerDecoderLayer(H * D, H, 64, batch_first=True)
MODULES = [
    Entry("vision transformer", VisionAttention(False), X, (Expected(scale=ROOT),)),
    Entry("vision transformer, fused", VisionAttention(True), X, (Expected(scale=None, zero_rows=True, fused=False),), only=("torch",)),
    Entry("windows with a border", WindowAttention(3), heads((6, L, H * D)), (Expected("general", ROOT),)),
    Entry("latent attention", LatentAttention(), heads((B, L, 32)), (Expected(scale=12**-0.5, rotary=(4, 4)),)),
    Entry("MultiheadAttention", SelfAttention(), X, (Expected(scale=None, zero_rows=True, fused=False),), only=("torch",)),
    Entry("MultiheadAttention with weights nobody takes", SelfAttention(need_weights=True), X, (Expected(scale=ROOT),)),
    Entry("MultiheadAttention with padding", SelfAttention(), lambda: (*X(), torch.arange(L).repeat(B, 1) > 3),
          (Expected("general", None, zero_rows=True, fused=False),), only=("torch",)),
    Entry("MultiheadAttention with its own key", SelfAttention(add_bias_kv=True), X,
          (Expected(scale=None, zero_rows=True, fused=False),), only=("torch",)),
    Entry("encoder layer", ENCODER, X, (Expected(scale=None, zero_rows=True, fused=False),), only=("torch",)),
    Entry("decoder layer", DECODER, heads((B, L, H * D), (B, 5, H * D)),
          (Expected(scale=None, zero_rows=True, fused=False),) * 2, only=("torch",)),
]  # fmt: skip

SPELLED = [*SCALES, *MASKS, *SOFTMAXES, *PRODUCTS, *GROUPS, *ROTARY, *MODULES]
