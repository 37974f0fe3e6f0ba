"""y = act(x @ W.T + b) in float32, W packed in panels of the machine's tile width."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.emit import Expr, Kernel
from fxopt.backends.tvm.kernels.activations import Activation
from fxopt.backends.tvm.kernels.tiles import RowMajor, Step, Walk, emit_rows
from fxopt.backends.tvm.machine import Machine

Floats = npt.NDArray[np.float32]
_PIECE = 640  # inputs at a time: a panel of so many stays in the first- or second-level cache


def dense(name: str, rows: int, inner: int, outputs: int, machine: Machine, activation: Activation = "") -> Any:
    """`void NAME(x [rows, inner], w, bias, y [rows, outputs])` with w and bias as `pack_dense` and `pack_bias` give."""
    size = RowMajor(rows, inner, outputs, machine.columns, activation)
    kernel = Kernel(name)
    x = kernel.buffer("x", rows * inner)
    w = kernel.buffer("w", size.panels * inner * size.width)
    bias = kernel.buffer("bias", size.panels * size.width)
    y = kernel.buffer("y", rows * outputs)

    def walk(start: int, count: int) -> Walk:
        def of_panel(panel: Expr) -> tuple[Expr, Step]:
            return count, lambda p: [(p + start, (panel * inner + start + p) * size.width)]

        return of_panel

    pieces = max(1, -(-inner // _PIECE))
    step = -(-inner // pieces)
    walks = [walk(start, min(step, inner - start)) for start in range(0, inner, max(step, 1))]
    emit_rows(kernel, size, machine, (x, w, bias, y), walks or [walk(0, 0)])
    return kernel.function()


def pack_dense(weight: Floats, width: int) -> Floats:
    """[out, in] -> [panels, in, width], zero padded."""
    outputs, inner = weight.shape
    padded = np.zeros((-(-outputs // width) * width, inner), np.float32)
    padded[:outputs] = weight
    return np.ascontiguousarray(padded.reshape(-1, width, inner).transpose(0, 2, 1))


def pack_bias(bias: Floats | None, outputs: int, width: int) -> Floats:
    """[out] (zeros when None), padded to whole panels."""
    padded = np.zeros(-(-outputs // width) * width, np.float32)
    if bias is not None:
        padded[:outputs] = bias
    return padded
