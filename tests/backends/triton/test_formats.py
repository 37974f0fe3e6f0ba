"""Packed weights mean what was packed; descriptions that do not fit are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fxopt.backends.triton import formats
from fxopt.backends.triton.formats import LAYOUTS, PLANAR2, PLANAR4, Layout
from fxopt.errors import UnknownName, Unsupported
from fxopt.ir.ops.linear_nbits import dequantized, group_count
from fxopt.ir.ops.linear_shift import shift_codes, shift_values
from fxopt.ir.packing import pack


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=str)
@pytest.mark.parametrize(("outputs", "columns"), [(128, 256), (1, 1), (129, 300), (5, 16), (0, 8)])
def test_words_hold_the_codes(layout: Layout, outputs: int, columns: int) -> None:
    codes = torch.randint(0, 1 << layout.bits, (outputs, columns), dtype=torch.uint8)
    words = formats.pack_words(codes, layout, 0)
    assert words.dtype == torch.int32 and words.shape[1] % formats.ROWS == 0 and words.is_contiguous()
    assert torch.equal(formats.unpack_words(words, layout, outputs, columns), codes)


def test_where_a_code_is() -> None:
    """Input tile * 128 + plane * 16 + word of a 4-bit row."""
    codes = torch.zeros(2, 256, dtype=torch.uint8)
    codes[1, 128 + 3 * 16 + 5] = 9
    words = formats.pack_words(codes, PLANAR4, 0)
    assert words[1, 1, 5] == 9 << 12 and int(words.count_nonzero()) == 1


def test_large_weights_are_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 4, (300, 600), dtype=torch.uint8)
    whole = formats.pack_words(codes, PLANAR2, 1)
    monkeypatch.setattr(formats, "_CHUNK", 1000)
    assert torch.equal(formats.pack_words(codes, PLANAR2, 1), whole)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256, 300])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_those_of_the_operator(bits: int, group: int, has_zeros: bool, dtype: torch.dtype) -> None:
    outputs, columns = 33, 300
    codes = torch.randint(0, 1 << bits, (outputs, columns), dtype=torch.uint8)
    scales = torch.rand(outputs, group_count(columns, group)) * 1e-4 + 1e-7  # small ones are no 16-bit floats
    zeros = torch.randint(0, 1 << bits, scales.shape, dtype=torch.uint8) if has_zeros else None
    packed = formats.pack_integers(codes, scales, zeros, bits, group, dtype)
    expected = dequantized(pack(codes, bits), scales, zeros, bits, group, columns)
    room = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    largest = float(scales.max()) * (1 << bits)  # offsets are rounded too
    torch.testing.assert_close(formats.dequantized(packed), expected, rtol=room, atol=largest * room / 2)


@pytest.mark.parametrize("group", [32, 128, 300])
def test_shifts(group: int) -> None:
    codes, scales = shift_codes(torch.randn(9, 300), group)
    packed = formats.pack_shifts(codes, scales, group, torch.float16)
    expected = shift_values(codes) * scales.repeat_interleave(group, 1)[:, :300]
    torch.testing.assert_close(formats.dequantized(packed), expected, rtol=1e-3, atol=1e-6)


def test_rows_of_zeros_and_unusable_scales() -> None:
    codes = torch.full((3, 64), 8, dtype=torch.uint8)
    scales = torch.tensor([[0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0]])
    packed = formats.pack_integers(codes, scales, None, 4, 32, torch.float16)
    weight = formats.dequantized(packed)
    assert not weight[0].any() and not bool(torch.isfinite(packed.scales[:, 1:3]).all())


@pytest.mark.parametrize(
    ("bits", "group", "reason"),
    [
        (8, 128, "8-bit weights have no packed layout; expected 2, 3 or 4 bits"),
        (4, 48, "group 48 has no packed layout; expected 16, 32, 64, 128 or a multiple of 128"),
        (4, 8, "group 8 has no packed layout"),
        (2, 384, "group 384 has no packed layout; expected 16, 32, 64, 128, 256 or a multiple of 256"),
        (4, 384, ""), (4, 1000, ""), (4, 2000, ""), (3, 16, ""), (2, 512, ""),
    ],
)  # fmt: skip
def test_what_has_no_layout_says_so(bits: int, group: int, reason: str) -> None:
    found = formats.refusal(bits, group, 1000)
    assert found.startswith(reason) if reason else not found
    if reason:
        codes = torch.zeros(4, 1000, dtype=torch.uint8)
        with pytest.raises(Unsupported, match=reason.split(";")[0]):
            formats.pack_integers(codes, torch.ones(4, 1000 // group + 1), None, bits, group, torch.float16)


def test_descriptions() -> None:
    assert formats.parse("planar4/1") is PLANAR4
    assert formats.parse(str(PLANAR2)) is PLANAR2
    newer = dataclasses.replace(PLANAR4, version=2)
    with pytest.raises(Unsupported, match="layout planar4, version 2; expected planar4/1: pack them again"):
        formats.parse(str(newer))
    with pytest.raises(UnknownName, match="did you mean 'planar4'"):
        formats.parse("planar5/1")


def test_operators_refuse_another_layout() -> None:
    from fxopt.backends.triton.ops.linear_packed import linear_packed

    codes = torch.zeros(4, 128, dtype=torch.uint8)
    packed = formats.pack_integers(codes, torch.ones(4, 1), None, 4, 128, torch.float16)
    operands = packed.words, packed.scales, None, packed.factors, None, None
    with pytest.raises(Unsupported, match="pack them again"):
        linear_packed(torch.ones(1, 128), *operands, "planar4/0", 4, 128, 0, "", "")
