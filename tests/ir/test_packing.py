"""Packed codes: what goes in comes out, and the layout is the documented one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.ir.packing import pack, packed_width, unpack


@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 70), st.randoms(use_true_random=False))
def test_round_trip(bits: int, rows: int, columns: int, random: object) -> None:
    generator = torch.Generator().manual_seed(random.getrandbits(32))  # type: ignore[attr-defined]
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_width(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)


@given(st.integers(1, 8), st.integers(1, 40), st.randoms(use_true_random=False))
def test_a_row_is_one_little_endian_bit_stream(bits: int, columns: int, random: object) -> None:
    generator = torch.Generator().manual_seed(random.getrandbits(32))  # type: ignore[attr-defined]
    codes = torch.randint(0, 1 << bits, (1, columns), generator=generator, dtype=torch.uint8)
    number = sum(int(code) << (bits * index) for index, code in enumerate(codes[0]))
    assert bytes(pack(codes, bits)[0].tolist()) == number.to_bytes(packed_width(columns, bits), "little")


def test_rows_are_packed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 8, (100, 33), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = pack(codes, 3)
    monkeypatch.setattr("fxopt.ir.packing._CHUNK", 64)
    assert torch.equal(pack(codes, 3), whole)
    assert torch.equal(unpack(whole, 3, 33), codes)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="the code 16 does not fit into 4 bits"):
        pack(torch.tensor([[16]], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="9 bits"):
        unpack(torch.zeros(1, 1, dtype=torch.uint8), 9, 1)
