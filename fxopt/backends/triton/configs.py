"""Which tile sizes, warps and stages a kernel is launched with: tables per architecture and Triton version.

Nothing is timed at run time. The tables in `config_tables/` were made without a GPU, from the static reports of all
candidates (`python -m benchmarks.triton_configs`); each row holds the report of what it chose, from which the cost
model (`cost.py`) works.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fxopt.backends.triton import library
from fxopt.backends.triton.chips import Chip
from fxopt.backends.triton.formats import Packed, scales_weights
from fxopt.backends.triton.static_report import StaticReport

TABLES = Path(__file__).parent / "config_tables"
LINEAR_ROWS = (16, 32, 64)  # tile heights of packed linears
INT8_ROWS = (16, 32, 64, 128)
DECODE_ROWS = (16, 32, 64)  # queries times heads that share keys
ELEMENTS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_LEAST_SHARE = 4  # tiles of a split
_MOST_SPLITS = 8
_WAVES = 2  # programs wanted per multiprocessor
_KEYS_OF_SPLIT, _MOST_KEY_SPLITS = 256, 64


@dataclass(frozen=True)
class Choice:
    """Constants of a kernel, warps and stages; the report of the kernel that they make, where a table says so."""

    constants: Mapping[str, int] = field(hash=False)
    warps: int
    stages: int
    report: StaticReport | None = field(default=None, compare=False)

    def __getitem__(self, name: str) -> int:
        return self.constants[name]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        assert self.report is not None
        names = ("registers", "spilled", "shared", "loop", "tensor_names")
        report = {name: getattr(self.report, name) for name in names}
        return {"constants": dict(self.constants), "warps": self.warps, "stages": self.stages, "report": report}


def linear_key(packed: Packed, element: torch.dtype, rows: int) -> str:
    """The key of a linear with packed weights: kernel, element type, tile height, what is scaled."""
    how = "offset" if packed.offsets is not None else "scaled" if scales_weights(packed.group, False) else "summed"
    whole = "" if packed.group else "-whole"
    return f"{packed.layout.name}/{ELEMENTS[element]}/{_at_least(rows, LINEAR_ROWS)}/{how}{whole}"


def int8_key(rows: int, copies_tiles: bool) -> str:
    """The key of an 8-bit product."""
    return f"w8a8{'_tma' if copies_tiles else ''}/{_at_least(rows, INT8_ROWS)}"


def decode_key(element: torch.dtype, rows: int, width: int, masked: int) -> str:
    """The key of decode attention."""
    return f"decode_attention/{ELEMENTS[element]}/{_at_least(rows, DECODE_ROWS)}/{padded(width)}/{masked}"


def pattern_key(element: torch.dtype, width: int, renumbered: bool) -> str:
    """The key of pattern-sparse attention."""
    return f"pattern_attention/{ELEMENTS[element]}/{padded(width)}/{'renumbered' if renumbered else 'plain'}"


def padded(width: int) -> int:
    """The power of two that holds a head."""
    return max(16, 1 << (width - 1).bit_length())


def _at_least(value: int, sizes: tuple[int, ...]) -> int:
    return next((size for size in sizes if value <= size), sizes[-1])


_FORCED: ContextVar[Mapping[str, Choice] | None] = ContextVar("fxopt_triton_choices", default=None)


@contextmanager
def forced(choices: Mapping[str, Choice]) -> Iterator[None]:
    """Inside, these keys have these choices: for making the tables, and for tests."""
    token = _FORCED.set({**(_FORCED.get() or {}), **choices})
    try:
        yield
    finally:
        _FORCED.reset(token)


def choice_of(chip: Chip, key: str) -> Choice | None:
    """The choice for a key; None when the kernel is not to be used: no candidate of it compiled without spills."""
    forced_choice = (_FORCED.get() or {}).get(key)
    if forced_choice is not None:
        return forced_choice
    rows: dict[str, Any] = table(table_arch(chip.arch)).get(key, {})
    usable = sorted(rows, key=_version)
    if not usable:
        return None
    installed = library.minor()
    known = [version for version in usable if _version(version) <= installed]
    row = rows[known[-1] if known else usable[0]]
    return None if row is None else _choice(key, row, chip)


def _choice(key: str, row: dict[str, Any], chip: Chip) -> Choice:
    report = StaticReport(key.split("/")[0], chip.arch, row["warps"], **row["report"])
    return Choice(row["constants"], row["warps"], row["stages"], report)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def table_arch(arch: int) -> int:
    """The architecture whose table is used for another one: the latest that is not later."""
    known = sorted(int(path.stem.removeprefix("sm_")) for path in TABLES.glob("sm_*.json"))
    return max((candidate for candidate in known if candidate <= arch), default=known[0])


@cache
def table(arch: int) -> dict[str, dict[str, Any]]:
    """Key -> Triton version -> row, or None where nothing compiled well."""
    rows: dict[str, dict[str, Any]] = json.loads((TABLES / f"sm_{arch}.json").read_text(encoding="utf-8"))["rows"]
    return rows


def splits_for(chip: Chip, choice: Choice, rows: int, packed: Packed) -> int:
    """Over how many programs the inputs of a linear are split, so that all multiprocessors have work."""
    programs = -(-rows // choice["BM"]) * (packed.words.shape[1] // choice["BN"])
    tiles = -(-packed.columns // packed.layout.tile)
    wanted = _WAVES * chip.multiprocessors // max(1, programs)
    return max(1, min(wanted, tiles // _LEAST_SHARE, _MOST_SPLITS))


def key_splits(chip: Chip, pairs: int, keys: int) -> int:
    """Over how many programs the keys of decode attention are split."""
    wanted = _WAVES * chip.multiprocessors // max(1, pairs)
    return max(1, min(wanted, -(-keys // _KEYS_OF_SPLIT), _MOST_KEY_SPLITS))
