"""From the 32-bit sums of an 8-bit product to its results, y = act(sums * scales + b): float32 or codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fxopt.backends.tvm.codes import Levels
from fxopt.backends.tvm.emit import Expr, Kernel, cast, float32, int32, spread
from fxopt.backends.tvm.kernels.activations import Activation, apply
from fxopt.backends.tvm.kernels.dot import Dot
from fxopt.backends.tvm.kernels.quantize import rounded
from fxopt.backends.tvm.machine import Machine
from fxopt.backends.tvm.values import tvm_type


@dataclass(frozen=True)
class Product:
    """x [rows, inner] times the codes of W.

    Attributes:
        ranged: the scale and zero point of x are found at run time: `scales` are then those of W alone, and `starts`
            its column sums; else `scales` are those of the products, and `starts` the column sums times offset - zero.
        levels: y is rounded to these; None: it is float32.
        factors: before, y is multiplied with a factor per output.
    """

    rows: int
    inner: int
    outputs: int
    activation: Activation = ""
    ranged: bool = False
    levels: Levels | None = None
    factors: bool = False


class Results:
    """The buffers of a product's results, and the code that writes them.

    Declares the parameters starts (int32), scales, bias, [range], [factors]; all padded to whole panels of `width`
    outputs, range float32 [2]. `declare_y` declares y, the last one.
    """

    def __init__(self, kernel: Kernel, size: Product, dot: Dot, machine: Machine, width: int) -> None:
        self.kernel, self.size, self.dot, self.machine, self.width = kernel, size, dot, machine, width
        panels = -(-size.outputs // width)
        self.starts = kernel.buffer("starts", panels * width, "int32")
        self.scales, self.bias = (kernel.buffer(key, panels * width) for key in ("scales", "bias"))
        self.range = kernel.buffer("range", 2) if size.ranged else None
        self.factors = kernel.buffer("factors", panels * width) if size.factors else None
        self.y: Any = None
        self.scale = self.raise_by = None

    def declare_y(self) -> None:
        """The results; and what all of them need."""
        kernel, size = self.kernel, self.size
        kind = "float32" if size.levels is None else tvm_type(size.levels.stored.dtype)
        self.y = kernel.buffer("y", size.rows * size.outputs, kind)
        if self.range is not None:
            self.scale = kernel.let(kernel.load(self.range, 0))
            if self.dot.x.offset is not None:
                self.raise_by = kernel.let(int32(self.dot.x.offset) - cast("int32", kernel.load(self.range, 1)))

    def first(self, column: Expr) -> Expr:
        """What the sums of a vector of outputs start from."""
        lanes = min(self.width, self.machine.lanes)
        if self.size.ranged and self.raise_by is None:
            return spread(int32(0), lanes)
        value = self.kernel.load(self.starts, column, lanes)
        return value if self.raise_by is None else value * spread(self.raise_by, lanes)

    def finish(self, total: Expr, column: Expr, row: Expr, n: int) -> None:
        """Scale, bias, activation, factors, rounding of n sums of a row."""
        kernel, size = self.kernel, self.size
        scale = kernel.load(self.scales, column, n)
        scale = scale if self.scale is None else scale * spread(self.scale, n)
        value = kernel.let(total * scale + kernel.load(self.bias, column, n))
        value = kernel.let(apply(kernel, size.activation, value, n))
        if self.factors is not None:
            value = value * kernel.load(self.factors, column, n)
        if size.levels is not None:
            value = rounded(size.levels, kernel.let(value / float32(size.levels.scale, n)), n)
        kernel.store(self.y, row * size.outputs + column, value, n)


__all__ = ["Product", "Results"]
