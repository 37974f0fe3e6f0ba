"""What looks like attention and is none, or none that can be fused: the reason is part of the entry."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.attention.entries import B, D, Entry, Expected, H, L, S, heads, with_mask
from tests.attention.spelled import TRIL, keys_seen, probabilities

WEIGHT = torch.randn(D, 16, generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(16, D, generator=torch.Generator().manual_seed(1))
TEMPERATURE = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(H, 1, 1)


def weights_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.softmax(q @ k.transpose(-2, -1), -1)
    return found @ v, found


def used_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = torch.softmax(q @ k.transpose(-2, -1), -1)
    return found @ v + found @ (v * v)


def scores_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1)
    return probabilities(scores * 0.5, v), scores.amax(-1)


def relative(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return probabilities(q @ k.transpose(-2, -1) + q @ r.transpose(-2, -1), v)


def temperature_of_the_input(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(q @ k.transpose(-2, -1) * q.mean((-1, -2), keepdim=True), v)


def filled_with_a_value(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return probabilities(torch.where(m, q @ k.transpose(-2, -1), v.amin()), v)


def softcap_over_the_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return probabilities(torch.tanh((q @ k.transpose(-2, -1) + m) / 3.0) * 3.0, v)


def scaled_over_the_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return probabilities(torch.tanh(q @ k.transpose(-2, -1) / 3.0) * 3.0 * 0.5, v)


def talking_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = torch.einsum("bhqk,hg->bgqk", q @ k.transpose(-2, -1), torch.eye(H))
    return probabilities(mixed, v)


def router(x: Tensor) -> tuple[Tensor, Tensor]:
    values, places = torch.softmax(x @ WEIGHT, -1).topk(2)
    return values, places


def kept_column(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.cat([q @ k.transpose(-2, -1), torch.zeros(B, H, L, 1)], -1)
    return torch.softmax(scores, -1) @ torch.cat([v, torch.zeros(B, H, 1, D)], -2)


def dropped_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), -1)[..., :-1] @ v[:, :, :-1]


def grouped_unevenly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.repeat_interleave(2, 1).transpose(-2, -1), -1) @ v


NOT_CONSTANT = "which is not one constant number"
UNKNOWN = [
    Entry("softmax over the queries", lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1), -2) @ v, heads(),
          ("the softmax runs over axis",)),
    Entry("weights are an output", weights_too, heads(), ("its probabilities softmax are also an output of the model",),
          only=("torch",)),
    Entry("weights are used twice", used_twice, heads(), ("its probabilities softmax are taken by matmul_1",), only=("torch",)),
    Entry("scores are used too", scores_too, heads(), ("its inner value matmul is also used by amax (amax.default)",),
          only=("torch",)),
    Entry("a function of the scores", lambda q, k, v: probabilities(torch.relu(q @ k.transpose(-2, -1)), v), heads(),
          ("between q @ k.T and the softmax there is relu (relu.default), which is not understood",), only=("torch",)),
    Entry("a function of the weights", lambda q, k, v: torch.softmax(q @ k.transpose(-2, -1), -1).square() @ v, heads(),
          ("its probabilities softmax are taken by square (square.default), not by a product with values",), only=("torch",)),
    Entry("relative positions", relative, heads((B, H, L, D), (B, H, S, D), (B, H, S, D), (S, D)),
          ("two products are added before the softmax, matmul (matmul.default) and matmul_1 (matmul.default)",), only=("torch",)),
    Entry("a temperature per head", lambda q, k, v: probabilities(q @ k.transpose(-2, -1) * TEMPERATURE, v), heads(),
          ("the scores are multiplied by ",), only=("torch",)),
    Entry("a temperature of the input", temperature_of_the_input, heads(),
          ("the scores are multiplied by mean (mean.dim), " + NOT_CONSTANT,), only=("torch",)),
    Entry("a filler of the input", filled_with_a_value, with_mask(keys_seen),
          ("where (where.self) puts amin (amin.default) where it hides, " + NOT_CONSTANT,), only=("torch",)),
    Entry("a filler that does not hide", lambda q, k, v, m: probabilities((q @ k.transpose(-2, -1)).masked_fill(~m, -5.0), v),
          with_mask(keys_seen), ("masked_fill (masked_fill.Scalar) puts -5.0 where it hides; at most -10000.0 hides",), only=("torch",)),
    Entry("a soft cap over the mask", softcap_over_the_mask, with_mask(lambda: torch.randn(L, S)),
          ("the soft cap is applied behind the mask x_3",), only=("torch",)),
    Entry("a scale over the soft cap", scaled_over_the_softcap, heads(), ("the scores are scaled behind the soft cap mul",),
          only=("torch",)),
    Entry("heads that talk", talking_heads, heads(), ("between q @ k.T and the softmax there is einsum (einsum.default), which is not understood",),
          only=("torch",)),
    Entry("linears around a softmax", lambda x: torch.softmax(x @ WEIGHT, -1) @ TABLE, heads((B, L, D)),
          ("matmul_1 (matmul.default) multiplies its probabilities with a constant matrix: a linear",), only=("torch",)),
    Entry("a table behind the softmax", lambda q, k: torch.softmax(q @ k.transpose(-2, -1), -1) @ TABLE[:S], heads((B, L, D), (B, S, D)),
          ("matmul_1 (matmul.default) multiplies its probabilities with a constant matrix: a linear",), only=("torch",)),
    Entry("a router", router, heads((B, L, D)), ("its probabilities softmax are taken by topk",), only=("torch",)),
    Entry("a classifier", lambda x: torch.softmax(x @ WEIGHT, -1), heads((B, D)), ("its probabilities softmax are an output",),
          only=("torch",)),
    Entry("a column that is kept", kept_column, heads(), ("it adds a column to its scores and keeps it",), only=("torch",)),
    Entry("a key that is dropped", dropped_key, heads(), ("it drops a key behind the softmax",), only=("torch",)),
    Entry("a mask that widens the scores", lambda q, k, v, m: probabilities(q @ k.transpose(-2, -1) + m, v),
          with_mask(lambda: torch.randn(5, 1, L, S), (1, H, L, D), (1, H, S, D), (5, H, S, D)),
          ("the mask x_3 makes scores [5, 4, 6, 6] of scores [1, 4, 6, 6]",), only=("torch",)),
    Entry("keys repeated and values not", grouped_unevenly, heads((B, H, L, D), (B, 2, S, D), (B, H, S, D)),
          ("the heads of its keys are repeated 2 times, those of its values 1 times",), only=("torch",)),
    Entry("rows may be without keys", lambda q, k, v, m: probabilities((q @ k.transpose(-2, -1)).masked_fill(~m, -math.inf), v),
          with_mask(keys_seen), (Expected("padding", fused=False, reason="may leave rows without keys, which are NaN"),)),
    Entry("a constant that hides all keys of a row",
          lambda q, k, v: probabilities((q @ k.transpose(-2, -1)).masked_fill(~(TRIL & (torch.arange(S) > 1)), -math.inf), v), heads(),
          (Expected("general", fused=False, reason="its mask hides every key of some rows"),)),
]  # fmt: skip
