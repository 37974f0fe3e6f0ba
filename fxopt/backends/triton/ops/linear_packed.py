"""Linear with packed weights of 4 or 2 bits: integers, or signs and exponents ("shift-add"), with an epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.backends.triton.chips import chip_for
from fxopt.backends.triton.configs import Config, linear_config, splits_for
from fxopt.backends.triton.formats import Layout, Packed, dequantized, parse
from fxopt.backends.triton.launch import launch
from fxopt.backends.triton.ops.registry import KernelOp, contiguous_rows
from fxopt.errors import InvalidOption

ACTIVATIONS = ("", "relu", "gelu", "gelu_tanh", "silu")
COMBINATIONS = ("", "add", "mul")
_REDUCED = 1024  # columns of a program that sums partial results


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
    y = torch.nn.functional.linear(x.float(), dequantized(packed), None if bias is None else bias.float())
    return epilogue(y, other, activation, combine).to(x.dtype)


def epilogue(y: Tensor, other: Tensor | None, activation: str, combine: str) -> Tensor:
    """The activation of float32 values, plus or times a second operand.

    Raises:
        InvalidOption: the activation or combination is unknown, or has no operand.
    """
    _code(ACTIVATIONS, activation, "activation")
    if (other is None) != (_code(COMBINATIONS, combine, "combination") == 0):
        raise InvalidOption(f"combine={combine!r} {'without' if other is None else 'with'} a second operand")
    if activation == "relu":
        y = y.relu()
    elif activation == "silu":
        y = torch.nn.functional.silu(y)
    elif activation:
        y = torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if other is not None:
        y = y + other if combine == "add" else y * other
    return y


def _code(known: tuple[str, ...], name: str, what: str) -> int:
    if name not in known:
        raise InvalidOption(f"{what} {name!r}; expected one of {known}")
    return known.index(name)


def _kernels(*flat: Any) -> Tensor:
    """The same with kernels; arguments as those of the reference."""
    x, words, scales, offsets, factors, bias, other, layout, outputs, columns, group, activation, combine = flat
    rows = contiguous_rows(x, columns)
    count = len(rows)
    y = x.new_empty(count, outputs)
    if other is not None:
        other = other.reshape(count, outputs).contiguous()
    packed = Packed(parse(layout), words, scales, offsets, factors, outputs, columns, group)
    in_two = x.dtype == torch.float32
    if in_two:
        rows = two_terms(rows)
    config = linear_config(chip_for(x), packed, rows)
    splits = splits_for(chip_for(x), config, len(rows), packed)
    tail = (bias, other, _code(ACTIVATIONS, activation, "activation"), _code(COMBINATIONS, combine, "combination"))
    if splits == 1 and not in_two:
        product(rows, packed, config, y, 1, tail)
    else:
        parts = torch.empty(splits, len(rows), outputs, dtype=torch.float32, device=x.device)
        product(rows, packed, config, parts, splits)
        _reduce(parts, y, splits * (2 if in_two else 1), tail)
    return y.reshape(*x.shape[:-1], outputs)


def two_terms(x: Tensor) -> Tensor:
    """float32 [rows, in] as two bfloat16 matrices over each other, [2 * rows, in], whose sum is x to 16 bits."""
    high = x.to(torch.bfloat16)
    return torch.cat([high, (x - high.float()).to(torch.bfloat16)])


Tail = tuple[Tensor | None, Tensor | None, int, int]  # bias, second operand, activation, combination


def product(
    x: Tensor, packed: Packed, config: Config, y: Tensor, splits: int, tail: Tail | None = None
) -> None:
    """x @ weight.T into y [rows, outputs] with its epilogue, or (no `tail`) into partial sums [splits, rows, outputs]."""
    from fxopt.backends.triton.kernels.w2a16 import w2a16
    from fxopt.backends.triton.kernels.w4a16 import w4a16

    layout = packed.layout
    bias, other, activation, combine = (None, None, 0, 0) if tail is None else tail
    rows = len(x)
    tiles = -(-(-(-packed.columns // layout.tile)) // splits)
    arguments = (
        x, packed.words, packed.scales, packed.scales if packed.offsets is None else packed.offsets, packed.factors,
        x if bias is None else bias, x if other is None else other, y,
        rows, packed.outputs, packed.columns, packed.words.shape[1], x.stride(0), tiles,
    )  # fmt: skip
    constants = {
        "GROUP": packed.group, "HAS_OFFSET": packed.offsets is not None, "JOINED": config.joined,
        "BM": config.bm, "BN": config.bn,
        "EVEN_M": rows % config.bm == 0, "EVEN_K": packed.columns % layout.tile == 0, "IS_SPLIT": tail is None,
        "HAS_BIAS": bias is not None, "ACT": activation, "COMBINE": combine,
    }  # fmt: skip
    if layout.bits == 4:
        constants["IS_SHIFT"] = layout.is_shift
    grid = (-(-rows // config.bm), packed.words.shape[1] // config.bn, splits)
    launch(w4a16 if layout.bits == 4 else w2a16, grid, arguments, constants, config.warps, config.stages)


def _reduce(parts: Tensor, y: Tensor, splits: int, tail: Tail) -> None:
    from fxopt.backends.triton.kernels.split_reduce import split_reduce

    bias, other, activation, combine = tail
    rows, columns = y.shape
    arguments = (parts, y if bias is None else bias, y if other is None else other, y, rows, columns, splits)
    constants = {"BN": _REDUCED, "HAS_BIAS": bias is not None, "ACT": activation, "COMBINE": combine}
    launch(split_reduce, (rows, -(-columns // _REDUCED)), arguments, constants, 4, 1)


linear_packed = KernelOp("linear_packed", _reference, _kernels)
