"""The convolution of `conv_int8` with a block-sparse W: blocks of `machine.outputs` outputs x 1 input.

Of a row of blocks, the kept inputs are taken group by group (`fxopt.backends.tvm.kernels.bsr_int8`). Planes of pixels
are feature-major as they lie: the pixels of a group's inputs are interleaved when they are loaded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.codes import Levels
from fxopt.backends.tvm.emit import Expr, cast, int32, shuffle, spread, tail
from fxopt.backends.tvm.kernels.bsr_int8 import Blocks
from fxopt.backends.tvm.kernels.conv import Conv
from fxopt.backends.tvm.kernels.conv_int8 import ConvWriter, block_rows
from fxopt.backends.tvm.kernels.dot import Dot, multiply, spread_weight
from fxopt.backends.tvm.kernels.nm import index_dtype
from fxopt.backends.tvm.library import tirx
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import tvm_type


def is_possible(size: Conv, machine: Machine) -> bool:
    """Whether the kernel is made: for one group, on 128-bit machines; planes are not read past their ends."""
    enough = not size.is_pointwise or size.height * size.width >= machine.pixels
    return size.groups == 1 and machine.family != "x86" and enough


def packed_words(blocks: Blocks, dot: Dot) -> npt.NDArray[np.int32]:
    """The weights as the kernel takes them: [groups, outputs], a group in 32 bits."""
    whole = blocks.weights if dot.group == 4 else blocks.weights.astype(np.int16)
    return np.ascontiguousarray(whole).view(np.int32)[..., 0]


def patch_space(size: Conv, dot: Dot, machine: Machine) -> int:
    """Codes of x that the function needs room for behind its operands; 0: it takes no such parameter."""
    return 0 if size.is_pointwise else size.inner * block_rows(size, dot) * size.out_width + machine.pixels


def conv_bsr_int8(name: str, size: Conv, groups: int, x: Levels, y: Levels, dot: Dot, machine: Machine) -> Any:
    """`void NAME(x, words, inputs, firsts, bias, scales, [patches], y)`.

    words, inputs and firsts of `Blocks`; the others as in `conv_int8`.
    """
    return _Writer(name, size, groups, x, y, dot, machine).function()


class _Writer(ConvWriter):
    def __init__(self, name: str, size: Conv, groups: int, x: Levels, y: Levels, dot: Dot, machine: Machine) -> None:
        self.groups = groups
        super().__init__(name, size, x, y, dot, machine)

    def declare_weights(self) -> Any:
        kernel = self.kernel
        words = kernel.buffer("words", self.groups * self.machine.outputs, "int32")
        self.inputs = kernel.buffer("inputs", self.groups * self.dot.group, index_dtype(self.size.inner))
        self.firsts = kernel.buffer("firsts", self.panels + 1, "int32")
        return words

    def declare_spaces(self, given: Any) -> None:
        self.w, count = given, patch_space(self.size, self.dot, self.machine)
        self.rows = self.kernel.buffer("patches", count, tvm_type(self.dot.x.dtype)) if count else self.x

    def prepare(self, given: Any) -> None:
        """Nothing."""

    def block(self, start: Expr, row: int, pixels: int, group: Expr, place: Expr) -> None:
        """Rows of blocks of outputs times tiles of pixels, `row` the distance of two inputs."""
        kernel, machine = self.kernel, self.machine
        start = kernel.let(start)
        full, rest = divmod(self.per_group, machine.outputs)
        tiles, left = divmod(pixels, machine.pixels)

        def panel(number: Expr, outputs: int) -> None:
            with kernel.loop(tiles, "tile") as index:
                self.products(number, outputs, start, row, index * machine.pixels, machine.pixels, place)
            if left and tiles:  # the last ones once more
                self.products(number, outputs, start, row, int32(pixels - machine.pixels), machine.pixels, place)
            elif left:
                self.products(number, outputs, start, row, int32(0), left, place)

        with kernel.loop(full, "panel") as number:
            panel(number, machine.outputs)
        if rest:
            panel(int32(full), rest)

    def products(self, panel: Expr, outputs: int, start: Expr, row: int, pixel: Expr, pixels: int, place: Expr) -> None:
        """outputs x pixels sums, of which `pixels` are stored."""
        kernel, machine, dot = self.kernel, self.machine, self.dot
        lanes, wide = machine.lanes, machine.pixels
        vectors = range(0, wide, lanes)
        sums = kernel.local(outputs * wide, "int32")
        raised = kernel.local(wide, "int32") if dot.raised else None  # sums of the groups of x
        for o in range(outputs):
            for v in vectors:
                value = spread(kernel.load(self.bias, panel * machine.outputs + o), lanes)
                kernel.store(sums, o * wide + v, value, lanes)
        if raised is not None:
            for v in vectors:
                kernel.store(raised, v, spread(int32(0), lanes), lanes)
        first = kernel.let(kernel.load(self.firsts, panel))
        count = kernel.let(kernel.load(self.firsts, panel + 1) - first)
        begin = kernel.let(start + pixel)
        with kernel.loop(count, "g") as g:
            at = kernel.let(first + g)
            inputs = [cast("int32", kernel.load(self.inputs, at * dot.group + i)) for i in range(dot.group)]
            codes = [kernel.let(kernel.load(self.rows, kernel.let(begin + item * row), wide)) for item in inputs]
            whole, size = kernel.let(self.joined(codes, wide)), lanes * dot.group
            loaded = [kernel.let(shuffle([whole], range(v * dot.group, v * dot.group + size))) for v in vectors]
            for o in range(outputs):
                weight = spread_weight(kernel, self.w, at * machine.outputs + o, lanes)
                for v, some in zip(vectors, loaded, strict=True):
                    old = kernel.load(sums, o * wide + v, lanes)
                    kernel.store(sums, o * wide + v, multiply(dot, old, some, weight, lanes), lanes)
            if raised is not None:
                ones = spread(tirx.IntImm("uint8", 1), size)
                for v, some in zip(vectors, loaded, strict=True):
                    kernel.store(raised, v, multiply(dot, kernel.load(raised, v, lanes), some, ones, lanes), lanes)
        self.results(panel, outputs, sums, raised, pixel, pixels, place)

    def results(self, panel: Expr, outputs: int, sums: Any, raised: Any, pixel: Expr, pixels: int, place: Expr) -> None:
        """Sums as codes."""
        kernel, machine = self.kernel, self.machine
        for o in range(outputs):
            output = panel * machine.outputs + o
            scale = kernel.let(kernel.load(self.scales, output))
            for v, n in tail(pixels, machine.lanes):
                total = kernel.load(sums, o * machine.pixels + v, n)
                if raised is not None:
                    total = total - kernel.load(raised, v, n) * spread(int32(self.dot.raised), n)
                self.finish(total, scale, place, output, pixel + v, n)


__all__ = ["conv_bsr_int8", "is_possible", "packed_words", "patch_space"]
