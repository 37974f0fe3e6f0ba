"""Who imports whom, and what `import fxopt` costs."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fxopt"
ALLOWED = {
    "ir": set(),
    "frontends": {"ir"},
    "passes": {"ir"},
    "cost_model": {"ir"},
    "report": {"ir"},
    "planner": {"ir", "passes", "cost_model"},
    "backends": {"ir", "cost_model"},
}
ONLY_IN = {"tvm": "backends/tvm", "tvm_ffi": "backends/tvm", "triton": "backends/triton"}
NOT_AT_IMPORT = ("triton", "tvm", "onnxruntime", "transformers", "onnxscript", "networkx", "rich", "typer")
MOST_SECONDS = 0.3


def imported(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (above, node.module or "") if part)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_flow_one_way(folder: str) -> None:
    allowed = ALLOWED[folder] | {folder, "errors"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (PACKAGE / folder).rglob("*.py")
        for name in imported(path)
        if name.startswith("fxopt.") and name.split(".")[1] not in allowed
    ]
    assert not wrong


def test_foreign_compilers_have_one_door() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        for name in imported(path)
        if (place := ONLY_IN.get(name.split(".")[0])) and not path.is_relative_to(PACKAGE / place)
    ]
    assert not wrong


def _fresh(code: str) -> Any:
    command = [sys.executable, "-c", f"import json, sys, time\n{code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(done.stdout)


def test_import_is_light() -> None:
    code = "import torch; before = set(sys.modules); import fxopt; print(json.dumps(sorted(set(sys.modules) - before)))"
    added = {name.split(".")[0] for name in _fresh(code)}
    assert not added & set(NOT_AT_IMPORT)


def test_import_is_fast() -> None:
    """At most 0.3 s once torch is imported (the difference of two imports would be the disk's noise)."""
    code = "import torch; start = time.perf_counter(); import fxopt; print(json.dumps(time.perf_counter() - start))"
    seconds = [_fresh(code) for _ in range(5)]
    assert statistics.median(seconds) <= MOST_SECONDS


def test_help_does_not_import_torch() -> None:
    code = (
        "import contextlib, io\nfrom fxopt.cli import run\n"
        "with contextlib.redirect_stdout(io.StringIO()): run(['optimize', '--help'])\n"
        "print(json.dumps([name for name in ('torch', 'onnx', 'numpy') if name in sys.modules]))"
    )
    assert not _fresh(code)
