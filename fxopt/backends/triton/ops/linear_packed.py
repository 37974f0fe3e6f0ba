"""Linear with packed weights of 4 or 2 bits: integers, or signs and exponents ("shift-add"), with an epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.backends.triton.chips import chip_for
from fxopt.backends.triton.configs import Choice, linear_key, splits_for
from fxopt.backends.triton.epilogues import Epilogue
from fxopt.backends.triton.formats import Packed, dequantized, parse
from fxopt.backends.triton.launch import launch
from fxopt.backends.triton.ops.registry import KernelOp, contiguous_rows, usable

MOST_ROWS = 512  # of more, the weight is dequantised first: reading it again costs little beside the product
_REDUCED = 1024  # columns of a program that sums partial results
_DEQUANTIZED = 64  # rows of a program that dequantises


def _reference(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    factors: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    layout: str,
    outputs: int,
    columns: int,
    group: int,
    activation: str,
    combine: str,
) -> Tensor:
    packed = Packed(parse(layout), words, scales, offsets, factors, outputs, columns, group)
    y = torch.nn.functional.linear(x.float(), dequantized(packed))
    return Epilogue(bias, other, activation, combine).apply(y).to(x.dtype)


def _kernels(*flat: Any) -> Tensor:
    """The same with kernels; arguments as those of the reference."""
    x, words, scales, offsets, factors, bias, other, layout, outputs, columns, group, activation, combine = flat
    packed = Packed(parse(layout), words, scales, offsets, factors, outputs, columns, group)
    rows = contiguous_rows(x, columns)
    if len(rows) > MOST_ROWS:
        y = torch.nn.functional.linear(rows, _whole_weight(packed, x))
        whole: Tensor = Epilogue(bias, other, activation, combine).apply(y).reshape(*x.shape[:-1], outputs)
        return whole
    y = x.new_empty(len(rows), outputs)
    tail = Epilogue(bias, other, activation, combine).flat(len(rows), outputs)
    parts = partial_sums(rows, packed, y, tail)
    if parts is not None:
        _reduce(parts, y, tail)
    result: Tensor = y.reshape(*x.shape[:-1], outputs)
    return result


def _whole_weight(packed: Packed, x: Tensor) -> Tensor:
    """The weight [outputs, columns] in the type of x."""
    from fxopt.backends.triton.kernels.dequantize_words import dequantize_words

    layout, rows = packed.layout, packed.words.shape[1]
    weight = x.new_empty(packed.outputs, packed.columns)
    offsets = packed.scales if packed.offsets is None else packed.offsets
    arguments = (packed.words, packed.scales, offsets, packed.factors, weight, *weight.shape, rows)
    constants = {
        "GROUP": packed.group, "BITS": layout.bits, "IS_SHIFT": layout.is_shift,
        "HAS_OFFSET": packed.offsets is not None, "BN": _DEQUANTIZED,
    }  # fmt: skip
    launch(dequantize_words, (len(packed.words), rows // _DEQUANTIZED), arguments, constants, 4, 1)
    return weight


def partial_sums(x: Tensor, packed: Packed, y: Tensor | None, tail: Epilogue) -> Tensor | None:
    """x @ weight.T as partial sums float32 [splits, rows, outputs], or, where one is enough, whole in y (then None).

    Args:
        x: [rows, in], rows contiguous; float32 is computed as the sum of two bfloat16 terms.
        y: [rows, outputs]; None: always partial sums.
    """
    in_two = x.dtype == torch.float32
    operand = two_terms(x) if in_two else x
    chip, count = chip_for(x), len(operand)
    choice = usable(chip, linear_key(packed, operand.dtype, count))
    splits = splits_for(chip, choice, count, packed)
    if splits == 1 and not in_two and y is not None:
        _product(operand, packed, choice, 1, y, tail, False)
        return None
    parts = torch.empty(splits, count, packed.outputs, dtype=torch.float32, device=x.device)
    _product(operand, packed, choice, splits, parts, Epilogue(), True)
    return parts.reshape(-1, len(x), packed.outputs)


def two_terms(x: Tensor) -> Tensor:
    """float32 [rows, in] as two bfloat16 matrices over each other, [2 * rows, in], whose sum is x to 16 bits."""
    high = x.to(torch.bfloat16)
    return torch.cat([high, (x - high.float()).to(torch.bfloat16)])


def _product(x: Tensor, packed: Packed, choice: Choice, splits: int, y: Tensor, tail: Epilogue, is_split: bool) -> None:
    from fxopt.backends.triton.kernels.w2a16 import w2a16
    from fxopt.backends.triton.kernels.w4a16 import w4a16

    layout, rows = packed.layout, len(x)
    tiles = -(-packed.columns // layout.tile)
    arguments = (
        x, packed.words, packed.scales, packed.scales if packed.offsets is None else packed.offsets, packed.factors,
        *tail.operands(x), y, rows, packed.outputs, packed.columns, packed.words.shape[1], x.stride(0),
        -(-tiles // splits),
    )  # fmt: skip
    constants = {
        "GROUP": packed.group, "HAS_OFFSET": packed.offsets is not None, **choice.constants,
        "EVEN_K": packed.columns % layout.tile == 0,
        "IS_SPLIT": is_split, **tail.constants(),
    }  # fmt: skip
    if layout.bits == 4:
        constants["IS_SHIFT"] = layout.is_shift
    grid = (-(-rows // choice["BM"]), packed.words.shape[1] // choice["BN"], splits)
    launch(w4a16 if layout.bits == 4 else w2a16, grid, arguments, constants, choice.warps, choice.stages)


def _reduce(parts: Tensor, y: Tensor, tail: Epilogue) -> None:
    from fxopt.backends.triton.kernels.split_reduce import split_reduce

    rows, columns = y.shape
    arguments = (parts, *tail.operands(y), y, rows, columns, len(parts))
    grid = (rows, -(-columns // _REDUCED))
    launch(split_reduce, grid, arguments, {"BN": _REDUCED, **tail.constants()}, 4, 1)


linear_packed = KernelOp("linear_packed", _reference, _kernels)
