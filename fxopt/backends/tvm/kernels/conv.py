"""Convolution [N, C, H, W] by patches: y = act(W x patches + b), lanes along the pixels of the result.

A block of result rows is copied into a scratch of patches, feature-major [C * kh * kw, pixels], which handles every
stride, padding and dilation; a register tile of outputs x pixels then sums. A 1 x 1 convolution of stride 1 needs no
copy. Weights may be block-sparse: blocks of `outputs` x 1 input, as in `fxopt.backends.tvm.kernels.bsr`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.emit import Expr, Kernel, each, float32, int32, spread, tail
from fxopt.backends.tvm.kernels.activations import Activation, apply
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine

Floats = npt.NDArray[np.float32]
_SCRATCH_BYTES = 128 * 1024  # patches of a block: they stay in the second-level cache
_BLOCK_BYTES = 24 * 1024  # pixels that stay in the first-level cache while all panels go past them


@dataclass(frozen=True)
class Conv:
    """Sizes of a two-dimensional convolution; `pads` are top, left, bottom, right."""

    batch: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: Activation = ""

    @property
    def out_height(self) -> int:
        """Rows of the result."""
        reach = self.dilation[0] * (self.kernel[0] - 1) + 1
        return (self.height + self.pads[0] + self.pads[2] - reach) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Columns of the result."""
        reach = self.dilation[1] * (self.kernel[1] - 1) + 1
        return (self.width + self.pads[1] + self.pads[3] - reach) // self.stride[1] + 1

    @property
    def inner(self) -> int:
        """Products per result."""
        return self.channels // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether the input can be read as it is."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.pads)

    @property
    def block_rows(self) -> int:
        """Result rows that are computed together."""
        return max(1, min(self.out_height, _SCRATCH_BYTES // max(1, 4 * self.inner * self.out_width)))

    @property
    def scratch(self) -> int:
        """Floats of the patches; 0 when none are copied."""
        return 0 if self.is_pointwise else self.inner * self.block_rows * self.out_width


def conv(name: str, size: Conv, machine: Machine, kept: int | None = None) -> Any:
    """`void NAME(x, w, bias, scratch, y)`, weights as `pack_conv` gives; sparse: `w` is `values, inputs, starts`.

    Args:
        kept: number of stored blocks of `machine.outputs` x 1; None: dense. A sparse one has one group.
    """
    kernel = Kernel(name)
    per_group = size.outputs // size.groups
    panels = -(-per_group // machine.outputs)
    x = kernel.buffer("x", size.batch * size.channels * size.height * size.width)
    if kept is None:
        w = kernel.buffer("w", size.groups * panels * size.inner * machine.outputs)
        index = None
    else:
        w = kernel.buffer("values", kept * machine.outputs)
        index = kernel.buffer("inputs", kept, "int32"), kernel.buffer("starts", panels + 1, "int32")
    bias = kernel.buffer("bias", size.groups * panels * machine.outputs)
    scratch = kernel.buffer("scratch", size.scratch) if size.scratch else None
    y = kernel.buffer("y", size.batch * size.outputs * size.out_height * size.out_width)
    emitter = _Emitter(kernel, size, machine, x, w, index, bias, scratch, y)
    with kernel.loop(size.batch, "n") as n, kernel.loop(size.groups, "g") as group:
        emitter.group(n, group)
    return kernel.function()


def pack_conv(weight: Floats, groups: int, outputs: int) -> Floats:
    """[out, in / groups, kh, kw] -> [groups, panels, in / groups * kh * kw, outputs], zero padded."""
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    padded = np.zeros((groups, -(-matrix.shape[1] // outputs) * outputs, matrix.shape[2]), np.float32)
    padded[:, : matrix.shape[1]] = matrix
    return np.ascontiguousarray(padded.reshape(groups, -1, outputs, matrix.shape[2]).transpose(0, 1, 3, 2))


def pack_conv_bias(bias: Floats | None, count: int, groups: int, outputs: int) -> Floats:
    """[out] (zeros when None) -> [groups, panels * outputs]."""
    per_group = count // groups
    padded = np.zeros((groups, -(-per_group // outputs) * outputs), np.float32)
    if bias is not None:
        padded[:, :per_group] = bias.reshape(groups, per_group)
    return padded


@dataclass(frozen=True)
class _Emitter:
    kernel: Kernel
    size: Conv
    machine: Machine
    x: Any
    w: Any
    index: Any
    bias: Any
    scratch: Any
    y: Any

    def group(self, n: Expr, group: Expr) -> None:
        """One group of one image: blocks of rows, then what is left."""
        size, kernel = self.size, self.kernel
        plane = size.height * size.width
        channels = size.channels // size.groups
        start = kernel.let((n * size.channels + group * channels) * plane)
        place = kernel.let(
            (n * size.outputs + group * (size.outputs // size.groups)) * size.out_height * size.out_width
        )
        if size.is_pointwise:
            self.product(self.x, start, plane, plane, group, place)
            return
        full, rest = divmod(size.out_height, size.block_rows)

        def block(row: Expr, rows: int) -> None:
            self.patches(start, row, rows)
            pixels = rows * size.out_width
            self.product(self.scratch, int32(0), pixels, pixels, group, place + row * size.out_width)

        with kernel.loop(full, "block") as index:
            block(index * size.block_rows, size.block_rows)
        if rest:
            block(int32(full * size.block_rows), rest)

    def patches(self, start: Expr, row: Expr, rows: int) -> None:
        """Copy the patches of `rows` result rows from `row` on."""
        size, kernel = self.size, self.kernel
        kh, kw = size.kernel
        pixels = rows * size.out_width
        with kernel.loop(size.channels // size.groups, "c") as c:
            plane = kernel.let(start + c * (size.height * size.width))
            with kernel.loop(kh, "i") as i:
                for j in range(kw):
                    to = kernel.let(((c * kh + i) * kw + j) * pixels)
                    with kernel.loop(rows, "r") as r:
                        source = kernel.let((row + r) * size.stride[0] + (i * size.dilation[0] - size.pads[0]))
                        self.patch_row(plane, source, to + r * size.out_width, j)

    def patch_row(self, plane: Expr, source: Expr, to: Expr, j: int) -> None:
        """One row of patches: x[source, ow * stride + shift], 0 outside."""
        size, kernel = self.size, self.kernel
        step, shift = size.stride[1], j * size.dilation[1] - size.pads[1]
        low = min(size.out_width, max(0, -(shift // step)))
        high = min(size.out_width, max(low, (size.width - 1 - shift) // step + 1))
        inside = tirx.And(source >= int32(0), source < int32(size.height))
        from_row = kernel.let(plane + source * size.width)

        def copy(at: Expr, lanes: int) -> None:
            value = kernel.load(self.x, from_row + (at + low) * step + shift, lanes, step)
            kernel.store(self.scratch, to + low + at, value, lanes)

        self.zero(to, low)
        with kernel.when(inside):
            each(kernel, high - low, self.machine.lanes, copy)
        with kernel.when(tirx.Not(inside)):
            self.zero(to + low, high - low)
        self.zero(to + high, size.out_width - high)

    def zero(self, to: Expr, count: int) -> None:
        """Clear a part of the scratch."""
        kernel = self.kernel
        each(kernel, count, self.machine.lanes, lambda at, n: kernel.store(self.scratch, to + at, float32(0.0, n), n))

    def product(self, source: Any, start: Expr, pixels: int, row: int, group: Expr, place: Expr) -> None:
        """Blocks of pixels, in them panels of outputs, in them tiles of pixels.

        Args:
            row: the distance of two inputs.
            place: where the result lies.
        """
        kernel, machine, size = self.kernel, self.machine, self.size
        full, rest = divmod(size.outputs // size.groups, machine.outputs)
        block = max(1, _BLOCK_BYTES // (4 * max(size.inner, 1)) // machine.pixels) * machine.pixels

        def panel(number: Expr, outputs: int, pixel: Expr, count: int) -> None:
            tiles, left = divmod(count, machine.pixels)
            with kernel.loop(tiles, "tile") as index:
                at = pixel + index * machine.pixels
                self.tile(source, start + at, row, group, number, outputs, place + at, machine.pixels)
            if left:
                at = pixel + tiles * machine.pixels
                self.tile(source, start + at, row, group, number, outputs, place + at, left)

        def panels(pixel: Expr, count: int) -> None:
            with kernel.loop(full, "panel") as number:
                panel(number, machine.outputs, pixel, count)
            if rest:
                panel(int32(full), rest, pixel, count)

        with kernel.loop(pixels // block, "block") as index:
            panels(index * block, block)
        if pixels % block:
            panels(int32(pixels - pixels % block), pixels % block)

    def walk(self, group: Expr, panel: Expr) -> tuple[Expr, Callable[[Expr], tuple[Expr, Expr]]]:
        """How many inputs a panel keeps, and for the p-th one its number and its weights' offset."""
        kernel, outputs = self.kernel, self.machine.outputs
        per_group = self.size.outputs // self.size.groups
        if self.index is None:
            first = kernel.let((group * -(-per_group // outputs) + panel) * (self.size.inner * outputs))
            return self.size.inner, lambda p: (p, first + p * outputs)
        inputs, starts = self.index
        begin = kernel.let(kernel.load(starts, panel))
        extent = kernel.let(kernel.load(starts, panel + 1) - begin)
        return extent, lambda p: (kernel.let(kernel.load(inputs, begin + p)), (begin + p) * outputs)

    def tile(
        self, source: Any, start: Expr, row: int, group: Expr, panel: Expr, outputs: int, place: Expr, pixels: int
    ) -> None:
        """outputs x pixels accumulators."""
        kernel, machine, size = self.kernel, self.machine, self.size
        pieces = tail(pixels, machine.lanes)
        panels = -(-(size.outputs // size.groups) // machine.outputs)
        sums = kernel.local(outputs * machine.pixels)
        for o in range(outputs):
            first = kernel.load(self.bias, (group * panels + panel) * machine.outputs + o)
            for at, lanes in pieces:
                kernel.store(sums, o * machine.pixels + at, spread(first, lanes), lanes)
        extent, step = self.walk(group, panel)
        with kernel.loop(extent, "p") as p:
            number, offset = step(p)
            values = [kernel.let(kernel.load(source, start + number * row + at, lanes)) for at, lanes in pieces]
            for o in range(outputs):
                weight = kernel.let(kernel.load(self.w, offset + o))
                for (at, lanes), value in zip(pieces, values, strict=True):
                    where = o * machine.pixels + at
                    product = spread(weight, lanes) * value
                    kernel.store(sums, where, kernel.load(sums, where, lanes) + product, lanes)
        distance = size.out_height * size.out_width
        for o in range(outputs):
            for at, lanes in pieces:
                value = kernel.let(kernel.load(sums, o * machine.pixels + at, lanes))
                to = place + (panel * machine.outputs + o) * distance + at
                kernel.store(self.y, to, apply(kernel, size.activation, value, lanes), lanes)
