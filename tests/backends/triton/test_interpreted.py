"""Every kernel, run by Triton's interpreter, against float64: one process that interprets, its results one test each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'fxopt[triton]'")

from tests.backends.triton.cases import all_cases

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slow


def _numpy_fits() -> bool:
    """Triton 3.6 interprets no kernels with numpy from 2.4 on."""
    import numpy as np
    import triton

    return not (triton.__version__.startswith("3.6.") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4))


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Name -> [error, room, seconds], or the text of an exception."""
    if not _numpy_fits():
        pytest.skip("the interpreter of Triton 3.6 needs numpy before 2.4")
    settings = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.backends.triton.interpret"]
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", [case.name for case in all_cases()])
def test_kernel(results: dict[str, Any], name: str) -> None:
    found = results[name]
    assert isinstance(found, list), found
    error, room, _ = found
    assert error <= room


def test_names_are_different(results: dict[str, Any]) -> None:
    assert len(results) == len(list(all_cases()))
