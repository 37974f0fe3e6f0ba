"""Convolution of 8-bit codes [N, C, H, W]: y = clamp(round((sums + bias) * scales) + zero), lanes along the pixels.

As the float one (`fxopt.backends.tvm.kernels.conv`): patches of a block of result pixels, then tiles of outputs x
pixels. Patches are interleaved in groups of inputs, which the machine's instruction sums at a time; of a 1 x 1
convolution of stride 1 the planes are interleaved as they lie. Outside of the image lies the zero point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.codes import Levels
from fxopt.backends.tvm.emit import Expr, Kernel, cast, each, int32, reinterpret, spread, tail, typed
from fxopt.backends.tvm.kernels.conv import Conv
from fxopt.backends.tvm.kernels.dot import Dot, in_groups, multiply, spread_weight
from fxopt.backends.tvm.kernels.quantize import rounded
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import tvm_type

_BLOCK_BYTES = 32 * 1024  # interleaved patches of a block


def block_rows(size: Conv, dot: Dot) -> int:
    """Result rows that are computed together."""
    each_row = 2 * in_groups(size.inner, dot) * size.out_width
    return max(1, min(size.out_height, _BLOCK_BYTES // max(1, each_row)))


def block_pixels(size: Conv, dot: Dot, machine: Machine) -> int:
    """Result pixels that are computed together, in whole tiles."""
    if size.is_pointwise:
        pixels = min(size.height * size.width, max(1, _BLOCK_BYTES // (2 * in_groups(size.inner, dot))))
    else:
        pixels = block_rows(size, dot) * size.out_width
    return -(-pixels // machine.pixels) * machine.pixels


def work_spaces(size: Conv, dot: Dot, machine: Machine) -> list[tuple[str, int]]:
    """Types and sizes of what the function needs behind its operands; what it has no use for is left out."""
    pixels, inner = block_pixels(size, dot, machine), in_groups(size.inner, dot)
    panels = size.groups * -(-(size.outputs // size.groups) // machine.outputs)
    spaces = [(dot.x.dtype, inner * pixels)]  # interleaved
    spaces += [] if size.is_pointwise else [(dot.x.dtype, inner * pixels)]
    spaces += [("int32", panels * inner // 2 * machine.outputs)] if dot.group == 2 else []
    return spaces + ([("int32", pixels)] if dot.raised else [])


def pack_conv_codes(codes: npt.NDArray[np.int8], groups: int, outputs: int, dot: Dot) -> npt.NDArray[Any]:
    """[out, in / groups, kh, kw] -> [groups, panels, inner / group, outputs, group]; groups of four as one int32."""
    matrix = codes.reshape(groups, codes.shape[0] // groups, -1)
    inner = in_groups(matrix.shape[2], dot)
    padded = np.zeros((groups, -(-matrix.shape[1] // outputs) * outputs, inner), np.int16)
    padded[:, : matrix.shape[1], : matrix.shape[2]] = matrix.astype(np.int16) + dot.raised
    packed = padded.reshape(groups, -1, outputs, inner // dot.group, dot.group).transpose(0, 1, 3, 2, 4)
    whole = np.ascontiguousarray(packed.astype(np.int8 if not dot.raised else np.uint8))
    return whole.view(np.int32)[..., 0] if dot.group == 4 else whole


def pack_per_output(values: npt.NDArray[Any], groups: int, outputs: int) -> npt.NDArray[Any]:
    """[out] -> [groups, panels * outputs], zero padded."""
    per_group = len(values) // groups
    padded = np.zeros((groups, -(-per_group // outputs) * outputs), values.dtype)
    padded[:, :per_group] = values.reshape(groups, per_group)
    return padded


def conv_int8(name: str, size: Conv, x: Levels, y: Levels, dot: Dot, machine: Machine) -> Any:
    """`void NAME(x, w, bias, scales, [work spaces], y)`.

    x and y are stored as their levels say; w as `pack_conv_codes` gives; bias int32 (less zero * the sums of the codes)
    and scales float32 (of x and W over that of y) as `pack_per_output` gives.
    """
    return ConvWriter(name, size, x, y, dot, machine).function()


class ConvWriter:
    """The parts of the function; a block-sparse convolution has others."""

    def __init__(self, name: str, size: Conv, x: Levels, y: Levels, dot: Dot, machine: Machine) -> None:
        self.kernel, self.size, self.dot, self.machine = Kernel(name), size, dot, machine
        self.levels = y
        self.inner, self.per_group = in_groups(size.inner, dot), size.outputs // size.groups
        self.panels, self.pixels = -(-self.per_group // machine.outputs), block_pixels(size, dot, machine)
        self.outside = tirx.IntImm(tvm_type(x.stored.dtype), x.zero - x.shift)
        kernel, kind = self.kernel, tvm_type(dot.x.dtype)
        self.x = kernel.buffer("x", size.batch * size.channels * size.height * size.width, kind)
        given = self.declare_weights()
        self.bias = kernel.buffer("bias", size.groups * self.panels * machine.outputs, "int32")
        self.scales = kernel.buffer("scales", size.groups * self.panels * machine.outputs)
        self.declare_spaces(given)
        self.y = kernel.buffer(
            "y", size.batch * size.outputs * size.out_height * size.out_width, tvm_type(y.stored.dtype)
        )
        self.prepare(given)

    def declare_weights(self) -> Any:
        """The parameters for W."""
        count = self.size.groups * self.panels * self.inner * self.machine.outputs
        return self.kernel.buffer("w", *((count // 4, "int32") if self.dot.group == 4 else (count, "int8")))

    def declare_spaces(self, given: Any) -> None:
        """The work spaces."""
        size, dot = self.size, self.dot
        spaces = [
            self.kernel.buffer(f"space{i}", space, tvm_type(dtype))
            for i, (dtype, space) in enumerate(work_spaces(size, dot, self.machine))
        ]
        self.packed = spaces.pop(0)
        self.rows = self.x if size.is_pointwise else spaces.pop(0)
        self.w = spaces.pop(0) if dot.group == 2 else given
        self.sums = spaces.pop(0) if dot.raised else None

    def prepare(self, given: Any) -> None:
        """What is done once."""
        kernel, count = self.kernel, self.size.groups * self.panels * self.inner * self.machine.outputs
        if self.dot.group == 2:
            each(kernel, count // 2, 4, lambda at, n: kernel.store(self.w, at, self.widened(given, at, n), n))

    def widened(self, given: Any, at: Expr, n: int) -> Expr:
        """Pairs of codes in 16 bits each, as one word."""
        pairs = cast(typed("int16", 2 * n), self.kernel.load(given, at * 2, 2 * n))
        return reinterpret(typed("int32", n), pairs)

    def function(self) -> Any:
        kernel, size = self.kernel, self.size
        plane, channels = size.height * size.width, size.channels // size.groups
        distance = size.out_height * size.out_width
        with kernel.loop(size.batch, "n") as n, kernel.loop(size.groups, "g") as group:
            start = kernel.let((n * size.channels + group * channels) * plane)
            place = kernel.let((n * size.outputs + group * self.per_group) * distance)
            if size.is_pointwise:
                full, rest = divmod(plane, self.pixels)
                with kernel.loop(full, "block") as index:
                    self.block(start + index * self.pixels, plane, self.pixels, group, place + index * self.pixels)
                if rest:
                    at = full * self.pixels
                    self.block(start + at, plane, rest, group, place + at)
            else:
                self.by_rows(start, group, place, block_rows(size, self.dot))
        return kernel.function()

    def by_rows(self, start: Expr, group: Expr, place: Expr, step: int) -> None:
        """Blocks of result rows: their patches, then the products."""
        kernel, size = self.kernel, self.size
        full, rest = divmod(size.out_height, step)

        def rows(first: Expr, count: int) -> None:
            pixels = count * size.out_width
            self.patches(start, first, count)
            self.block(int32(0), pixels, pixels, group, place + first * size.out_width)

        with kernel.loop(full, "rows") as index:
            rows(index * step, step)
        if rest:
            rows(int32(full * step), rest)

    # ---- patches

    def patches(self, start: Expr, row: Expr, rows: int) -> None:
        """Copy the patches of `rows` result rows from `row` on, [inner, pixels]."""
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
                        self.patch_row(plane, source, kernel.let(to + r * size.out_width), j)

    def patch_row(self, plane: Expr, source: Expr, to: Expr, j: int) -> None:
        """One row of patches: x[source, ow * stride + shift], the zero point outside."""
        size, kernel = self.size, self.kernel
        step, shift = size.stride[1], j * size.dilation[1] - size.pads[1]
        low = min(size.out_width, max(0, -(shift // step)))
        high = min(size.out_width, max(low, (size.width - 1 - shift) // step + 1))
        inside = tirx.And(source >= int32(0), source < int32(size.height))
        begin = kernel.let(plane + source * size.width + (low * step + shift))

        def copy(at: Expr, lanes: int) -> None:
            kernel.store(self.rows, to + low + at, kernel.load(self.x, begin + at * step, lanes, step), lanes)

        self.fill(to, low)
        with kernel.when(inside):
            each(kernel, high - low, 16 if step == 1 else 1, copy)
        with kernel.when(tirx.Not(inside)):
            self.fill(to + low, high - low)
        self.fill(to + high, size.out_width - high)

    def fill(self, to: Expr, count: int) -> None:
        """Zero points."""
        kernel = self.kernel
        each(kernel, count, 16, lambda at, n: kernel.store(self.rows, to + at, spread(self.outside, n), n))

    def interleave(self, start: Expr, row: int, pixels: int) -> None:
        """Rows of inputs -> [inner / group, pixels, group]; inputs that do not exist have weights of zero."""
        kernel, group = self.kernel, self.dot.group
        full, rest = divmod(self.size.inner, group)

        def one(g: Expr, count: int) -> None:
            def write(at: Expr, n: int) -> None:
                first = start + (g * group) * row + at
                loaded = [kernel.let(kernel.load(self.rows, first + i * row, n)) for i in range(count)]
                loaded += [spread(tirx.IntImm(tvm_type(self.dot.x.dtype), 0), n)] * (group - count)
                kernel.store(self.packed, (g * self.pixels + at) * group, self.joined(loaded, n), n * group)

            each(kernel, pixels, 8 if group == 2 else 16, write)

        with kernel.loop(full, "g") as g:
            one(g, group)
        if rest:
            one(int32(full), rest)

    def joined(self, parts: list[Expr], n: int) -> Expr:
        """a0 b0 a1 b1 ..., of four parts pairs of pairs."""

        def zipped(a: Expr, b: Expr) -> Expr:
            order = [tirx.IntImm("int32", i + n * side) for i in range(n) for side in range(2)]
            return tirx.Shuffle([a, b], order)

        if len(parts) == 2:
            return zipped(*parts)
        pairs = [reinterpret(typed("int16", n), zipped(parts[i], parts[i + 1])) for i in (0, 2)]
        return reinterpret(typed(tvm_type(self.dot.x.dtype), 4 * n), zipped(*pairs))

    # ---- products

    def block(self, start: Expr, row: int, pixels: int, group: Expr, place: Expr) -> None:
        """Interleave pixels, `row` the distance of two inputs; then panels of outputs times tiles of pixels."""
        kernel, machine = self.kernel, self.machine
        self.interleave(kernel.let(start), row, pixels)
        if self.sums is not None:
            self.add_up_pixels(pixels)
        full, rest = divmod(self.per_group, machine.outputs)
        tiles, left = divmod(pixels, machine.pixels)

        def panel(number: Expr, outputs: int) -> None:
            with kernel.loop(tiles, "tile") as index:
                self.tile(group, number, outputs, index * machine.pixels, machine.pixels, place)
            if left:
                self.tile(group, number, outputs, int32(tiles * machine.pixels), left, place)

        with kernel.loop(full, "panel") as number:
            panel(number, machine.outputs)
        if rest:
            panel(int32(full), rest)

    def add_up_pixels(self, pixels: int) -> None:
        """-raised * the sum of the stored codes of each pixel."""
        kernel, lanes, group = self.kernel, self.machine.lanes, self.dot.group
        with kernel.loop(-(-pixels // lanes), "v") as v:
            total = kernel.local(lanes, "int32")
            kernel.store(total, 0, spread(int32(0), lanes), lanes)
            with kernel.loop(self.inner // group, "g") as g:
                codes = kernel.load(self.packed, (g * self.pixels + v * lanes) * group, lanes * group)
                ones = spread(tirx.IntImm("uint8", 1), lanes * group)
                kernel.store(total, 0, multiply(self.dot, kernel.load(total, 0, lanes), codes, ones, lanes), lanes)
            negative = kernel.load(total, 0, lanes) * spread(int32(-self.dot.raised), lanes)
            kernel.store(self.sums, v * lanes, negative, lanes)

    def tile(self, group: Expr, panel: Expr, outputs: int, pixel: Expr, pixels: int, place: Expr) -> None:
        """outputs x pixels sums, of which `pixels` are stored."""
        kernel, machine, dot = self.kernel, self.machine, self.dot
        lanes, wide = machine.lanes, machine.pixels
        first = kernel.let((group * self.panels + panel) * machine.outputs)
        sums = kernel.local(outputs * wide, "int32")
        vectors = range(0, wide, lanes)
        for o in range(outputs):
            for v in vectors:
                value = spread(kernel.load(self.bias, first + o), lanes)
                if self.sums is not None:
                    value = value + kernel.load(self.sums, pixel + v, lanes)
                kernel.store(sums, o * wide + v, value, lanes)
        groups = self.inner // dot.group
        with kernel.loop(groups, "g") as g:
            at = g * self.pixels + pixel
            loaded = [kernel.let(kernel.load(self.packed, (at + v) * dot.group, lanes * dot.group)) for v in vectors]
            for o in range(outputs):
                weight = spread_weight(kernel, self.w, first * groups + g * machine.outputs + o, lanes)
                for v, codes in zip(vectors, loaded, strict=True):
                    old = kernel.load(sums, o * wide + v, lanes)
                    kernel.store(sums, o * wide + v, multiply(dot, old, codes, weight, lanes), lanes)
        for o in range(outputs):
            scale = kernel.let(kernel.load(self.scales, first + o))
            for v, n in tail(pixels, lanes):
                self.finish(kernel.load(sums, o * wide + v, n), scale, place, panel * machine.outputs + o, pixel + v, n)

    def finish(self, sums: Expr, scale: Expr, place: Expr, output: Expr, pixel: Expr, n: int) -> None:
        """n sums of an output as codes."""
        total = self.kernel.let(cast(typed("float32", n), sums) * spread(scale, n))
        to = place + output * (self.size.out_height * self.size.out_width) + pixel
        self.kernel.store(self.y, to, rounded(self.levels, total, n), n)


__all__ = ["ConvWriter", "block_pixels", "block_rows", "conv_int8", "pack_conv_codes", "pack_per_output", "work_spaces"]
