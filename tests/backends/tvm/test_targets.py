"""`optimize` for targets that code is compiled for: names, options, refusals, verification."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.backends.tvm import Tvm
from fxopt.catalog import find_target
from fxopt.cost_model.targets import get_target
from fxopt.errors import InvalidOption, MissingDependency, UnknownName, Unsupported, VerificationError
from tests.backends.tvm import harness

__all__ = ["harness"]
CNN = Path(__file__).resolve().parents[3] / "examples" / "models" / "digits-cnn.onnx"
F = nn.functional
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GRID = torch.rand(2, 8, 8, 2, generator=torch.Generator().manual_seed(1))


class Small(nn.Module):
    """Two operators that nothing improves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.abs(x) + 1.5


class Lacking(nn.Module):
    """Operators without kernels among others."""

    def forward(self, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        y = F.grid_sample(torch.relu(x), grid, align_corners=False)
        return torch.relu(torch.cummax(y, 1).values - 0.5)


# ---- names and options


@pytest.mark.parametrize(("name", "known"), [("wasm", "wasm-simd"), ("wasm_relaxed_simd", "wasm-relaxed")])
def test_other_names(name: str, known: str) -> None:
    assert get_target(name) is find_target(name) is get_target(known)
    assert get_target(known).name == known


def test_an_unknown_name_suggests_near_ones() -> None:
    with pytest.raises(UnknownName, match="unknown target 'wasm-smid'; did you mean 'wasm-simd'"):
        fxopt.optimize(CNN, "wasm-smid")


def test_without_the_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tvm, "needs", ("no_such_compiler",))
    with pytest.raises(MissingDependency, match=r"needs no_such_compiler; install it: pip install 'fxopt\[tvm\]'"):
        fxopt.optimize(CNN, "wasm-simd")


def test_options_of_compilers_are_no_options_of_others() -> None:
    with pytest.raises(InvalidOption, match="buckets is for backends that compile code, such as tvm; onnxruntime"):
        fxopt.optimize(CNN, "host", buckets={"batch": [1]})
    with pytest.raises(InvalidOption, match="weights is for backends that compile code"):
        fxopt.optimize(CNN, "host", weights="external")


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({}, Unsupported, "input 'image' has the dynamic dimension 'batch'.*--buckets batch=1"),
        ({"buckets": {"bath": 1}}, UnknownName, "unknown dimension 'bath'; did you mean 'batch'"),
        ({"buckets": {"batch": []}}, InvalidOption, "one or more sizes of at least 1"),
        ({"buckets": {"batch": 1}, "weights": "outside"}, UnknownName, "unknown place of weights 'outside'"),
        (
            {"buckets": {"batch": 1}, "backend": "tvm{features=dotprod}"}, Unsupported,
            r"cortex-a53 has no dotprod \(it has neon\): code for it would crash there",
        ),
        (
            {"buckets": {"batch": 1}, "backend": "tvm{features=dotprot}"}, UnknownName,
            "unknown instruction set 'dotprot'; did you mean 'dotprod'",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_work(options: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        fxopt.optimize(CNN, "cortex-a53", **options)


@pytest.mark.slow
def test_an_instruction_set_that_a_processor_lacks_is_refused_when_compiling() -> None:
    target = get_target("cortex-a53")
    wrong = dataclasses.replace(target, features=target.features | {"dotprod"})
    with pytest.raises(Unsupported, match="cortex-a53 has no dotprod"):
        fxopt.optimize(Small(), wrong, example_inputs=(X,))


# ---- the command line


@pytest.mark.slow
def test_the_command_line(cli: Callable[..., Any], tmp_path: Path) -> None:
    """Also into an empty folder, and over an earlier result."""
    (tmp_path / "out").mkdir()
    given = ("optimize", CNN, "--target", "wasm-simd", "--output", tmp_path / "out", "--weights", "external")
    ran = cli(*given, "--buckets", "batch=1,2")
    assert ran.code == 0, ran.text
    assert "gave torch's results on 2 samples" in ran.text and f"written: {tmp_path / 'out'}" in ran.text
    assert cli(*given, "--input-shape", "image:4,1,8,8").code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [entry["sizes"] for entry in manifest["functions"]["digits_cnn"]["entries"]] == [{"batch": 4}]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    ran = cli(*given)
    assert ran.code == 2 and "--buckets batch=1" in ran.text


# ---- what has no kernel


@pytest.mark.slow
def test_all_operators_without_kernels_are_named_at_once() -> None:
    with pytest.raises(
        Unsupported, match="2 operators have no kernel for wasm-simd: .*grid_sampler.* has no kernel; .*cummax"
    ):
        fxopt.optimize(Lacking(), "wasm-simd", example_inputs=(X, GRID))


@pytest.mark.slow
def test_on_this_machine_they_run_in_torch(tmp_path: Path) -> None:
    harness.machine("host")
    found = fxopt.optimize(Lacking(), "host", example_inputs=(X, GRID), backend="tvm", force=True)
    assert "in torch: region" in found.report.executed_on and "grid_sampler" in found.report.executed_on
    assert torch.allclose(found(X, GRID), Lacking()(X, GRID), atol=1e-6)
    with pytest.raises(Unsupported, match="cannot be saved for tvm"):
        found.save(tmp_path / "none")
    assert not list(tmp_path.iterdir())


# ---- verification


@pytest.mark.slow
def test_a_kernel_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.backends.tvm.rules import RULES

    monkeypatch.setitem(RULES, "abs", RULES["relu"])
    with pytest.raises(
        VerificationError, match=r"small in wasmtime: output \S+ differs from torch by .* nothing was written"
    ):
        fxopt.optimize(Small(), "wasm-simd", example_inputs=(X,))


@pytest.mark.slow
def test_what_was_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.backends.tvm import qemu, verify

    found = fxopt.optimize(Small(), "cortex-a76", example_inputs=(X,))
    where = qemu.missing()
    said = "libsmall.so was not run" if where else "libsmall.so in qemu-aarch64 gave torch's results on 1 sample"
    assert any(said in note for note in found.ledger.notes)
    assert found.report.outcome == "compiled" and found.report.why == "no pass found anything to do"
    monkeypatch.setattr(verify, "missing", lambda: "qemu-aarch64 is not on the path")
    found = fxopt.optimize(Small(), "cortex-a76", example_inputs=(X,))
    assert "libsmall.so was not run: qemu-aarch64 is not on the path" in found.ledger.notes


@pytest.mark.slow
def test_on_this_machine_the_guard_decides(tmp_path: Path) -> None:
    """Against ONNX Runtime for a file; the loser is not written, unless forced."""
    harness.machine("host")
    found = fxopt.optimize(CNN, "host", backend="tvm", buckets={"batch": 1}, guard_seconds=2.0)
    measured = found.report.measured
    assert measured is not None and measured.baseline.startswith("onnxruntime")
    if found.report.outcome == "nothing paid":
        assert any("--force gives the compiled code" in note for note in found.ledger.notes)
    else:
        assert measured.low >= 1.0 and found.report.executed_on.startswith("tvm")


# ---- zeros


@pytest.mark.slow
def test_blocks_of_zeros_are_skipped() -> None:
    """Blocks of 8 outputs x 1 input in a linear, of 4 in a convolution over pixels: chosen by how many are zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64)).eval()
    x = torch.randn(1, 16, 4, 4)
    kernels = {}
    for kept in (1.0, 0.3):
        with torch.no_grad():
            for weight, width in ((model[0].weight, 4), (model[3].weight, 8)):
                mask = torch.rand(weight.shape[0] // width, weight.shape[1]) < kept
                weight.mul_(mask.repeat_interleave(width, 0).view(weight.shape[:2] + (1,) * (weight.dim() - 2)))
        found = fxopt.optimize(model, "wasm-simd", example_inputs=(x,), passes=[])
        build: Any = found._ready.executable
        kernels[kept] = (build.steps, len(build.package.builds[0].weights.read_bytes()))
        with torch.no_grad():
            assert (found(x) - model(x)).abs().max() < 1e-5
    assert not any("bsr" in step for step in kernels[1.0][0])
    assert any("bsr" in step for step in kernels[0.3][0])
    assert kernels[0.3][1] < 0.6 * kernels[1.0][1]
