"""What the documents say can be done, is done."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example models, and room for results."""
    shutil.copytree(ROOT / "examples" / "models", tmp_path / "examples" / "models")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_block_is_the_two_commands() -> None:
    commands = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.MULTILINE) and re.search(r"^test:", makefile, re.MULTILINE)


@pytest.mark.slow
def test_the_commands_run(checkout: Path, cli: Callable[..., Any]) -> None:
    lines = [line for block in blocks("sh")[1:] for line in block.splitlines() if line.startswith("fxopt ")]
    assert len(lines) >= 5
    for line in lines:
        if ("--target wasm" in line or "--target cortex" in line) and find_spec("tvm") is None:
            continue  # it needs the extra tvm
        ran = cli(*shlex.split(line)[1:])
        assert ran.code == 0, f"{line}\n{ran.err}"
    assert (checkout / "out" / "digits-vit.onnx").is_file() and (checkout / "out" / "digits-vit.html").is_file()


@pytest.mark.slow
def test_the_python_runs(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "operators" in capsys.readouterr().out
    assert (checkout / "out.onnx").is_file()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_files_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`((?:[\w-]+/)+(?:[\w.-]+)?|[\w-]+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "fxopt" / name).exists(), name


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "fxopt").rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_docstring_examples(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if name.startswith("fxopt.backends.tvm"):
        pytest.importorskip("tvm", reason="needs the extra tvm")
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted and not result.failed
