"""What the classifiers and regressors of ai.onnx.ml share: number types, score transforms, labels; declares nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.foreign import host_data, strings
from fxopt.ir.onnx.registry import Operators

operators = Operators("ai.onnx.ml")

TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")
_ZERO = 1e-7  # what SOFTMAX_ZERO takes for zero


def as_float(x: Tensor) -> Tensor:
    """x in the type that the operators compute in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def as_rows(x: Tensor) -> Tensor:
    """[C] as [1, C]; [N, C] as it is."""
    return x.reshape(1, -1) if x.dim() == 1 else x


def vector(values: Any, like: Tensor) -> Tensor:
    """A list of numbers, or a tensor attribute, as a tensor of the type and device of `like`."""
    if isinstance(values, Tensor):
        return values.to(device=like.device, dtype=like.dtype)
    return torch.tensor(values or [], dtype=torch.float64, device=like.device).to(like.dtype)


def _softmax_zero(scores: Tensor) -> Tensor:
    """Softmax over the scores that are not zero; zeros stay (nearly) zero."""
    peak = scores.amax(-1, keepdim=True)
    weights = torch.where(scores.abs() > _ZERO, torch.exp(scores - peak), scores * torch.exp(-peak))
    total = weights.sum(-1, keepdim=True)
    return torch.where(total == 0, torch.full_like(weights, 0.5), weights / total)


def transform(scores: Tensor, name: str) -> Tensor:
    """`post_transform` of scores [N, C]; PROBIT is the inverse of the normal distribution function, exactly.

    Raises:
        InvalidInput: there is no such transform.
    """
    if name not in TRANSFORMS:
        raise InvalidInput(f"post_transform {name!r} given; expected one of {', '.join(TRANSFORMS)}")
    if name == "LOGISTIC":
        return torch.sigmoid(scores)
    if name == "SOFTMAX":
        return torch.softmax(scores, -1)
    if name == "SOFTMAX_ZERO":
        return _softmax_zero(scores)
    return torch.special.ndtri(scores) if name == "PROBIT" else scores


def labels_of(indices: Tensor, integers: list[int] | None, texts: list[str] | None) -> Any:
    """The labels at the indices [N]: int64, or strings in an array; the indices themselves without labels."""
    if texts:
        return strings(texts)[host_data(indices)]
    if not integers:
        return indices
    return torch.tensor(integers, dtype=torch.int64, device=indices.device)[indices]
