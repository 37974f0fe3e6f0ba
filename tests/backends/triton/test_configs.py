"""The tables: complete, free of spills, chosen by version and architecture; splits fill the chip."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.backends.triton import configs, library, worth
from fxopt.backends.triton.chips import chip_of_arch
from fxopt.backends.triton.configs import Choice, choice_of, forced
from fxopt.backends.triton.formats import PLANAR2, PLANAR4
from fxopt.backends.triton.ops.registry import usable
from fxopt.errors import Unsupported

TABLES = (80, 86, 89, 90, 100)
CHIP = chip_of_arch(80, 108, 1.4e9)


@pytest.fixture(autouse=True)
def some_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "minor", lambda: (3, 7))


@pytest.mark.parametrize("arch", TABLES)
def test_rows_have_reports_without_spills(arch: int) -> None:
    chip = chip_of_arch(arch, 100, 1.5e9)
    for key, versions in configs.table(arch).items():
        for version, row in versions.items():
            assert version in ("3.6", "3.7", "3.9"), key
            if row is not None:
                report = configs._choice(key, row, chip).report
                assert report is not None and report.refusal(chip) == "" and report.tensor_names, (key, version)


def test_all_tables_have_the_same_keys() -> None:
    kinds = [{key for key in configs.table(arch) if not key.startswith("w8a8")} for arch in TABLES]
    assert all(kind == kinds[0] for kind in kinds) and len(kinds[0]) > 150
    for arch in TABLES:
        known = configs.table(arch)
        assert {f"w8a8/{rows}" for rows in (16, 32, 64)} < set(known)
        assert (f"w8a8_tma/{configs.INT8_ROWS[-1]}" in known) == (arch >= 90)
        assert all(known[key]["3.7"] is not None for key in known if key.startswith(("planar4", "shift4", "w8a8")))


def test_every_key_of_an_operator_is_in_the_tables() -> None:
    known = configs.table(80)
    for layout in (PLANAR4, PLANAR2):
        for group in (32, 128, 4096):
            for element in (torch.float16, torch.bfloat16):
                for rows in (1, 17, 200):
                    packed = worth.shape_of_packed(4096, 4096, layout, group, element)
                    assert configs.linear_key(packed, element, rows) in known
    assert configs.int8_key(1, False) == "w8a8/16" and configs.int8_key(1000, True) == "w8a8_tma/128"
    assert configs.decode_key(torch.float16, 20, 96, 1) == "decode_attention/fp16/32/128/1"
    assert configs.decode_key(torch.bfloat16, 1, 8, 0) in known
    assert configs.pattern_key(torch.float16, 80, True) == "pattern_attention/fp16/128/renumbered"


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest row that is not newer than Triton, else the oldest one."""
    rows: dict[str, Any] = {
        "3.7": {"constants": {"BM": 7}, "warps": 4, "stages": 3, "report": _report()},
        "3.10": {"constants": {"BM": 10}, "warps": 4, "stages": 3, "report": _report()},
        "3.12": None,
    }
    monkeypatch.setattr(configs, "table", lambda arch: {"k": rows})
    for installed, expected in (((3, 6), 7), ((3, 7), 7), ((3, 9), 7), ((3, 10), 10), ((3, 11), 10)):
        monkeypatch.setattr(library, "minor", lambda installed=installed: installed)
        choice = choice_of(CHIP, "k")
        assert choice is not None and choice["BM"] == expected
    monkeypatch.setattr(library, "minor", lambda: (3, 12))
    assert choice_of(CHIP, "k") is None and choice_of(CHIP, "unknown") is None
    with pytest.raises(Unsupported, match="k has no configuration for sm_80 that compiles without spills"):
        usable(CHIP, "k")


def _report() -> dict[str, Any]:
    return {"registers": 1, "spilled": 0, "shared": 0, "loop": {}, "tensor_names": {}}


def test_architectures_between_tables() -> None:
    assert [configs.table_arch(arch) for arch in (80, 87, 89, 90, 100, 120)] == [80, 86, 89, 90, 100, 100]


def test_choices_can_be_forced() -> None:
    mine = Choice({"BM": 1}, 1, 1)
    with forced({"k": mine}):
        with forced({"l": mine}):
            assert choice_of(CHIP, "k") is choice_of(CHIP, "l") is mine
        assert choice_of(CHIP, "l") is None
    assert choice_of(CHIP, "k") is None


@pytest.mark.parametrize(
    ("rows", "outputs", "columns", "splits"),
    [(1, 4096, 4096, 6), (1, 128, 4096, 8), (1, 4096, 256, 1), (1, 65536, 4096, 1), (512, 4096, 4096, 1)],
)
def test_splits(rows: int, outputs: int, columns: int, splits: int) -> None:
    packed = worth.shape_of_packed(outputs, columns, PLANAR4, 128, torch.float16)
    choice = Choice({"BM": 16, "BN": 128}, 4, 3)
    assert configs.splits_for(CHIP, choice, rows, packed) == splits


def test_splits_of_keys() -> None:
    assert configs.key_splits(CHIP, 8, 8192) == 27
    assert configs.key_splits(CHIP, 8, 300) == 2
    assert configs.key_splits(CHIP, 1000, 8192) == 1
    assert configs.key_splits(CHIP, 1, 1 << 20) == 64
