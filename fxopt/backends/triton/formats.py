"""How kernels want weights: codes in planes, scales beside them; versioned, so that a kernel gets what it was made for.

The inputs of a row are cut into tiles of 16 words; plane i of a tile holds 16 neighbouring inputs, word c has its code
of plane i in bits i * bits ... (i + 1) * bits - 1. So one word gives one value to each plane, and the tile that a
program loads is one contiguous piece of memory:

    words int32 [tiles, rows, 16]: input tile * 16 * planes + i * 16 + c

Rows are filled up to a multiple of 128, inputs to whole tiles. Scales are 16-bit floats relative to the largest one of
their row, whose power of two is kept in float32 (`factors`): small weights do not become subnormal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.errors import Unsupported, unknown

COLUMNS = 16  # words per tile and row
ROWS = 128  # rows are filled up to a multiple
_CHUNK = 1 << 24  # codes that are packed at a time


@dataclass(frozen=True)
class Layout:
    """A packed form of weights; printed and parsed as `planar4/1`."""

    name: str
    version: int
    bits: int  # of a code
    is_shift: bool = False  # codes are signs and exponents

    @property
    def planes(self) -> int:
        """Codes per word."""
        return 32 // self.bits

    @property
    def tile(self) -> int:
        """Inputs per tile."""
        return COLUMNS * self.planes

    @property
    def middle(self) -> int:
        """The code that means zero, of integer codes."""
        return 1 << (self.bits - 1)

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


PLANAR4 = Layout("planar4", 1, 4)
PLANAR2 = Layout("planar2", 1, 2)
SHIFT4 = Layout("shift4", 1, 4, is_shift=True)
LAYOUTS = {layout.name: layout for layout in (PLANAR4, PLANAR2, SHIFT4)}
_LEAST_EXPONENT = 15  # the value of shift code c is 2 ** (c - 15) in the kernel, 2 ** (c - 7) in the operator
_SHIFT_SCALE = 2.0**8


def parse(text: str) -> Layout:
    """The layout of a description.

    Raises:
        UnknownName: no layout of this name exists.
        Unsupported: it has another version.
    """
    name, _, version = text.partition("/")
    if name not in LAYOUTS:
        raise unknown("packed layout", name, LAYOUTS)
    if text != str(LAYOUTS[name]):
        known = LAYOUTS[name]
        raise Unsupported(f"packed weights have layout {name}, version {version}; expected {known}: pack them again")
    return LAYOUTS[name]


def layout_for(bits: int) -> Layout | None:
    """The layout that holds codes of so many bits; 3-bit codes are stored in 4."""
    return {2: PLANAR2, 3: PLANAR4, 4: PLANAR4}.get(bits)


def refusal(bits: int, group: int, columns: int) -> str:
    """Why weights of this form have no packed layout; "" when they do."""
    layout = layout_for(bits)
    if layout is None:
        return f"{bits}-bit weights have no packed layout; expected 2, 3 or 4 bits"
    if group >= columns or (group >= COLUMNS and layout.tile % group == 0) or (group and group % layout.tile == 0):
        return ""
    return f"group {group} has no packed layout; expected {_legal_groups(layout)}"


def _legal_groups(layout: Layout) -> str:
    inside = [str(COLUMNS << step) for step in range(layout.planes.bit_length()) if COLUMNS << step <= layout.tile]
    return f"{', '.join(inside)} or a multiple of {layout.tile}"


@dataclass(frozen=True)
class Packed:
    """A packed weight [outputs, columns].

    Attributes:
        words: int32 [tiles, rows, 16].
        scales: [groups, rows] in the element type of the activations (float16 when products are scaled afterwards).
        offsets: like `scales`, added to every scaled code, or None.
        factors: float32 [rows].
    """

    layout: Layout
    words: Tensor
    scales: Tensor
    offsets: Tensor | None
    factors: Tensor
    outputs: int
    columns: int
    group: int  # inputs per scale: a divisor of the tile or a multiple; 0: all, whose scale is in `factors`

    @property
    def scales_weights(self) -> bool:
        """Whether weights are scaled before they are multiplied, instead of each tile's sums."""
        return scales_weights(self.group, self.offsets is not None)


def scales_weights(group: int, has_offsets: bool) -> bool:
    """Sums over less than 128 inputs would be scaled too often; offsets go to the weights."""
    return has_offsets or 0 < group < 128


def pack_integers(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, dtype: torch.dtype
) -> Packed:
    """Pack (codes - zeros) * scales.

    Args:
        codes: uint8 [out, in].
        scales: float32 [out, groups], groups = ceil(in / group).
        zeros: uint8 [out, groups], or None: 2 ** (bits - 1).
        dtype: element type of the activations, float16 or bfloat16.

    Raises:
        Unsupported: there is no layout for this form.
    """
    outputs, columns = codes.shape
    reason = refusal(bits, group, columns)
    layout = layout_for(bits)
    if reason or layout is None:
        raise Unsupported(reason)
    moved = layout.middle - (1 << (bits - 1))  # 3-bit codes in 4 bits
    group = 0 if group >= columns else group
    kept = dtype if scales_weights(group, zeros is not None) else torch.float16
    relative, factors = _relative(scales, group, layout, columns)
    relative = relative.to(kept)
    words = pack_words(codes, layout, layout.middle, moved)
    offsets = None
    if zeros is not None:  # of the rounded scales: a code at its zero point stays next to zero
        above = torch.nn.functional.pad((1 << (bits - 1)) - zeros.float(), (0, relative.shape[1] - zeros.shape[1]))
        offsets = _stored(above * relative.float(), words, kept)
    stored = _stored(relative, words, kept)
    return Packed(layout, words, stored, offsets, _filled(factors, words), outputs, columns, group)


def pack_shifts(codes: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Packed:
    """Pack signs and exponents: codes uint8 [out, in] as in `linear_shift`, scales float32 [out, groups]."""
    outputs, columns = codes.shape
    reason = refusal(4, group, columns)
    if reason:
        raise Unsupported(reason)
    group = 0 if group >= columns else group
    relative, factors = _relative(scales, group, SHIFT4, columns)
    words = pack_words(codes, SHIFT4, 0)
    kept = torch.float16 if not scales_weights(group, False) else dtype
    stored = _stored(relative * _SHIFT_SCALE, words, kept)
    return Packed(SHIFT4, words, stored, None, _filled(factors, words), outputs, columns, group)


def _relative(scales: Tensor, group: int, layout: Layout, columns: int) -> tuple[Tensor, Tensor]:
    """Scales [out, groups] over the largest power of two below the largest one of their row, and these powers.

    One scale per row is all factor.
    """
    if group == 0:
        return torch.ones_like(scales, dtype=torch.float32), scales[:, 0].float()
    whole = -(-columns // layout.tile) * layout.tile
    scales = torch.nn.functional.pad(scales.float(), (0, -(-whole // group) - scales.shape[1]))
    largest = scales.abs().amax(1)
    usable = (largest > 0) & torch.isfinite(largest)
    factors = torch.where(usable, torch.exp2(torch.floor(torch.log2(torch.where(usable, largest, 1.0)))), 1.0)
    return scales / factors[:, None], factors


def _stored(values: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, groups] -> [groups, rows]."""
    return torch.nn.functional.pad(values.t().to(dtype), (0, words.shape[1] - len(values))).contiguous()


def _filled(factors: Tensor, words: Tensor) -> Tensor:
    return torch.nn.functional.pad(factors, (0, words.shape[1] - len(factors))).contiguous()


def pack_words(codes: Tensor, layout: Layout, fill: int, moved: int = 0) -> Tensor:
    """uint8 codes [out, in], raised by `moved`, as int32 words [tiles, rows, 16]; `fill` is the code of padding."""
    outputs, columns = codes.shape
    tiles, rows = -(-columns // layout.tile), -(-outputs // ROWS) * ROWS
    words = torch.empty(tiles, rows, COLUMNS, dtype=torch.int32, device=codes.device)
    step = max(1, _CHUNK // max(1, tiles * layout.tile))
    for begin in range(0, rows, step):
        part = codes[begin : begin + step] + moved
        count = min(begin + step, rows) - begin
        padding = (0, tiles * layout.tile - columns, 0, count - len(part))
        part = torch.nn.functional.pad(part, padding, value=fill).reshape(count, tiles, layout.planes, COLUMNS)
        whole = torch.zeros(count, tiles, COLUMNS, dtype=torch.int32, device=codes.device)
        for plane in range(layout.planes):
            whole |= part[:, :, plane].to(torch.int32) << (layout.bits * plane)
        words[:, begin : begin + count] = whole.transpose(0, 1)
    return words


def unpack_words(words: Tensor, layout: Layout, outputs: int, columns: int) -> Tensor:
    """The inverse of `pack_words`: uint8 [out, in]."""
    mask = (1 << layout.bits) - 1
    planes = [((words >> (layout.bits * plane)) & mask).to(torch.uint8) for plane in range(layout.planes)]
    codes = torch.stack(planes, 2)  # [tiles, rows, planes, 16]
    every = codes.permute(1, 0, 2, 3).reshape(words.shape[1], len(words) * layout.tile)
    return every[:outputs, :columns]


def dequantized(packed: Packed) -> Tensor:
    """The weight that the kernels compute with, float32 [outputs, columns]."""
    codes = unpack_words(packed.words, packed.layout, packed.outputs, packed.columns)
    if packed.layout.is_shift:
        exponents = (codes & 7).float()
        values = torch.where(exponents > 0, torch.exp2(exponents - _LEAST_EXPONENT), 0.0)
        values = torch.where(codes > 7, -values, values)
    else:
        values = codes.float() - packed.layout.middle
    values = values * _spread(packed.scales, packed)
    if packed.offsets is not None:
        values = values + _spread(packed.offsets, packed)
    return values * packed.factors[: packed.outputs, None]


def _spread(values: Tensor, packed: Packed) -> Tensor:
    """[groups, rows] -> [outputs, columns]."""
    per_row = values[:, : packed.outputs].t().float()
    return per_row.repeat_interleave(packed.group or packed.columns, 1)[:, : packed.columns]
