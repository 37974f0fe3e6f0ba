"""Convolutions of real numbers: Conv, ConvTranspose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.onnx.references.common import Ints, along, larger, pad_list, pad_with, require
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def halves(totals: Ints, upper: bool) -> tuple[list[Any], list[Any]]:
    """Each total split in two; the odd one goes to the end when `upper`, else to the beginning."""
    small = [total // 2 for total in totals]
    large = [total - half for total, half in zip(totals, small)]
    return (small, large) if upper else (large, small)


def spatial_pads(
    sizes: Ints, kernel: Ints, strides: Ints, dilations: Ints, auto_pad: str, pads: Sequence[int] | None
) -> tuple[list[Any], list[Any]]:
    """The padding before and after every spatial axis."""
    rank = len(kernel)
    if str(auto_pad) in ("SAME_UPPER", "SAME_LOWER"):
        totals = []
        for size, length, stride, dilation in zip(sizes, kernel, strides, dilations):
            steps = (size + stride - 1) // stride - 1
            totals.append(larger(steps * stride + (length - 1) * dilation + 1 - size, 0))
        return halves(totals, str(auto_pad) == "SAME_UPPER")
    if str(auto_pad) == "VALID" or pads is None:
        return [0] * rank, [0] * rank
    return list(pads[:rank]), list(pads[rank:])


def convolve(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """The convolution of x with w plus bias, zero padded."""
    rank = x.dim() - 2
    require(rank in _CONVOLUTIONS, f"a convolution over {rank} axes has no torch reference")
    stride, dilation = strides or [1] * rank, dilations or [1] * rank
    before, after = spatial_pads(x.shape[2:], w.shape[2:], stride, dilation, auto_pad, pads)
    conv = _CONVOLUTIONS[rank]
    if before == after and all(isinstance(pad, int) and pad >= 0 for pad in before):
        return conv(x, w, bias, stride, before, dilation, group)
    return conv(pad_with(x, pad_list(before, after)), w, bias, stride, 0, dilation, group)


@operators.reference("Conv")
def conv(call: Call, x: Tensor, w: Tensor, bias: Tensor | None = None, **attributes: Any) -> Tensor:
    """The convolution of x with w plus bias, zero padded."""
    return convolve(x, w, bias, **attributes)


@operators.reference("ConvTranspose")
def conv_transpose(
    call: Call,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """The transposed convolution (the gradient of Conv) of x with w plus bias."""
    rank = x.dim() - 2
    require(rank in _TRANSPOSED, f"a transposed convolution over {rank} axes has no torch reference")
    stride, dilation = strides or [1] * rank, dilations or [1] * rank
    extra = output_padding or [0] * rank
    same = str(auto_pad) in ("SAME_UPPER", "SAME_LOWER")
    if output_shape is not None or same:
        wanted = output_shape or [size * step for size, step in zip(x.shape[2:], stride)]
        full = [
            step * (size - 1) + more + (length - 1) * spread + 1
            for step, size, more, length, spread in zip(stride, x.shape[2:], extra, w.shape[2:], dilation)
        ]
        totals = [size - want for size, want in zip(full, wanted[-rank:])]
        if output_shape is None:
            totals = [larger(total, 0) for total in totals]
        require(all(total >= -1 for total in totals), f"ConvTranspose to output_shape {output_shape}: negative padding")
        before, after = halves(totals, str(auto_pad) == "SAME_UPPER")
    else:
        before, after = spatial_pads([], w.shape[2:], stride, dilation, auto_pad, pads)
    fits = all(more < max(step, spread) for more, step, spread in zip(extra, stride, dilation))
    if before == after and fits and all(isinstance(pad, int) and pad >= 0 for pad in before):
        result: Tensor = _TRANSPOSED[rank](x, w, bias, stride, before, extra, group, dilation)
        return result
    whole = _TRANSPOSED[rank](x, w, None, stride, 0, 0, group, dilation)
    cut = pad_with(whole, pad_list([-pad for pad in before], [more - pad for more, pad in zip(extra, after)]))
    return cut if bias is None else cut + along(bias, cut.dim(), 1)
