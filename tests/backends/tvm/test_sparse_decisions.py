"""What the passes make of weights with blocks of zeros is no slower than the same model in floats, which skips them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from tests.backends.tvm import harness

from fxopt.backends.tvm import qemu  # isort: skip

pytestmark = pytest.mark.slow
ROWS, SIZE = 64, 256


def perceptron(zeros: float) -> nn.Module:
    """Two linears whose blocks of 8 outputs are zero to this share; nothing says so but the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE)).eval()
    for layer in (model[0], model[2]):
        kept = torch.rand(SIZE // 8, SIZE) >= zeros
        with torch.no_grad():
            layer.weight.mul_(kept.repeat_interleave(8, 0))
    return model


def optimized(model: nn.Module, target: str, **options: Any) -> Any:
    """With calibration on normal rows."""
    rows = [torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    return fxopt.optimize(
        model, target, example_inputs=(rows[0],), calibration=[(each,) for each in rows[1:]], **options
    )


def instructions(result: Any, folder: Path) -> int:
    """Of one run."""
    (build,) = result._ready.executable.package.builds
    counts = qemu.run_entry(build, build.entries[0], [torch.randn(ROWS, SIZE).numpy()], folder, count=True)[1]
    return sum(counts.values())


@pytest.mark.parametrize("zeros", [0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("target", harness.EMULATED)
def test_arm_executes_no_more_instructions(tmp_path: Path, target: str, zeros: float) -> None:
    if qemu.missing():
        pytest.skip(qemu.missing())
    model = perceptron(zeros)
    ours = optimized(model, target)
    floats = optimized(model, target, passes=[])
    assert instructions(ours, tmp_path / "ours") <= 1.02 * instructions(floats, tmp_path / "floats")
    if target == "cortex-a53":  # without a dot product, codes gain little, and less where zeros are skipped
        reasons = {row.reason for row in ours.ledger.select(pass_name="quantize-linear", outcome="refused")}
        assert any("does not pay" in reason for reason in reasons)


@pytest.mark.parametrize("target", ["wasm-simd", "wasm-relaxed", "cortex-a76"])
def test_codes_are_skipped_like_floats(target: str) -> None:
    steps = optimized(perceptron(0.8), target)._ready.executable.steps
    assert sum("bsr_int8" in step for step in steps) == 2
    dense = optimized(perceptron(0.0), target)._ready.executable.steps
    assert sum("dense_int8" in step for step in dense) == 2


def test_zeros_that_a_pass_made_are_counted() -> None:
    """Sparsify's zeros make floats faster, too: on a processor without dot product linears then stay in floats (heads dense)."""
    sparse = ["sparsify{pattern=8x1,sparsity=0.8}", "quantize-linear"]
    result = optimized(perceptron(0.0), "cortex-a53", passes=sparse, budget=None)
    steps = result._ready.executable.steps
    assert sum("bsr (" in step for step in steps) == 1 and not any("int8" in step for step in steps)


def test_convolutions_between_floats_stay_in_floats() -> None:
    """A depthwise convolution gains less in 8 bits than converting its values takes, where its neighbours do not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(32, 64, 1), nn.ReLU6(), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU6(), nn.Conv2d(64, 32, 1)
    ).eval()  # fmt: skip
    x = torch.randn(1, 32, 28, 28)
    chosen = {}
    for zeros in (0.0, 0.8):
        with torch.no_grad():
            for layer in (model[0], model[4]):
                kept = torch.rand(layer.weight.shape[0] // 4, layer.weight.shape[1]) >= zeros
                layer.weight.mul_(kept.repeat_interleave(4, 0)[..., None, None])
        data = [(torch.randn_like(x),) for _ in range(2)]
        found = fxopt.optimize(model, "wasm-relaxed", example_inputs=(x,), calibration=data, budget=None)
        chosen[zeros] = len(list(found.ledger.select(pass_name="quantize-linear", outcome="applied")))
        refused = [row.reason for row in found.ledger.select(pass_name="quantize-linear", outcome="refused")]
        assert any("converting its values takes longer" in reason for reason in refused) == (zeros > 0)
    assert chosen == {0.0: 3, 0.8: 0}
