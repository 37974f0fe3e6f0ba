"""y = act(x @ W.T + b) with n of every m inputs kept (Mishra et al., 2021), one pattern for `width` outputs.

A pattern of each output's own (width 1) gives no contiguous vectors of weights: on a CPU it is stored compactly and run
as a dense product (`fxopt.backends.tvm.kernels.dense`); it saves memory on disk and no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fxopt.backends.tvm.emit import Expr, Kernel, cast
from fxopt.backends.tvm.kernels.activations import Activation
from fxopt.backends.tvm.kernels.tiles import RowMajor, Step, emit_rows
from fxopt.backends.tvm.machine import Machine
from fxopt.errors import InvalidInput

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Shared:
    """values [panels, kept, width] and the input of each [panels, kept], absolute: decoding costs the whole gain."""

    values: Floats
    inputs: npt.NDArray[Any]  # uint16, int32 for more than 65536 inputs


def pack_nm(weight: Floats, n: int, m: int, width: int) -> Shared:
    """[out, in] -> the kept inputs of every group of m, the same for `width` neighbouring outputs.

    Raises:
        InvalidInput: the inputs are no multiple of m, or a group keeps more than n.
    """
    outputs, inner = weight.shape
    if inner % m:
        raise InvalidInput(f"{inner} inputs are no multiple of m = {m}")
    padded = np.zeros((-(-outputs // width) * width, inner), np.float32)
    padded[:outputs] = weight
    panels = padded.reshape(-1, width, inner).transpose(0, 2, 1)  # [panels, in, width]
    used = (panels != 0).any(-1).reshape(len(panels), inner // m, m)
    most = int(used.sum(-1).max(initial=0))
    if most > n:
        raise InvalidInput(f"a group of {m} inputs has {most} that {width} neighbouring outputs use; expected {n}")
    chosen = np.sort(np.argsort(~used, axis=-1, kind="stable")[..., :n], axis=-1)
    columns = (chosen + np.arange(inner // m)[:, None] * m).reshape(len(panels), -1)
    values = np.take_along_axis(panels, columns[..., None], 1)
    return Shared(np.ascontiguousarray(values), columns.astype(index_dtype(inner)))


def index_dtype(inner: int) -> str:
    """The type of the indices: uint16 where it is enough."""
    return "uint16" if inner <= 1 << 16 else "int32"


def nm(
    name: str, rows: int, inner: int, outputs: int, n: int, m: int, width: int, machine: Machine,
    activation: Activation = "",
) -> Any:  # fmt: skip
    """`void NAME(x [rows, inner], values, inputs, bias, y [rows, outputs])`."""
    size = RowMajor(rows, inner, outputs, width, activation)
    kept = inner // m * n
    kernel = Kernel(name)
    x = kernel.buffer("x", rows * inner)
    values = kernel.buffer("values", size.panels * kept * width)
    inputs = kernel.buffer("inputs", size.panels * kept, index_dtype(inner))
    bias = kernel.buffer("bias", size.panels * width)
    y = kernel.buffer("y", rows * outputs)

    each = 2 if machine.family == "arm" and kept % 2 == 0 else 1  # inputs per round of the loop

    def walk(panel: Expr) -> tuple[Expr, Step]:
        def step(p: Expr) -> list[tuple[Expr, Expr]]:
            places = [panel * kept + p * each + i for i in range(each)]
            return [(kernel.let(cast("int32", kernel.load(inputs, at))), at * width) for at in places]

        return kept // each, step

    emit_rows(kernel, size, machine, (x, values, bias, y), [walk])
    return kernel.function()
