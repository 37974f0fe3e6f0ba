"""Large constants lie in files, and what computing them left goes back to the system."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch

from benchmarks.onnx_large import memory_of
from fxopt.errors import InvalidOption
from fxopt.ir.memory import limit, spilled

MIB = 1 << 20


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    return memory_of(os.getpid())[0]


def test_a_large_constant_is_a_map_of_a_file_without_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    value = torch.arange(MIB, dtype=torch.int32).reshape(512, 2048).t()
    before = anonymous()
    kept = [spilled(value) for _ in range(16)]  # 64 MiB
    assert all(torch.equal(one, value) and one.is_contiguous() for one in kept)
    assert anonymous() - before < 32 * MIB
    assert list(tmp_path.iterdir()) == []
    small = torch.ones(4)
    assert spilled(small) is small


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no call for it")
def test_freed_blocks_between_small_ones_are_given_back() -> None:
    torch.empty(30 * MIB, dtype=torch.uint8).fill_(1)  # freed: from now on blocks up to this size stay in the heap
    before = anonymous()
    large, pins = [], []
    for _ in range(16):
        large.append(torch.ones(10 * MIB, dtype=torch.uint8))
        pins.append(torch.ones(MIB, dtype=torch.uint8))
    assert anonymous() - before > 100 * MIB
    large.clear()
    spilled(torch.ones(2 * MIB, dtype=torch.uint8))
    assert anonymous() - before < 50 * MIB
    assert len(pins) == 16


@pytest.mark.parametrize(("text", "expected"), [("4G", 4 << 30), ("500m", 500 * MIB), ("12 ", 12), ("1TB", 1 << 40)])
def test_the_limit(text: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_MEMORY", text)
    assert limit() == expected


@pytest.mark.parametrize("text", ["much", "0", "-1G", "4GG"])
def test_no_limit(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_MEMORY", text)
    with pytest.raises(InvalidOption, match=f"FXOPT_MEMORY={text}: expected a size"):
        limit()
