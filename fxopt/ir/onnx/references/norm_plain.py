"""Normalisations without parameters: Lp, mean-variance, local response; and Dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fxopt.ir.onnx.foreign import host_data
from fxopt.ir.onnx.lane import to_scalar
from fxopt.ir.onnx.references.common import first, require
from fxopt.ir.onnx.references.random import generator
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("LpNormalization")
def lp_normalization(call: Call, x: Tensor, axis: int = -1, p: int = 2) -> Tensor:
    """x / ||x||_p along the axis, 0 where the norm is 0."""
    require(p in (1, 2), f"LpNormalization is defined for p 1 and 2, not {p}")
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operators.reference("MeanVarianceNormalization")
def mean_variance_normalization(call: Call, x: Tensor, axes: list[int] | None = None) -> Tensor:
    """(x - mean) / (sqrt(mean(x * x) - mean * mean) + 1e-9)."""
    dims = [0, 2, 3] if axes is None else list(axes)
    mean = x.mean(dims, keepdim=True)
    variance = x.square().mean(dims, keepdim=True) - mean.square()
    return (x - mean) / (variance.sqrt() + 1e-9)


@operators.reference("LRN")
def lrn(call: Call, x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """x / (bias + alpha / size * sum of x * x over `size` neighbouring channels) ** beta."""
    before = (size - 1) // 2
    after = size - 1 - before
    squares = x.square()
    edge = squares.narrow(1, 0, 1)
    zeros = torch.zeros_like(edge)
    padded = torch.cat([zeros] * before + [squares] + [zeros] * after, 1)
    total = padded.narrow(1, 0, x.shape[1])
    for offset in range(1, size):
        total = total + padded.narrow(1, offset, x.shape[1])
    return x / torch.pow(bias + alpha / size * total, beta)


def _dropped(x: Tensor, chance: float, seed: int | None) -> tuple[Tensor, Tensor]:
    """x with a share of zeros and the rest divided by what stays, and the mask of what stays."""
    if isinstance(x, FakeTensor):
        return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    kept = torch.from_numpy(generator(seed).uniform(0, 1, tuple(x.shape)) >= chance).to(x.device)
    return torch.where(kept, x / (1 - chance), torch.zeros_like(x)), kept


@operators.reference("Dropout")
def dropout(
    call: Call,
    x: Tensor,
    ratio: Any = None,
    training_mode: Any = None,
    seed: int | None = None,
    is_test: int = 0,
    consumed_inputs: list[int] | None = None,
) -> Any:
    """x and an all-true mask at inference; in training a share of `ratio` is dropped at random, the rest scaled."""
    if training_mode is not None and bool(to_scalar(host_data(training_mode))):
        chance = 0.5 if ratio is None else float(to_scalar(host_data(ratio)))
        if chance > 0:
            return first(call, *_dropped(x, chance, seed))
    require(call.version >= 7 or bool(is_test), "Dropout below opset 7 with is_test=0 trains")
    mask = torch.ones_like(x, dtype=torch.bool if call.version >= 10 else x.dtype)
    return first(call, x, mask)
