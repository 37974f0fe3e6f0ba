"""Arm under qemu: whole models against torch on the same weights; executed instructions stay where they were."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxopt.cost_model.targets import get_target
from fxopt.frontends.torch_export import load
from tests.backends.tvm import harness, test_models

from benchmarks.arm_instructions import SHAPES, TARGET, counted, model_counts  # isort: skip
from benchmarks.common import RESULTS  # isort: skip
from benchmarks.wasm_models import Encoder, prune  # isort: skip
from fxopt.backends.tvm import Tvm, qemu  # isort: skip
from fxopt.backends.tvm.machine import machine_for  # isort: skip

__all__ = ["harness"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(qemu.missing()), reason=qemu.missing() or "qemu is here")]
LIMITS = {
    "bsr8x1_30": 0.35,
    "bsr8x1_20": 0.25,
    "bsr8x1_10": 0.13,
    "nm24_shared8": 0.52,
    "nm24_shared4": 0.65,
    "int8": 0.22,
    "int8_bsr8x1_30": 0.13,
    "int8_bsr8x1_20": 0.095,
    "int8_bsr8x1_10": 0.06,
}


def emulated(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], target: str, folder: Path) -> list[torch.Tensor]:
    """The outputs of a model, compiled for Arm."""
    executable: Any = Tvm().compile(load(model, inputs), get_target(target))
    (build,) = executable.package.builds
    found, _ = qemu.run_entry(build, build.entries[0], [x.numpy() for x in inputs], folder)
    return [torch.from_numpy(array) for array in found]


@pytest.mark.parametrize("target", ["cortex-a53", "cortex-a76"])
@pytest.mark.parametrize("name", test_models.MODELS)
def test_models_on_arm(name: str, target: str, tmp_path: Path) -> None:
    found = emulated(test_models.made(name), test_models.inputs(name), target, tmp_path)
    test_models.no_worse(found, name)


@pytest.mark.parametrize("width", [4, 8])
def test_sparse_models_on_arm(width: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Encoder(32, 64, 2, 1).eval(), torch.randn(1, 9, 32)
    prune(model, width, 0.2)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    (found,) = emulated(model, (x,), TARGET, tmp_path)
    assert float((found - exact).abs().max()) <= 1e-4 * float(exact.abs().max())


def test_instructions_of_kernels(tmp_path: Path) -> None:
    """They are the same at every run and with every machine: a change is a change of the code."""
    stored = json.loads((RESULTS / "arm_instructions.json").read_text())
    row = counted(SHAPES[0], machine_for(get_target(TARGET)), tmp_path)
    for name, limit in LIMITS.items():
        assert row["over_dense"][name] <= limit, name
    expected: dict[str, Any] = stored["kernels"][0]["instructions"]
    assert row["instructions"].keys() == expected.keys()
    for name, count in row["instructions"].items():
        assert count <= 1.02 * expected[name], name


def test_instructions_of_a_model(tmp_path: Path) -> None:
    stored = json.loads((RESULTS / "arm_instructions.json").read_text())["models"]["encoder"]
    found = model_counts("encoder", tmp_path)
    assert found["sparse"] <= 0.4 * found["dense"]
    assert np.allclose([found["dense"], found["sparse"]], [stored["dense"], stored["sparse"]], rtol=0.02)
