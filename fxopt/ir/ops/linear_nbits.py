"""Linear with weights of 2 to 8 bits in groups along the input, and float or 8-bit activations.

Source: the affine grids of Frantar et al., "GPTQ" (2022); `MatMulNBits` of ONNX Runtime's com.microsoft domain, whose
accuracy level 4 rounds activations as `activation_bits=8` does here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxopt.ir.op import op
from fxopt.ir.packing import pack, unpack
from fxopt.ir.target import Cost


def group_count(columns: int, group: int) -> int:
    """Groups per row; the last one may be shorter."""
    return -(-columns // group)


def dequantized(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, columns: int) -> Tensor:
    """The weight, float32 [out, in]: (codes - zero) * scale per group of `group` inputs."""
    codes = unpack(packed, bits, columns).float()
    return (codes - _spread(zeros, bits, scales, group, columns)) * _columns(scales.float(), group, columns)


def _spread(zeros: Tensor | None, bits: int, scales: Tensor, group: int, columns: int) -> Tensor | float:
    return float(1 << (bits - 1)) if zeros is None else _columns(zeros.float(), group, columns)


def _columns(values: Tensor, group: int, columns: int) -> Tensor:
    """[out, groups] -> [out, in]."""
    return values.repeat_interleave(group, 1)[:, :columns]


def rounded_activations(x: Tensor, group: int) -> Tensor:
    """x rounded to 8 bits per row and group: round(x / s) * s with s = max|x| / 127."""
    *rows, columns = x.shape
    groups = group_count(columns, group)
    blocks = torch.nn.functional.pad(x, (0, groups * group - columns)).reshape(*rows, groups, group)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (torch.round(blocks / scale) * scale).reshape(*rows, groups * group)[..., :columns]


@op
def linear_nbits(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    columns: int,
    bits: int,
    group: int,
    activation_bits: int,
) -> Tensor:
    """y = x @ ((codes - zeros) * scales).T + bias, in the type of x.

    Args:
        x: float [..., in].
        packed: uint8 [out, ceil(in * bits / 8)], codes in the layout of `fxopt.ir.packing`.
        scales: float32 [out, groups], groups = ceil(in / group).
        zeros: uint8 [out, groups], or None: 2 ** (bits - 1).
        bias: float [out] or None.
        columns: in.
        activation_bits: 16 leaves x as it is; 8 rounds it, symmetric per row and group.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantized(packed, scales, zeros, bits, group, columns).to(wide)
    value = x.to(wide)
    if activation_bits == 8:
        value = rounded_activations(value, group)
    y = torch.nn.functional.linear(value, weight, None if bias is None else bias.to(wide))
    return y.to(x.dtype)


# Work of unpacking codes and multiplying, over that of multiplying alone at the rate of the activations' type: kernels
# of ONNX Runtime 1.32 on AVX2 (benchmarks/decode.py).
_UNPACKING, _UNPACKING_8 = 1.4, 1.9


@linear_nbits.cost
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    columns: int,
    bits: int,
    group: int,
    activation_bits: int,
) -> Cost:
    from fxopt.ir.graph import hint

    rows = 1
    for dim in x.shape[:-1]:
        rows *= hint(dim)
    out, inner = packed.shape[0], columns
    size = x.dtype.itemsize
    weights = packed.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes)
    macs = float(rows * out * inner)
    dtype = str(x.dtype).removeprefix("torch.")
    work = 2 * macs * (_UNPACKING_8 if bits == 8 else _UNPACKING)
    form = (("op", "linear_nbits"), ("rows", rows), ("out", out), ("in", inner), ("bits", bits), ("group", group))
    return Cost(work, rows * (inner + out) * size + weights, dtype, "linear.nbits", 1, macs, form=form)


@linear_nbits.samples
def _() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for shape, out, bits, group in (
        ((4, 64), 8, 4, 32), ((2, 3, 40), 5, 4, 16), ((1, 128), 3, 8, 128), ((3, 64), 4, 2, 64), ((0, 32), 4, 4, 32),
        ((2, 48), 6, 3, 16),
    ):  # fmt: skip
        x = torch.randn(shape, generator=generator)
        groups = group_count(shape[-1], group)
        codes = torch.randint(0, 1 << bits, (out, shape[-1]), generator=generator, dtype=torch.uint8)
        scales = torch.rand(out, groups, generator=generator) * 0.1 + 0.01
        zeros = torch.randint(0, 1 << bits, (out, groups), generator=generator, dtype=torch.uint8)
        bias = torch.randn(out, generator=generator)
        yield x, pack(codes, bits), scales, None, bias, shape[-1], bits, group, 16
        yield x, pack(codes, bits), scales, zeros, None, shape[-1], bits, group, 8
