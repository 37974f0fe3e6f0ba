"""Optimizer steps of ai.onnx.preview.training: Adagrad, Adam, Momentum.

Tensors come as all variables, then all gradients, then all states; so do the results, without the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.references.common import first
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("ai.onnx.preview.training")


def _groups(tensors: tuple[Tensor, ...], kinds: int) -> list[tuple[Tensor, ...]]:
    """For every optimized variable its tensors of all kinds: variable, gradient, states."""
    count = len(tensors) // kinds
    return [tensors[index::count] for index in range(count)]


def _joined(call: Call, results: Sequence[tuple[Tensor, ...]]) -> Any:
    """The results in the order of the outputs: of all variables the first, then of all the second, ..."""
    return first(call, *[tensor for kind in zip(*results, strict=True) for tensor in kind])


@operators.reference("Adagrad")
def adagrad(
    call: Call,
    rate: Tensor,
    count: Tensor,
    *tensors: Tensor,
    decay_factor: float = 0.0,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
) -> Any:
    """One step per variable; the state is the sum of squared gradients (Duchi, Hazan and Singer 2011)."""
    effective = rate / (1 + count.to(rate.dtype) * decay_factor)
    results = []
    for x, gradient, total in _groups(tensors, 3):
        regularized = norm_coefficient * x + gradient
        new_total = total + regularized * regularized
        step = effective * regularized / (torch.sqrt(new_total) + epsilon)
        results.append(((x - step).to(x.dtype), new_total.to(x.dtype)))
    return _joined(call, results)


@operators.reference("Adam")
def adam(
    call: Call,
    rate: Tensor,
    count: Tensor,
    *tensors: Tensor,
    alpha: float = 0.9,
    beta: float = 0.999,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> Any:
    """One step per variable; the states are the averages of the gradient and of its square (Kingma and Ba 2015)."""
    times = count.to(torch.float64)
    correction = torch.where(count > 0, torch.sqrt(1 - beta**times) / (1 - alpha**times), torch.ones_like(times))
    effective = rate * correction.to(rate.dtype)
    results = []
    for x, gradient, mean, square in _groups(tensors, 4):
        regularized = norm_coefficient * x + gradient
        new_mean = alpha * mean + (1 - alpha) * regularized
        new_square = beta * square + (1 - beta) * regularized * regularized
        moved = x - effective * new_mean / (torch.sqrt(new_square) + epsilon)
        results.append(tuple(y.to(x.dtype) for y in ((1 - norm_coefficient_post) * moved, new_mean, new_square)))
    return _joined(call, results)


@operators.reference("Momentum")
def momentum(
    call: Call,
    rate: Tensor,
    count: Tensor,
    *tensors: Tensor,
    alpha: float,
    beta: float,
    mode: str,
    norm_coefficient: float,
) -> Any:
    """One step per variable, standard or Nesterov's; the state is the accumulated gradient.

    Raises:
        InvalidInput: an unknown mode.
    """
    if str(mode) not in ("standard", "nesterov"):
        raise InvalidInput(f"mode {mode!r} given; expected 'standard' or 'nesterov'")
    scale = torch.where(count > 0, torch.full_like(rate, beta), torch.ones_like(rate))
    results = []
    for x, gradient, velocity in _groups(tensors, 3):
        regularized = norm_coefficient * x + gradient
        new = alpha * velocity + scale * regularized
        direction = new if str(mode) == "standard" else regularized + alpha * new
        results.append(((x - rate * direction).to(x.dtype), new.to(x.dtype)))
    return _joined(call, results)
