"""Small models that many tests need, and the command line inside this process."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("fxopt", deadline=None)  # machines are shared: a slow example says nothing
hypothesis.settings.load_profile("fxopt")


@dataclass(frozen=True)
class Ran:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Everything, with runs of white space as one space (tables wrap)."""
        return re.sub(r"\s+", " ", self.out + self.err)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process."""
    from fxopt.cli import run

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


def spawn(*arguments: object, cwd: Path | None = None, path: Path | None = None, **environment: str) -> Ran:
    """Run the command line in a process of its own; `path` is put on its Python path."""
    paths = [str(entry) for entry in (path, ROOT) if entry is not None]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    command = [sys.executable, "-m", "fxopt", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=300)
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture(name="spawn")
def spawn_fixture() -> Callable[..., Ran]:
    """`spawn` as a fixture."""
    return spawn


def digest(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mlp(features: int = 16, hidden: int = 32, seed: int = 0) -> onnx.ModelProto:
    """x [batch, features] -> Gemm -> Relu -> Gemm -> y [batch, 8], nodes fc1, act, fc2."""
    random = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1]).astype(np.float32)

    constants = {"w1": weight(hidden, features), "b1": weight(hidden), "w2": weight(8, hidden), "b2": weight(8)}
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="fc1", transB=1),
        helper.make_node("Relu", ["h"], ["a"], name="act"),
        helper.make_node("Gemm", ["a", "w2", "b2"], ["y"], name="fc2", transB=1),
    ]
    body = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A two-layer perceptron as a file, alone in its folder."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(mlp(), path)
    return path


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty folder for results."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder
