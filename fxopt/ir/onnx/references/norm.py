"""Normalisations with learned scale: layer, RMS, group, instance and batch norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.dtypes import TO_TORCH
from fxopt.ir.onnx.references.common import along, at_least_float32, first, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


@operators.reference("LayerNormalization")
def layer_normalization(
    call: Call,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Any:
    """(x - mean) / sqrt(var + epsilon) * scale + bias over the axes from `axis` on; also mean and 1 / deviation.

    Statistics are at least float32, float64 where x is.
    """
    axis %= x.dim()
    same_shape = scale.dim() == x.dim() - axis and tuple(scale.shape) == tuple(x.shape[axis:])
    same_type = scale.dtype == x.dtype and (bias is None or (bias.dtype == x.dtype and bias.shape == scale.shape))
    if call.outputs == 1 and same_shape and same_type:
        return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)
    axes = list(range(axis, x.dim()))
    wide = at_least_float32(x)
    mean = wide.mean(axes, keepdim=True)
    centred = wide - mean
    inverse = torch.rsqrt(centred.square().mean(axes, keepdim=True) + epsilon)
    y = (centred * inverse).to(x.dtype) * scale
    if bias is not None:
        y = y + bias
    stash = torch.float64 if x.dtype == torch.float64 else TO_TORCH[stash_type]
    return first(call, y, mean.to(stash), inverse.to(stash))


@operators.reference("RMSNormalization")
def rms_normalization(
    call: Call, x: Tensor, scale: Tensor, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """x / sqrt(mean(x * x) + epsilon) * scale over the axes from `axis` on."""
    axes = list(range(axis % x.dim(), x.dim()))
    wide = at_least_float32(x)
    inverse = torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return (wide * inverse).to(x.dtype) * scale


@operators.reference("SimplifiedLayerNormalization")
def simplified_layer_normalization(
    call: Call, x: Tensor, scale: Tensor, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    """RMSNormalization under the name that ONNX Runtime gives it; also 1 / root mean square."""
    y = rms_normalization(call, x, scale, axis, epsilon, stash_type)
    if call.outputs == 1:
        return y
    axes = list(range(axis % x.dim(), x.dim()))
    return y, torch.rsqrt(at_least_float32(x).square().mean(axes, keepdim=True) + epsilon)


@operators.reference("GroupNormalization")
def group_normalization(
    call: Call,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    """(x - mean) / sqrt(var + epsilon) * scale + bias over groups of channels; scale is per group below opset 21."""
    if call.version < 21:
        repeats = x.shape[1] // num_groups
        scale, bias = (vector.repeat_interleave(repeats) for vector in (scale, bias))
    return torch.group_norm(x, num_groups, scale, bias, epsilon)


@operators.reference("InstanceNormalization")
def instance_normalization(
    call: Call,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    epsilon: float = 1e-5,
    consumed_inputs: list[int] | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + epsilon) * scale + bias over the spatial axes."""
    return torch.instance_norm(x, scale, bias, None, None, True, 0.0, epsilon, False)


@operators.reference("BatchNormalization")
def batch_normalization(
    call: Call,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
    is_test: int = 0,
    consumed_inputs: list[int] | None = None,
) -> Any:
    """(x - mean) / sqrt(var + epsilon) * scale + bias per channel; in training mode with the statistics of x.

    Below opset 14 several outputs ask for training; with `spatial` 0 (below 9) there is a parameter for every element
    of a sample.
    """
    if training_mode if call.version >= 14 else call.outputs > 1:
        require(bool(spatial), "BatchNormalization in training with spatial=0 has no torch reference")
        return _training(call, x, scale, bias, mean, var, epsilon, momentum)
    require(call.version >= 7 or bool(is_test), "BatchNormalization below opset 7 with is_test=0 trains")
    if not spatial:
        return (x - mean) * torch.rsqrt(var + epsilon) * scale + bias
    if x.dtype == scale.dtype == bias.dtype == mean.dtype == var.dtype and x.dim() >= 2:
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
    return _affine(x, scale, bias, mean, var, epsilon)


def _affine(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, epsilon: float) -> Tensor:
    wide = at_least_float32(x)
    channel = 1 if x.dim() > 1 else 0
    factor, shift, centre, spread = (along(at_least_float32(v), x.dim(), channel) for v in (scale, bias, mean, var))
    return ((wide - centre) * torch.rsqrt(spread + epsilon) * factor + shift).to(x.dtype)


def _training(
    call: Call,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    epsilon: float,
    momentum: float,
) -> Any:
    axes = [axis for axis in range(x.dim()) if axis != 1]
    wide = at_least_float32(x)
    batch_mean = wide.mean(axes)
    batch_var = wide.var(axes, correction=0)
    y = _affine(x, scale, bias, batch_mean, batch_var, epsilon)
    running_mean = mean * momentum + batch_mean * (1 - momentum)
    running_var = var * momentum + batch_var * (1 - momentum)
    running = running_mean.to(mean.dtype), running_var.to(var.dtype)
    return first(call, y, *running, batch_mean.to(mean.dtype), batch_var.to(var.dtype))
