"""Random numbers: RandomNormal, RandomUniform (and -Like), Bernoulli, Multinomial.

ONNX fixes distributions, not generators. With a seed they come from numpy's legacy generator, as in ONNX's reference
implementation; without one, from the same generator seeded by torch's (so `torch.manual_seed` fixes them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fxopt.ir.onnx.dtypes import FROM_TORCH, TO_TORCH
from fxopt.ir.onnx.foreign import host_data, is_foreign
from fxopt.ir.onnx.references.cast import convert
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def generator(seed: float | None) -> np.random.RandomState:
    """The generator of a seed; of a seed drawn by torch without one."""
    if seed is None or math.isnan(seed):
        seed = int(torch.randint(0, 2**31, ()))
    return np.random.RandomState(int(seed) % 2**32)


def _drawn(sizes: Any, dtype: int, seed: float | None, draw: Callable[[np.random.RandomState, Any], Any]) -> Tensor:
    """Numbers of float64 precision in this shape and ONNX type; where sizes are symbolic only their type."""
    if any(not isinstance(size, int) for size in sizes):
        return torch.empty(list(sizes), dtype=TO_TORCH[dtype])
    numbers = torch.from_numpy(np.asarray(draw(generator(seed), tuple(sizes)), np.float64))
    return convert(numbers, TO_TORCH[dtype])


def _like(x: Any, dtype: int | None) -> int:
    """The wanted type: the attribute, else that of x, else (strings) float32."""
    if dtype is not None:
        return dtype
    return FROM_TORCH[x.dtype] if isinstance(x, Tensor) else 1 if is_foreign(x) else 7


@operators.reference("RandomNormal")
def random_normal(
    call: Call, shape: list[int], dtype: int = 1, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Normal numbers with this mean and standard deviation."""
    return _drawn(shape, dtype, seed, lambda random, size: random.randn(*size) * scale + mean)


@operators.reference("RandomUniform")
def random_uniform(
    call: Call, shape: list[int], dtype: int = 1, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> Tensor:
    """Uniform numbers from `low` up to `high`."""
    return _drawn(shape, dtype, seed, lambda random, size: random.rand(*size) * (high - low) + low)


@operators.reference("RandomNormalLike", raw=True)
def random_normal_like(
    call: Call, x: Any, dtype: int | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """RandomNormal in the shape, and unless `dtype` says otherwise in the type, of x."""
    result: Tensor = random_normal(call, list(x.shape), _like(x, dtype), mean, scale, seed)
    return result.to(x.device) if isinstance(x, Tensor) else result


@operators.reference("RandomUniformLike", raw=True)
def random_uniform_like(
    call: Call, x: Any, dtype: int | None = None, high: float = 1.0, low: float = 0.0, seed: float | None = None
) -> Tensor:
    """RandomUniform in the shape, and unless `dtype` says otherwise in the type, of x."""
    result: Tensor = random_uniform(call, list(x.shape), _like(x, dtype), high, low, seed)
    return result.to(x.device) if isinstance(x, Tensor) else result


@operators.reference("Bernoulli")
def bernoulli(call: Call, x: Tensor, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """1 with the probability that x says, else 0."""
    wanted = TO_TORCH[dtype] if dtype is not None else x.dtype
    if isinstance(x, FakeTensor):
        return torch.empty_like(x, dtype=wanted)
    numbers = generator(seed).binomial(1, host_data(x.double()))
    return convert(torch.from_numpy(np.asarray(numbers)).to(x.device), wanted)


@operators.reference("Multinomial")
def multinomial(call: Call, x: Tensor, dtype: int = 6, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """`sample_size` classes per row of x, which holds their log-probabilities without normalisation, [N, C]."""
    if isinstance(x, FakeTensor):
        return torch.empty([x.shape[0], sample_size], dtype=TO_TORCH[dtype])
    limits = host_data(torch.softmax(x.double(), -1).cumsum(-1))
    points = generator(seed).rand(x.shape[0], sample_size)
    chosen = (points[..., None] >= limits[:, None, :-1]).sum(-1)
    return torch.from_numpy(chosen).to(device=x.device, dtype=TO_TORCH[dtype])
