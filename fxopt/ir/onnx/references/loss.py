"""Losses of classification: NegativeLogLikelihoodLoss, SoftmaxCrossEntropyLoss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.ir.onnx.references.common import first
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def _loss(log_prob: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None, reduction: str) -> Tensor:
    """-weight[target] * log_prob[target] per element, or its sum, or the mean weighted with the weights."""
    index = target.to(torch.int64)
    kept = torch.ones_like(index, dtype=torch.bool) if ignore_index is None else index != ignore_index
    safe = torch.where(kept, index, torch.zeros_like(index))
    picked = -log_prob.gather(1, safe.unsqueeze(1)).squeeze(1)
    factor = kept.to(log_prob.dtype) if weight is None else torch.where(kept, weight[safe], torch.zeros_like(picked))
    loss = torch.where(kept, picked * factor, torch.zeros_like(picked))
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / factor.sum()


@operators.reference("NegativeLogLikelihoodLoss")
def negative_log_likelihood_loss(
    call: Call,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-weight[target] * log_prob[target], reduced; targets equal to `ignore_index` do not count."""
    return _loss(log_prob, target, weight, ignore_index, str(reduction))


@operators.reference("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy_loss(
    call: Call,
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Any:
    """-weight[target] * log_softmax(scores)[target], reduced; also log_softmax(scores)."""
    log_prob = torch.log_softmax(scores, 1)
    return first(call, _loss(log_prob, target, weight, ignore_index, str(reduction)), log_prob)
