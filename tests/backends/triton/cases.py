"""Calls of the backend's operators with what they should give in float64, for the interpreter and for GPUs.

The truth is computed from the codes that were packed, never from what packing made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxopt.backends.triton import formats
from fxopt.backends.triton.configs import Choice, forced
from fxopt.backends.triton.epilogues import Epilogue
from fxopt.backends.triton.ops.decode_attention import decode_attention
from fxopt.backends.triton.ops.linear_int8 import COPIED, linear_int8
from fxopt.backends.triton.ops.linear_packed import MOST_ROWS, linear_packed
from fxopt.backends.triton.ops.pattern_attention import pattern_attention
from fxopt.backends.triton.ops.qkv_packed import qkv_packed
from fxopt.backends.triton.ops.registry import KernelOp
from fxopt.backends.triton.ops.tensor_range import tensor_range
from fxopt.ir.ops.attention_pattern import dense, diagonal, diagonals, nothing, patterns_of, seen_by, stripes
from fxopt.ir.ops.linear_shift import shift_values

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
# Largest relative error (L2). The interpreter cuts float32 to bfloat16 instead of rounding it.
ROOM = {F16: 6e-4, BF16: 8e-3, F32: 6e-4}


@dataclass
class Case:
    """One call: `operator.kernels(*arguments)` should give `truth`."""

    name: str
    operator: KernelOp[...]
    arguments: tuple[Any, ...]
    truth: list[Tensor]
    room: float
    choices: dict[str, Choice] = field(default_factory=dict)  # small tiles: the interpreter is slow

    def tiles(self) -> AbstractContextManager[Any]:
        """The context in which to call it."""
        return forced(self.choices) if self.choices else nullcontext()

    def error(self, device: str = "cpu") -> float:
        """The largest relative error of the results."""
        given = [value.to(device) if isinstance(value, Tensor) else value for value in self.arguments]
        with self.tiles():
            found = self.operator.kernels(*given)
        results = list(found) if isinstance(found, tuple) else [found]
        assert len(results) == len(self.truth)
        return max(_relative(result.cpu(), truth) for result, truth in zip(results, self.truth, strict=True))


def _relative(result: Tensor, truth: Tensor) -> float:
    assert result.shape == truth.shape, (result.shape, truth.shape)
    assert bool(torch.isfinite(result).all())
    if not truth.numel():
        return 0.0
    return float((result.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def packed_linear(
    name: str, rows: int, outputs: int, columns: int, bits: int, group: int, dtype: torch.dtype, *,
    zeros: bool = False, bias: bool = False, activation: str = "", combine: str = "", shift: bool = False,
    x: Tensor | None = None, scale: float = 1.0, room: float = 0.0,
) -> Case:  # fmt: skip
    """A linear with packed weights."""
    random = _random()
    groups = -(-columns // group)
    codes = torch.randint(0, 1 << bits, (outputs, columns), generator=random, dtype=torch.uint8)
    scales = (torch.rand(outputs, groups, generator=random) * 0.02 + 1e-3) * scale
    middle = torch.randint(0, 1 << bits, (outputs, groups), generator=random, dtype=torch.uint8) if zeros else None
    element = BF16 if dtype == F32 else dtype
    if shift:
        packed, values = formats.pack_shifts(codes, scales, group, element), shift_values(codes).double()
    else:
        packed = formats.pack_integers(codes, scales, middle, bits, group, element)
        zero = 1 << (bits - 1) if middle is None else middle.double().repeat_interleave(group, 1)[:, :columns]
        values = codes.double() - zero
    weight = values * scales.double().repeat_interleave(group, 1)[:, :columns]
    if x is None:
        x = torch.randn(rows, columns, generator=random).to(dtype)
    added = torch.randn(outputs, generator=random).to(dtype) if bias else None
    other = torch.randn(*x.shape[:-1], outputs, generator=random).to(dtype) if combine else None
    wide = Epilogue(*(None if value is None else value.double() for value in (added, other)), activation, combine)
    truth = wide.apply(x.double() @ weight.t())
    arguments = (
        x, packed.words, packed.scales, packed.offsets, packed.factors, added, other, str(packed.layout), outputs,
        columns, packed.group, activation, combine,
    )  # fmt: skip
    return Case(name, linear_packed, arguments, [truth], room or ROOM[dtype])


def packed_linears() -> Iterator[Case]:
    """Rows 1 to 300, odd sizes, every form of weights and epilogue."""
    yield packed_linear("w4 one row", 1, 128, 256, 4, 128, F16, bias=True)
    yield packed_linear("w4 odd sizes, silu, mul", 5, 70, 300, 4, 32, F16, activation="silu", combine="mul")
    yield packed_linear("w4 zeros, gelu, add", 17, 130, 256, 4, 32, F16, zeros=True, activation="gelu", combine="add")
    yield packed_linear("w4 one group", 3, 64, 384, 4, 384, F16)
    yield packed_linear("w4 one group, zeros", 3, 64, 384, 4, 384, F16, zeros=True)
    yield packed_linear("w4 groups of two tiles, relu", 3, 64, 512, 4, 256, F16, activation="relu")
    yield packed_linear("w4 split", 2, 65, 2048, 4, 64, F16, bias=True, activation="gelu_tanh", combine="add")
    yield packed_linear("w4 40 rows", 40, 48, 256, 4, 16, F16)
    yield packed_linear("w4 300 rows", 300, 40, 128, 4, 128, F16)
    yield packed_linear("w4 tiny scales", 4, 64, 256, 4, 128, F16, scale=2.0**-10)
    yield packed_linear("w4 bf16", 5, 70, 300, 4, 128, BF16, bias=True)
    yield packed_linear("w4 bf16, small groups, zeros", 5, 70, 300, 4, 32, BF16, zeros=True)
    yield packed_linear("w4 float32", 5, 70, 300, 4, 128, F32, bias=True, activation="silu", combine="mul")
    yield packed_linear("w4 float32, small groups", 5, 70, 300, 4, 32, F32, room=ROOM[BF16])
    yield packed_linear("w4 dequantised first", MOST_ROWS + 8, 24, 130, 4, 32, F16, bias=True, combine="add")
    yield packed_linear("w2 dequantised first", MOST_ROWS + 8, 24, 256, 2, 128, F16, zeros=True)
    yield packed_linear("shift dequantised first", MOST_ROWS + 8, 24, 128, 4, 64, F16, shift=True)
    yield packed_linear("w2", 7, 64, 512, 2, 128, F16, bias=True)
    yield packed_linear("w2 odd sizes, zeros", 7, 70, 500, 2, 64, F16, zeros=True, activation="gelu_tanh")
    yield packed_linear("w2 one scale a tile", 7, 64, 512, 2, 256, F16)
    yield packed_linear("w2 bf16", 33, 40, 300, 2, 128, BF16)
    yield packed_linear("w3", 9, 64, 300, 3, 32, F16)
    yield packed_linear("w3 zeros", 9, 64, 300, 3, 32, F16, zeros=True)
    yield packed_linear("shift", 9, 64, 300, 4, 32, F16, shift=True)
    yield packed_linear("shift bf16", 9, 64, 300, 4, 128, BF16, shift=True)
    yield packed_linear("no rows", 0, 64, 128, 4, 32, F16)
    strided = torch.randn(6, 2 * 256, generator=_random()).to(F16)[::2, ::2]
    yield packed_linear("not contiguous", 3, 32, 256, 4, 128, F16, x=strided)
    misaligned = torch.randn(3 * 256 + 1, generator=_random()).to(F16)[1:].reshape(3, 256)
    yield packed_linear("misaligned", 3, 32, 256, 4, 128, F16, x=misaligned)
    batched = torch.randn(2, 3, 128, generator=_random()).to(F16).transpose(0, 1)
    yield packed_linear("batched, transposed", 6, 32, 128, 4, 128, F16, x=batched)
    yield packed_linear("rows more than 2 ** 31 elements apart", 2, 32, 128, 4, 128, F16, x=far_apart())


def far_apart() -> Tensor:
    """Two rows whose distance does not fit 32 bits; the memory between them is never touched."""
    x = torch.empty_strided((2, 128), (2**31 + 64, 1), dtype=F16)
    return x.copy_(torch.randn(2, 128, generator=_random()).to(F16))


_SMALL8 = {"BM": 32, "BN": 32, "BK": 32}


def integers(
    name: str, rows: int, outputs: int, columns: int, dtype: torch.dtype, per_row: bool, tma: bool = False
) -> Case:
    """A linear in 8 bits."""
    random = _random()
    x = torch.randn(rows, columns, generator=random).to(dtype)
    codes = torch.randint(-127, 128, (outputs, columns), generator=random, dtype=torch.int8)
    scales = torch.rand(outputs, generator=random) * 0.01
    bias, other = torch.randn(outputs, generator=random).to(dtype), torch.randn(rows, outputs, generator=random).to(dtype)
    wide = x.float()
    if per_row:
        step = wide.abs().amax(1, keepdim=True) / 127 if rows else wide.new_ones(0, 1)
        step = torch.where(step == 0, 1.0, step)
        levels, given = torch.round(wide / step).clamp(-127, 127), (None, None)
    else:
        given = (torch.tensor(0.03), torch.tensor(120.0))
        step = given[0]
        levels = (torch.round(wide / step) + 120).clamp(0, 255) - 120
    product = (levels.double() @ codes.double().t()) * scales.double() * step.double()
    truth = Epilogue(bias.double(), other.double(), "gelu", "add").apply(product)
    filled = torch.nn.functional.pad(codes, (0, -columns % COPIED))
    sums = codes.sum(1, dtype=torch.int32)
    arguments = (x, filled, scales, sums, bias, other, *given, "gelu", "add")
    small = {f"w8a8/{height}": Choice({**_SMALL8, "SWAP": int(height < 64)}, 4, 3) for height in (16, 32, 64, 128)}
    if tma:
        small = {"w8a8_tma/128": Choice(_SMALL8, 4, 3)}
    return Case(name, linear_int8, arguments, [truth], ROOM[dtype], small)


def all_integers() -> Iterator[Case]:
    """8-bit linears: per row, per tensor, odd sizes."""
    yield integers("w8a8 one row", 1, 70, 128, F16, True)
    yield integers("w8a8 odd sizes", 37, 50, 77, F32, True)
    yield integers("w8a8 per tensor", 5, 50, 77, F32, False)
    yield integers("w8a8 bf16", 70, 40, 96, BF16, True)
    yield integers("w8a8 130 rows, per tensor", 130, 40, 64, F32, False)
    yield integers("w8a8 no rows", 0, 8, 32, F16, True)


def ranges() -> Iterator[Case]:
    """Scale and zero point of a tensor."""
    for name, x in (
        ("range", torch.randn(3, 700, generator=_random()) + 0.5), ("range positive", torch.rand(5)),
        ("range of zeros", torch.zeros(9)), ("range of nothing", torch.zeros(0, 4)),
    ):  # fmt: skip
        low, high = (x.amin().clamp(max=0), x.amax().clamp(min=0)) if x.numel() else (torch.zeros(()), torch.zeros(()))
        scale = (high.double() - low.double()) / 255
        scale = torch.where(scale == 0, 1.0, scale)
        zero = torch.round(-low / scale.float()).double()
        yield Case(name, tensor_range, (x,), [scale, zero], 1e-6)


def decode(name: str, sizes: tuple[int, ...], dtype: torch.dtype, mask: Tensor | None = None) -> Case:
    """Attention of few queries: batch, heads, kv heads, queries, keys, width."""
    random = _random()
    batch, heads, kv_heads, queries, keys, width = sizes
    q = torch.randn(batch, heads, queries, width, generator=random).to(dtype)
    k = (torch.randn(batch, kv_heads, keys, width, generator=random) * 2).to(dtype)
    v = torch.randn(batch, keys, kv_heads, width, generator=random).to(dtype).transpose(1, 2)
    scale = width**-0.5
    scores = q.double() @ k.double().repeat_interleave(heads // kv_heads, 1).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    truth = weights @ v.double().repeat_interleave(heads // kv_heads, 1)
    return Case(name, decode_attention, (q, k, v, mask, scale), [truth], ROOM[dtype])


def decodes() -> Iterator[Case]:
    """Decode attention: shared heads, masks, keys that do not fill a block, splits that see nothing."""
    random = _random()
    yield decode("decode", (2, 4, 2, 1, 300, 32), F16)
    yield decode("decode bf16, boolean mask", (1, 6, 2, 3, 100, 64), BF16, torch.rand(1, 1, 3, 100, generator=random) > 0.3)
    yield decode("decode odd width, added mask", (2, 2, 2, 1, 77, 40), F16, torch.randn(1, 2, 1, 77, generator=random))
    last = torch.zeros(1, 1, 2, 600, dtype=torch.bool)
    last[:, :, 0, 500:] = True
    yield decode("decode splits and a query that see nothing", (1, 4, 4, 2, 600, 16), F16, last)
    yield decode("decode nothing", (0, 2, 2, 1, 16, 16), F16)
    large = torch.zeros(1, 1, 1, 600)
    large[..., :300] = -2000.0
    yield decode("decode maxima far apart", (1, 2, 2, 1, 600, 16), F16, large)


def patterns(name: str, batch: int, length: int, width: int, dtype: torch.dtype, period: int) -> Case:
    """Six heads with six patterns."""
    random = _random()
    every = [dense(), diagonal(7), diagonals(2, period), stripes(3, 4, 12), nothing(), diagonal(9, sink=2)]
    numbers = [number for pattern in every for number in pattern]
    q, k, v = (
        torch.randn(batch, length, len(every), width, generator=random).to(dtype).transpose(1, 2) for _ in range(3)
    )
    places = torch.arange(length)
    seen = torch.stack([seen_by(pattern, places, places) for pattern in patterns_of(numbers)])
    scores = (q.double() @ k.double().transpose(-1, -2) * width**-0.5).masked_fill(~seen, float("-inf"))
    truth = torch.softmax(scores, -1).nan_to_num(0.0) @ v.double()
    element = {F16: "fp16", BF16: "bf16"}[dtype]
    wide = max(16, 1 << (width - 1).bit_length())
    small = {
        f"pattern_attention/{element}/{wide}/{numbering}": Choice({"BQ": 16, "BK": 16}, 4, 3)
        for numbering in ("plain", "renumbered")
    }
    return Case(name, pattern_attention, (q, k, v, numbers, width**-0.5), [truth], ROOM[dtype], small)


def all_patterns() -> Iterator[Case]:
    """Pattern-sparse attention: renumbered and not, odd lengths and widths."""
    yield patterns("patterns, renumbered", 1, 64, 32, F16, 16)
    yield patterns("patterns, odd sizes, bf16", 2, 45, 24, BF16, 16)
    yield patterns("patterns, one token", 1, 1, 16, F16, 16)
    yield patterns("patterns, no batch", 0, 32, 16, F16, 16)


def qkv(name: str, sizes: tuple[int, ...], dtype: torch.dtype, norm: bool, rotated: bool, bias: bool) -> Case:
    """Norm, product, rotary embedding: batch, length, inputs, heads, kv heads, width."""
    random = _random()
    batch, length, columns, heads, kv_heads, width = sizes
    outputs = (heads + 2 * kv_heads) * width
    codes = torch.randint(0, 16, (outputs, columns), generator=random, dtype=torch.uint8)
    scales = torch.rand(outputs, -(-columns // 32), generator=random) * 0.02 + 1e-3
    packed = formats.pack_integers(codes, scales, None, 4, 32, BF16 if dtype == F32 else dtype)
    weight = (codes.double() - 8) * scales.double().repeat_interleave(32, 1)[:, :columns]
    x = (torch.randn(batch, length, columns, generator=random) * 3).to(dtype)
    wide = x.double()
    if norm:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    added = torch.randn(outputs, generator=random).to(dtype) if bias else None
    y = wide @ weight.t() + (0 if added is None else added.double())
    q, k, v = y.reshape(batch, length, -1, width).transpose(1, 2).split([heads, kv_heads, kv_heads], 1)
    cos = sin = None
    if rotated:
        angle = torch.randn(1, length, width // 2, generator=random)
        cos, sin = (torch.cat([f(angle)] * 2, -1).to(dtype) for f in (torch.cos, torch.sin))

        def turned(t: Tensor) -> Tensor:
            low, high = t.chunk(2, -1)
            return t * cos.double()[:, None] + torch.cat([-high, low], -1) * sin.double()[:, None]

        q, k = turned(q), turned(k)
    arguments = (
        x, packed.words, packed.scales, packed.offsets, packed.factors, added, cos, sin, str(packed.layout), outputs,
        columns, packed.group, heads, kv_heads, 1e-5 if norm else None,
    )  # fmt: skip
    return Case(name, qkv_packed, arguments, [q, k, v], 2 * ROOM[BF16 if dtype == F32 else dtype])


def all_qkv() -> Iterator[Case]:
    """Queries, keys and values at once."""
    yield qkv("qkv, norm, rotary", (2, 3, 256, 4, 2, 32), F16, True, True, False)
    yield qkv("qkv, bias, rotary, bf16", (1, 5, 200, 2, 2, 24), BF16, False, True, True)
    yield qkv("qkv, norm, float32", (1, 1, 128, 2, 1, 16), F32, True, False, True)


SOURCES: tuple[Callable[[], Iterator[Case]], ...] = (
    packed_linears, all_integers, ranges, decodes, all_patterns, all_qkv,
)  # fmt: skip


def all_cases() -> Iterator[Case]:
    """Every case."""
    for source in SOURCES:
        yield from source()
