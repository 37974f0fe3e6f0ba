"""Linear in 8-bit integers, with an epilogue: scales per row of x and per output, or one scale and zero point for x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.backends.triton import library
from fxopt.backends.triton.chips import chip_for
from fxopt.backends.triton.configs import INT8_ROWS, Choice, int8_key
from fxopt.backends.triton.epilogues import Epilogue
from fxopt.backends.triton.launch import launch
from fxopt.backends.triton.ops.registry import KernelOp, contiguous_rows, usable

LONGEST = (2**31 - 1) // (255 * 127)  # inputs whose sums fit 32 bits
_BLOCK = 1024  # elements of a row that are rounded at a time
_GROUP = 8  # row tiles that run through all columns together
COPIED = 16  # bytes: rows are filled up to a multiple, so that they are copied in whole pieces
_COPIES_TILES = 90  # the hardware copies whole tiles from sm_90 on


def _reference(
    x: Tensor,
    codes: Tensor,  # int8 [out, in], filled up to a multiple of 16 columns
    scales: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    activation: str,
    combine: str,
) -> Tensor:
    wide = x.float()
    if x_scale is None or x_zero is None:
        scale: Tensor = row_scales(wide)
        levels = torch.round(wide / scale).clamp(-127, 127)
    else:
        scale = x_scale
        levels = (torch.round(wide / scale) + x_zero).clamp(0, 255) - x_zero
    weight = codes[:, : x.shape[-1]].double()
    y = torch.matmul(levels.double(), weight.t()).float() * (scales * scale)
    return Epilogue(bias, other, activation, combine).apply(y).to(x.dtype)


def row_scales(x: Tensor) -> Tensor:
    """max|x| / 127 of each row, [..., 1]; 1 where the row is zero."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _kernels(*flat: Any) -> Tensor:
    """The same with kernels; arguments as those of the reference."""
    x, codes, scales, sums, bias, other, x_scale, x_zero, activation, combine = flat
    outputs, columns = codes.shape
    rows = contiguous_rows(x, x.shape[-1])
    count = len(rows)
    y = x.new_empty(count, outputs)
    per_row = x_scale is None
    levels, scale = quantized_rows(rows, columns, x_scale, x_zero)
    tail = Epilogue(bias, other, activation, combine).flat(count, outputs)
    arguments = (scale, scale if per_row else x_zero, scales, sums, *tail.operands(y), y, count, outputs, columns)
    constants = {"GROUP": _GROUP, "PER_ROW": per_row, "HAS_ZERO": not per_row, **tail.constants()}
    chip = chip_for(x)
    copies = chip.arch >= _COPIES_TILES and count > INT8_ROWS[-2]
    _product(levels, codes, arguments, constants, usable(chip, int8_key(count, copies)), copies)
    result: Tensor = y.reshape(*x.shape[:-1], outputs)
    return result


def quantized_rows(rows: Tensor, columns: int, x_scale: Tensor | None, x_zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 codes [rows, columns] of rows [rows, in], filled up, and the scales: one per row unless one is given."""
    from fxopt.backends.triton.kernels.quantize_rows import quantize_rows

    count, given = rows.shape
    levels = torch.empty(count, columns, dtype=torch.int8, device=rows.device)
    own = x_scale is None
    scale = torch.empty(count, dtype=torch.float32, device=rows.device) if own else x_scale
    assert scale is not None
    arguments = (rows, levels, scale, scale if x_zero is None else x_zero, given, columns, rows.stride(0))
    launch(quantize_rows, (count,), arguments, {"OWN": own, "BLOCK": _BLOCK}, 4, 1)
    return levels, scale


def _product(
    levels: Tensor, codes: Tensor, arguments: tuple[Any, ...], constants: dict[str, Any], choice: Choice, copies: bool
) -> None:
    from fxopt.backends.triton.kernels.w8a8 import w8a8
    from fxopt.backends.triton.kernels.w8a8_tma import w8a8_tma

    constants |= choice.constants
    grid = (-(-len(levels) // choice["BM"]) * -(-len(codes) // choice["BN"]),)
    if not copies:
        constants["EVEN_K"] = codes.shape[1] % choice["BK"] == 0
        launch(w8a8, grid, (levels, codes, *arguments), constants, choice.warps, choice.stages)
        return
    descriptor = library.module("tools.tensor_descriptor").TensorDescriptor
    operands = (
        descriptor.from_tensor(levels, [choice["BM"], choice["BK"]]),
        descriptor.from_tensor(codes, [choice["BN"], choice["BK"]]),
    )
    launch(w8a8_tma, grid, (*operands, *arguments), constants, choice.warps, choice.stages)


linear_int8 = KernelOp("linear_int8", _reference, _kernels)
