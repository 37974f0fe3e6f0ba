"""New tensors: Constant, ConstantOfShape, Range, EyeLike, OneHot, window functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import MissingReference
from fxopt.ir.onnx.dtypes import TO_TORCH
from fxopt.ir.onnx.foreign import host_data
from fxopt.ir.onnx.lane import HOST_LIMIT, HostArray, has_symbol, is_host, to_ints, to_scalar, to_tensor
from fxopt.ir.onnx.references.common import require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("Constant")
def constant(
    call: Call,
    value: Any = None,
    value_int: int | None = None,
    value_ints: list[int] | None = None,
    value_float: float | None = None,
    value_floats: list[float] | None = None,
    **other: Any,
) -> Any:
    """The attribute; integers that are no tensor become host arrays."""
    if value is not None:
        return value
    if value_int is not None:
        return np.array(value_int, np.int64)
    if value_ints is not None:
        return np.array(value_ints, np.int64)
    if value_float is not None:
        return torch.tensor(value_float, dtype=torch.float32)
    if value_floats is not None:
        return torch.tensor(value_floats, dtype=torch.float32)
    raise MissingReference(f"Constant with {', '.join(other) or 'no value'} has no torch reference")


@operators.reference("ConstantOfShape", raw=True)
def constant_of_shape(call: Call, shape: Any, value: Any = None) -> Tensor:
    """A tensor of this shape, filled with the one element of `value`, by default float32 zero."""
    sizes = to_ints(shape) or []
    if value is None:
        return torch.zeros(sizes, dtype=torch.float32)
    filler: Tensor = to_tensor(value)
    return filler.reshape(()).expand(sizes)


@operators.host("ConstantOfShape")
def host_constant_of_shape(call: Call, shape: HostArray, value: Any = None) -> Any:
    """A small host array of this concrete shape, when the value is a host integer."""
    if not is_host(value) or has_symbol(shape) or np.prod(shape, dtype=float) > HOST_LIMIT:
        return NotImplemented
    return np.full(to_ints(shape) or [], value.reshape(-1)[0], dtype=value.dtype)


@operators.reference("Range", raw=True)
def arange(call: Call, start: Any, limit: Any, delta: Any, stash_type: int = 1) -> Tensor:
    """start, start + delta, ... up to but without limit; 16-bit numbers are computed in float32."""
    require(stash_type == 1, f"Range with stash_type {stash_type}")
    bounds = (start, limit, delta)
    typed = [bound for bound in bounds if isinstance(bound, Tensor)]
    known = [bound.dtype for bound in bounds if isinstance(bound, np.ndarray) and bound.dtype != object]
    dtype = typed[0].dtype if typed else torch.int64
    if not typed and known:
        dtype = torch.from_numpy(np.empty(0, known[0])).dtype
    low, high, step = (to_scalar(bound) for bound in bounds)
    if (high - low) / step <= 0:
        return torch.empty(0, dtype=dtype)
    device = typed[0].device if typed else None
    return torch.arange(low, high, step, dtype=dtype, device=device)


@operators.host("Range")
def host_arange(call: Call, start: HostArray, limit: HostArray, delta: HostArray, stash_type: int = 1) -> Any:
    """A small concrete range as a host array."""
    if any(has_symbol(bound) for bound in (start, limit, delta)):
        return NotImplemented
    result = np.arange(to_scalar(start), to_scalar(limit), to_scalar(delta), dtype=start.dtype)
    return result if start.dtype != object and result.size <= HOST_LIMIT else NotImplemented


@operators.reference("EyeLike")
def eye_like(call: Call, x: Tensor, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on the k-th diagonal of a matrix of x's shape, else zeros."""
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    columns = torch.arange(x.shape[1], device=x.device)
    return (columns - rows == k).to(x.dtype if dtype is None else TO_TORCH[dtype])


@operators.reference("OneHot", raw=True)
def one_hot(call: Call, indices: Any, depth: Any, values: Any, axis: int = -1) -> Tensor:
    """values[1] where the index equals the position along a new axis, else values[0]; negative indices wrap."""
    size = to_scalar(depth)
    if isinstance(size, float):
        size = int(size)
    index: Tensor = to_tensor(indices)
    if not index.is_floating_point():
        index = index.to(torch.int64)
    index = torch.where(index < 0, index + size, index)
    axis %= index.dim() + 1
    positions = torch.arange(size, device=index.device)
    hit = index.unsqueeze(axis) == positions.reshape([-1] + [1] * (index.dim() - axis))
    off_on: Tensor = to_tensor(values)
    return torch.where(hit, off_on[1], off_on[0])


def _cosine_window(size: Any, periodic: int, dtype: int, coefficients: tuple[float, ...]) -> Tensor:
    """a0 - a1 cos(2 pi n / N) + a2 cos(4 pi n / N) over n < size, with N = size when periodic, else size - 1."""
    length = int(to_scalar(size))
    phase = torch.arange(length, dtype=torch.float64) * (2 * torch.pi / (length if periodic else max(length - 1, 1)))
    terms = [(-1) ** order * value * torch.cos(order * phase) for order, value in enumerate(coefficients)]
    return torch.stack(terms).sum(0).to(TO_TORCH[dtype])


@operators.reference("HannWindow", raw=True)
def hann_window(call: Call, size: Any, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """0.5 - 0.5 cos(2 pi n / N)."""
    return _cosine_window(size, periodic, output_datatype, (0.5, 0.5))


@operators.reference("HammingWindow", raw=True)
def hamming_window(call: Call, size: Any, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """25/46 - 21/46 cos(2 pi n / N)."""
    return _cosine_window(size, periodic, output_datatype, (25 / 46, 21 / 46))


@operators.reference("BlackmanWindow", raw=True)
def blackman_window(call: Call, size: Any, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    """0.42 - 0.5 cos(2 pi n / N) + 0.08 cos(4 pi n / N)."""
    return _cosine_window(size, periodic, output_datatype, (0.42, 0.5, 0.08))


def _mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


@operators.reference("MelWeightMatrix", raw=True)
def mel_weight_matrix(
    call: Call,
    num_mel_bins: Any,
    dft_length: Any,
    sample_rate: Any,
    lower_edge_hertz: Any,
    upper_edge_hertz: Any,
    output_datatype: int = 1,
) -> Tensor:
    """Triangular filters [dft_length // 2 + 1, num_mel_bins] with evenly spaced edges in mel, 2595 log10(1 + f / 700).

    The spacing is (upper - lower) / (num_mel_bins + 2), as in ONNX's reference implementation.
    """
    given = (num_mel_bins, dft_length, sample_rate, lower_edge_hertz, upper_edge_hertz)
    bins, length, rate, low, high = (to_scalar(host_data(value)) for value in given)
    step = (_mel(high) - _mel(low)) / (bins + 2)
    hertz = [700 * (10 ** ((_mel(low) + index * step) / 2595) - 1) for index in range(bins + 2)]
    edges = [int((length + 1) * frequency // rate) for frequency in hertz]
    weights = torch.zeros([length // 2 + 1, bins], dtype=torch.float64)
    for index, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:])):
        for position in range(left, centre):
            weights[position, index] = (position - left) / (centre - left)
        for position in range(centre, max(right, centre + 1)):
            weights[position, index] = (right - position) / (right - centre) if right > centre else 1.0
    return weights.to(TO_TORCH[output_datatype])
