"""Depthwise convolution [N, C, H, W]: each plane is copied into a padded scratch, split by phases of the stride.

With the columns of one phase side by side, every load of the sum is a contiguous vector, whatever the stride.
8-bit codes are summed as floats too: below 2**24 these are integers, which the products of a small window stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fxopt.backends.tvm.codes import Levels
from fxopt.backends.tvm.emit import Expr, Kernel, each, float32, spread
from fxopt.backends.tvm.kernels.activations import apply
from fxopt.backends.tvm.kernels.conv import Conv
from fxopt.backends.tvm.kernels.quantize import float_of, rounded
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import tvm_type


def depthwise_scratch(size: Conv) -> int:
    """Floats of the padded plane."""
    rows, phases, columns = _plane(size)
    return rows * phases * columns


def depthwise(name: str, size: Conv, machine: Machine, levels: tuple[Levels, Levels] | None = None) -> Any:
    """`void NAME(x, w [out, kh, kw], bias [out], [scales [out]], scratch, y)`; `size.groups` is the number of channels.

    Args:
        levels: of x and y, which are then codes; w and bias are integers, and scales those of x and w over that of y.
    """
    kernel = Kernel(name)
    per_channel = size.outputs // size.channels
    kinds = ["float32"] * 2 if levels is None else [tvm_type(item.stored.dtype) for item in levels]
    x = kernel.buffer("x", size.batch * size.channels * size.height * size.width, kinds[0])
    w = kernel.buffer("w", size.outputs * size.kernel[0] * size.kernel[1])
    bias = kernel.buffer("bias", size.outputs)
    scales = None if levels is None else kernel.buffer("scales", size.outputs)
    scratch = kernel.buffer("scratch", depthwise_scratch(size))
    y = kernel.buffer("y", size.batch * size.outputs * size.out_height * size.out_width, kinds[1])
    integers = None if levels is None else replace(levels[0], scale=1.0)
    each(
        kernel, depthwise_scratch(size), machine.lanes,
        lambda at, n: kernel.store(scratch, at, float32(0.0, n), n),
    )  # fmt: skip
    with kernel.loop(size.batch, "n") as n, kernel.loop(size.channels, "c") as c:
        start = kernel.let((n * size.channels + c) * (size.height * size.width))
        _copy(kernel, size, machine, (x, scratch), start, integers)
        with kernel.loop(per_channel, "o") as o:
            channel = kernel.let(c * per_channel + o)
            _sum(
                kernel, size, machine, (w, bias, scales, scratch, y), n, channel, None if levels is None else levels[1]
            )
    return kernel.function()


def _plane(size: Conv) -> tuple[int, int, int]:
    """Rows, phases, columns per phase of the padded plane."""
    rows = (size.out_height - 1) * size.stride[0] + size.dilation[0] * (size.kernel[0] - 1) + 1
    reach = (size.out_width - 1) * size.stride[1] + size.dilation[1] * (size.kernel[1] - 1) + 1
    return rows, size.stride[1], -(-reach // size.stride[1])


def _copy(kernel: Kernel, size: Conv, machine: Machine, buffers: Any, start: Expr, codes: Levels | None) -> None:
    """The inner part of the padded plane; its border stays zero."""
    x, scratch = buffers
    rows, phases, columns = _plane(size)
    count = min(size.height, rows - size.pads[0])
    with kernel.loop(max(count, 0), "h") as h:
        for phase in range(phases):
            low = max(0, -(-(size.pads[1] - phase) // phases))  # first column of the phase inside the image
            first = low * phases + phase - size.pads[1]
            inside = min(columns - low, (size.width - 1 - first) // phases + 1)
            to = kernel.let(((h + size.pads[0]) * phases + phase) * columns + low)
            source = kernel.let(start + h * size.width + first)

            def copy(at: Expr, lanes: int, to: Expr = to, source: Expr = source) -> None:
                value = kernel.load(x, source + at * phases, lanes, phases)
                kernel.store(scratch, to + at, value if codes is None else float_of(codes, value, lanes), lanes)

            each(kernel, max(inside, 0), machine.lanes, copy)


def _sum(
    kernel: Kernel, size: Conv, machine: Machine, buffers: Any, n: Expr, channel: Expr, levels: Levels | None
) -> None:
    w, bias, scales, scratch, y = buffers
    _, phases, columns = _plane(size)
    kh, kw = size.kernel
    weights = [kernel.let(kernel.load(w, channel * (kh * kw) + i)) for i in range(kh * kw)]
    first = kernel.let(kernel.load(bias, channel))
    place = kernel.let((n * size.outputs + channel) * (size.out_height * size.out_width))
    with kernel.loop(size.out_height, "oh") as oh:

        def write(at: Expr, lanes: int) -> None:
            value: Expr = spread(first, lanes)
            for i in range(kh):
                for j in range(kw):
                    shift = j * size.dilation[1]
                    row = (oh * size.stride[0] + i * size.dilation[0]) * phases + shift % phases
                    loaded = kernel.load(scratch, row * columns + shift // phases + at, lanes)
                    value = value + spread(weights[i * kw + j], lanes) * loaded
            if levels is None:
                result = apply(kernel, size.activation, kernel.let(value), lanes)
            else:
                result = rounded(levels, kernel.let(value * spread(kernel.load(scales, channel), lanes)), lanes)
            kernel.store(y, place + oh * size.out_width + at, result, lanes)

        each(kernel, size.out_width, machine.lanes, write)


__all__ = ["depthwise", "depthwise_scratch"]
