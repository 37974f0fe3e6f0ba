"""Compiled kernels travel: to another cache, and with a clear reason not to another chip or Triton version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fxopt.backends.triton import library
from fxopt.backends.triton.bundle import Bundle
from fxopt.errors import InvalidModel

ROOT = Path(__file__).resolve().parents[3]
LAYOUTS = ("planar2/1", "planar4/1", "shift4/1")
KEY = "ab12"


def made(**changes: Any) -> Bundle:
    fields = {"arch": "sm_80", "triton": "3.7.1", "build": "b", "layouts": LAYOUTS,
              "kernels": {KEY: {"w4a16.cubin": b"\x7fELF", "w4a16.json": b"{}"}}, **changes}  # fmt: skip
    return Bundle(**fields)


@pytest.fixture
def some_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are compared without Triton."""
    monkeypatch.setattr(library, "version", lambda: "3.7.1")
    monkeypatch.setattr(library, "build_key", lambda: "b")


def test_round_trip(tmp_path: Path) -> None:
    made().save(tmp_path / "kernels")
    assert Bundle.load(tmp_path / "kernels") == made()
    for text in (tmp_path / "kernels").rglob("*.json"):
        assert str(tmp_path) not in text.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"arch": "sm_90"}, "the saved kernels were compiled for sm_90, Triton 3.7.1; here is sm_80, Triton 3.7.1"),
        ({"triton": "3.6.0"}, "the saved kernels were compiled for sm_80, Triton 3.6.0; here is sm_80, Triton 3.7.1"),
        ({"build": "c"}, "the saved kernels were compiled by another build of Triton 3.7.1"),
        ({"layouts": ("planar4/2",)}, "the saved kernels take packed weights of planar4/2, this version has planar2/1"),
    ],
)
@pytest.mark.usefixtures("some_triton")
def test_what_does_not_fit_says_so(changes: dict[str, Any], reason: str) -> None:
    found = made(**changes).misfit("sm_80")
    assert found.startswith(reason) if reason else not found


def test_broken_folders(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="holds no kernels that can be read: FileNotFoundError"):
        Bundle.load(tmp_path)
    made().save(tmp_path)
    (tmp_path / KEY / "w4a16.cubin").unlink()
    with pytest.raises(InvalidModel, match="holds no kernels that can be read"):
        Bundle.load(tmp_path)
    manifest = tmp_path / "manifest.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "format": 9}))
    with pytest.raises(InvalidModel, match="has format 9; this version reads format 1"):
        Bundle.load(tmp_path)
    manifest.write_text(json.dumps({**found, "kernels": {"../x": ["y"]}}))
    with pytest.raises(InvalidModel, match="no plain file name"):
        Bundle.load(tmp_path)
    manifest.write_text("{")
    with pytest.raises(InvalidModel, match="cannot|can be read: JSONDecodeError"):
        Bundle.load(tmp_path)


_PROGRAM = """
import sys
from pathlib import Path
from fxopt.backends.triton import library
from fxopt.backends.triton.bundle import Bundle, bundled
from fxopt.backends.triton.chips import chip_of_arch
from fxopt.backends.triton.launch import recorded
from fxopt.backends.triton.offline import compiled
from fxopt.backends.triton.testing import arguments_for

chip, folder = chip_of_arch(90, 132, 1.8e9), Path(sys.argv[2])
hits = []
library.module("knobs").compilation.listener = lambda **named: hits.append(named["cache_hit"])
if sys.argv[1] == "install":
    found = Bundle.load(folder)
    assert found.misfit("sm_90") == "", found.misfit("sm_90")
    print(found.install(), found.install())
kernels = []
for key in ("planar4/fp16/16/summed", "w8a8_tma/128"):
    operator, arguments = arguments_for(key)
    with recorded(chip) as launches:
        operator.kernels(*arguments)
    kernels += [compiled(launch, chip) for launch in launches]
if sys.argv[1] == "make":
    bundled(kernels, chip.sm).save(folder)
print(sum(hits), len(hits))
"""


@pytest.mark.slow
def test_another_cache_finds_the_kernels(tmp_path: Path) -> None:
    """Compiled in one process and cache, found in another one, though the first cache is gone."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'fxopt[triton]'")

    def run(what: str, cache: Path) -> list[list[int]]:
        path = os.pathsep.join([str(ROOT), *sys.path])
        settings = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": path}
        settings.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-c", _PROGRAM, what, str(tmp_path / "kernels")]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]

    assert run("make", tmp_path / "one") == [[0, 4]]
    (tmp_path / "one").rename(tmp_path / "gone")
    assert run("install", tmp_path / "two") == [[4, 0], [4, 4]]
