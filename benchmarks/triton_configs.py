"""Make the Triton backend's tables of tile sizes: compile all candidates for absent GPUs, keep the best by prediction.

    python -m benchmarks.triton_configs [--arch 80 90] [--only PREFIX] [--like 3.7]

Needs the package triton, and no GPU. Rows are written for the installed Triton version; those of other versions stay.
A candidate that spills registers or does not fit is dropped; of the others, the one that the static cost model finds
fastest on a typical shape is kept, with its report. Nothing of it was timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.backends.triton import configs, library
from fxopt.backends.triton.chips import Chip, chip_of
from fxopt.backends.triton.configs import Choice
from fxopt.backends.triton.cost import Work, estimate
from fxopt.backends.triton.launch import Launch, recorded
from fxopt.backends.triton.offline import compiled
from fxopt.backends.triton.static_report import StaticReport, report_on
from fxopt.backends.triton.testing import arguments_for
from fxopt.cost_model.targets import get_target
from fxopt.errors import Unsupported
from fxopt.ir.target import Target

TYPICAL = {80: "a100", 90: "h100", 100: "b200", 86: "rtx3090", 89: "l40s"}
_ALIKE = {86: 80, 89: 80}  # choices are taken from another architecture where they compile well


@dataclass(frozen=True)
class Space:
    """What may be chosen for a key: candidates, and the work of a typical launch with each."""

    key: str
    candidates: tuple[Choice, ...]
    work: Callable[[Choice], Work] | None = None  # None: the first that compiles well is taken
    like: str = ""  # the key whose choice is taken where it compiles well


def linears() -> Iterator[Space]:
    """Packed linears on 4096 x 4096."""
    size = 4096
    for layout, tile, bits in (("planar4", 128, 4), ("planar2", 256, 2), ("shift4", 128, 4)):
        hows = ("summed", "scaled", "summed-whole", "offset", "offset-whole")
        for element in ("fp16", "bf16"):
            for how in hows if layout != "shift4" else hows[:3]:
                for rows in configs.LINEAR_ROWS:
                    tiles = ((128, 4, 1), (128, 4, 0), (128, 8, 1 if bits == 2 else 0), (64, 4, 0))
                    made = tuple(
                        Choice({"BM": rows, "BN": bn, "JOINED": joined}, warps, 3)
                        for bn, warps, joined in (tiles if rows > 16 else tiles[:3])
                    )

                    def work(choice: Choice, rows: int = rows, tile: int = tile, bits: int = bits) -> Work:
                        programs = size // choice["BN"]
                        splits = max(1, min(216 // programs, 8))
                        moved = size * size * bits / 8 + size * rows * 4
                        adds = float(choice["BN"] * tile * choice["BM"])
                        return Work(programs * splits, size / tile / splits, adds, moved, choice.stages)

                    searched = element == "fp16" and how in hows[:2] and layout != "shift4"
                    alike = "scaled" if how in hows[1::2] else "summed"
                    like = f"{layout.replace('shift', 'planar')}/fp16/{rows}/{alike}"
                    yield Space(f"{layout}/{element}/{rows}/{how}", made, work, "" if searched else like)


def integers() -> Iterator[Space]:
    """8-bit products on 4096 x 4096."""
    size = 4096
    for name in ("w8a8", "w8a8_tma"):
        for rows in configs.INT8_ROWS if name == "w8a8" else configs.INT8_ROWS[-1:]:
            tiles = ((128, 128, 8), (256, 128, 8), (128, 64, 4)) if rows >= 64 else ((128, 128, 4), (64, 128, 4))
            swap = {"SWAP": int(rows < 64)} if name == "w8a8" else {}
            made = tuple(Choice({"BM": rows, "BN": bn, "BK": bk, **swap}, warps, 3) for bn, bk, warps in tiles)

            def work(choice: Choice, rows: int = rows) -> Work:
                count = rows if rows < 128 else 2048
                programs = -(-count // choice["BM"]) * size // choice["BN"]
                moved = float(size * size + count * size * 3)
                adds = choice["BM"] * choice["BN"] * choice["BK"] / 2
                return Work(programs, size / choice["BK"], adds, moved, choice.stages)

            yield Space(f"{name}/{rows}", made, work)


def attentions() -> Iterator[Space]:
    """Attention: the first candidate, from large to small tiles, that compiles without spills."""
    for element in ("fp16", "bf16"):
        for width in (16, 32, 64, 128, 256):
            for rows in configs.DECODE_ROWS:
                made = tuple(Choice({"BQ": rows, "BK": keys}, 4, stages) for keys in (64, 32) for stages in (3, 2))
                for masked in (0, 1, 2):
                    yield Space(f"decode_attention/{element}/{rows}/{width}/{masked}", made)
            tiles = ((128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2))
            made = tuple(
                Choice({"BQ": queries, "BK": keys}, warps, stages)
                for queries, keys, warps, stages in (tiles if width > 64 else tiles[1:])
            )
            for numbering in ("plain", "renumbered"):
                yield Space(f"pattern_attention/{element}/{width}/{numbering}", made)


def spaces(prefix: str) -> list[Space]:
    """All of them whose key begins like this."""
    found = [*linears(), *integers(), *attentions()]
    return [space for space in found if space.key.startswith(prefix)]


def report_of(key: str, choice: Choice, chip: Chip) -> StaticReport:
    """The static report of the kernel that a choice makes, on the arguments of tests."""
    operator, arguments = arguments_for(key)
    with configs.forced({key: choice}), recorded(chip) as launches:
        operator.kernels(*arguments)
    return report_on(compiled(main_of(key, launches), chip))


def main_of(key: str, launches: list[Launch]) -> Launch:
    """The launch that the key is about."""
    kernels = {"planar4": "w4a16", "shift4": "w4a16", "planar2": "w2a16"}
    name = key.split("/")[0]
    return next(launch for launch in launches if launch.name == kernels.get(name, name))


def best(space: Space, chip: Chip, target: Target, first: Choice | None) -> Choice | None:
    """The fastest candidate by prediction; `first` at once when it compiles well."""
    found: list[tuple[float, float, Choice]] = []
    for choice in (*([first] if first is not None else []), *space.candidates):
        try:
            report = report_of(space.key, choice, chip)
        except Unsupported as error:
            print(f"  {choice}: {error}")
            continue
        if report.refusal(chip) or not report.tensor_names:
            continue
        made = Choice(choice.constants, choice.warps, choice.stages, report)
        if choice is first or space.work is None:
            return made
        work = space.work(choice)
        seconds = round(estimate(report, chip, target, work).seconds, 9)
        found.append((seconds, report.loop_length * report.warps / work.multiply_adds, made))
    return min(found, key=lambda entry: entry[:2])[2] if found else None


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=list(TYPICAL))
    parser.add_argument("--only", default="", help="keys that begin like this")
    parser.add_argument("--like", default="", help="the Triton version whose choices are taken where they compile well")
    options = parser.parse_args()
    version = ".".join(map(str, library.minor()))
    for arch in options.arch:
        target = get_target(TYPICAL[arch])
        chip = chip_of(target)
        path = configs.TABLES / f"sm_{arch}.json"
        text: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        begin = time.time()
        for space in spaces(options.only):
            if space.key == (f"w8a8_tma/{configs.INT8_ROWS[-1]}" if arch < 90 else f"w8a8/{configs.INT8_ROWS[-1]}"):
                continue  # one of the two is used
            row = text["rows"].get(space.like, {}).get(version)
            if arch in _ALIKE:
                row = configs.table(_ALIKE[arch]).get(space.key, {}).get(version)
            if options.like:
                row = text["rows"].get(space.key, {}).get(options.like)
            first = None if row is None else Choice(row["constants"], row["warps"], row["stages"])
            choice = best(space, chip, target, first)
            text["rows"].setdefault(space.key, {})[version] = None if choice is None else choice.to_json()
            print(f"[{time.time() - begin:5.0f}s] sm_{arch} {space.key}: {choice}", flush=True)
            write(path, arch, text["rows"])


def write(path: Any, arch: int, rows: dict[str, Any]) -> None:
    """A table, one row a line."""
    lines = []
    for key, found in sorted(rows.items()):
        inside = (f'   "{version}": {json.dumps(row, sort_keys=True)}' for version, row in sorted(found.items()))
        lines.append(f'  "{key}": {{\n' + ",\n".join(inside) + "\n  }")
    note = f'"arch": "sm_{arch}", "made": "by benchmarks/triton_configs.py from static reports; nothing was timed"'
    path.write_text(f'{{\n {note},\n "rows": {{\n' + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
