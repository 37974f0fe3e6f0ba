"""y = act(x @ W.T + b) with a block-sparse W: blocks of `width` outputs x 1 input, stored or absent as a whole.

Only the kept blocks are multiplied, so time falls nearly in proportion to density. Any block of several inputs is a
run of these. Layout as in Buluc et al. (2009), compressed rows, over blocks of outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.emit import Expr, Kernel
from fxopt.backends.tvm.kernels.activations import Activation
from fxopt.backends.tvm.kernels.tiles import RowMajor, Step, emit_rows
from fxopt.backends.tvm.machine import Machine
from fxopt.errors import InvalidInput

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Bsr:
    """Blocks: values [kept, width], the input of each [kept], the first one of each row of blocks [rows + 1]."""

    values: Floats
    inputs: Ints
    starts: Ints
    outputs: int
    columns: int

    @property
    def width(self) -> int:
        """Outputs in a block."""
        return int(self.values.shape[1])

    @property
    def density(self) -> float:
        """Kept share of the blocks."""
        return len(self.values) / max(1, (len(self.starts) - 1) * self.columns)


def pack_bsr(weight: Floats, width: int) -> Bsr:
    """[out, in] -> the blocks that hold a value other than zero; the last block of outputs is zero padded."""
    if weight.ndim != 2:
        raise InvalidInput(f"weight of shape {weight.shape} given, expected [out, in]")
    outputs, inner = weight.shape
    padded = np.zeros((-(-outputs // width) * width, inner), np.float32)
    padded[:outputs] = weight
    blocks = padded.reshape(-1, width, inner).transpose(0, 2, 1)  # [block rows, in, width]
    kept = (blocks != 0).any(-1)
    starts = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
    return Bsr(np.ascontiguousarray(blocks[kept]), np.nonzero(kept)[1].astype(np.int32), starts, outputs, inner)


def unpack_bsr(packed: Bsr) -> Floats:
    """The weight [out, in]."""
    rows = len(packed.starts) - 1
    blocks = np.zeros((rows, packed.columns, packed.width), np.float32)
    where = np.repeat(np.arange(rows), np.diff(packed.starts))
    blocks[where, packed.inputs] = packed.values
    return np.ascontiguousarray(blocks.transpose(0, 2, 1).reshape(-1, packed.columns)[: packed.outputs])


def bsr(
    name: str, rows: int, inner: int, outputs: int, kept: int, width: int, machine: Machine, activation: Activation = ""
) -> Any:
    """`void NAME(x [rows, inner], values, inputs, starts, bias, y [rows, outputs])`: `kept` blocks of `width` x 1."""
    size = RowMajor(rows, inner, outputs, width, activation)
    kernel = Kernel(name)
    x = kernel.buffer("x", rows * inner)
    values = kernel.buffer("values", kept * width)
    inputs = kernel.buffer("inputs", kept, "int32")
    starts = kernel.buffer("starts", size.panels + 1, "int32")
    bias = kernel.buffer("bias", size.panels * width)
    y = kernel.buffer("y", rows * outputs)

    def walk(panel: Expr) -> tuple[Expr, Step]:
        first = kernel.let(kernel.load(starts, panel))
        extent = kernel.let(kernel.load(starts, panel + 1) - first)
        return extent, lambda p: [(kernel.let(kernel.load(inputs, first + p)), (first + p) * width)]

    emit_rows(kernel, size, machine, (x, values, bias, y), [walk])
    return kernel.function()
