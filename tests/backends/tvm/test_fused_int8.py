"""Fused 8-bit products against numpy in float64, on every x86 form that this computer runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tests.backends.tvm.harness import Builder, build, machine

from fxopt.backends.tvm.kernels.fused_int8 import PARAMETERS, Epilogue, Form, fused_int8, pack, starts_of, tile_for  # isort: skip
from fxopt.backends.tvm.lower import assembly  # isort: skip
from fxopt.cost_model.targets import get_target
from fxopt.errors import Unsupported

__all__ = ["build"]
pytestmark = pytest.mark.slow
NEEDS = {
    "x86-avx2": {"avx2", "fma"},
    "x86-avx-vnni": {"avx2", "fma", "avx_vnni"},
    "x86-avx512": {"avx512bw"},
    "x86-avx512-vnni": {"avx512bw", "avx512_vnni"},
}
ZERO_IN, ZERO_OUT = 7, 60
SIZES = [(64, 96), (64, 48), (384, 64), (12, 5), (64, 17), (2048, 32)]  # inputs, outputs
ROWS = [0, 1, 5, 7, 8, 9, 29, 131]
RESULTS = [(True, False), (False, True), (True, True)]


@pytest.fixture(params=list(NEEDS))
def form_of(request: pytest.FixtureRequest) -> Any:
    missing = NEEDS[request.param] - get_target("host").features
    if missing:
        pytest.skip(f"this computer lacks {sorted(missing)}")
    return machine(request.param)


def operands(form: Form, rows: int, made_for: Any, seed: int = 0) -> tuple[dict[str, Any], Any]:
    random = np.random.default_rng(seed)
    tile = tile_for(form.outputs, made_for)
    codes = random.integers(-127, 128, (form.outputs, form.inner)).astype(np.int8)
    shape = (rows, form.outputs)
    return {
        "rows": np.array([rows], np.int32),
        "q": random.integers(0, 256, (rows, form.inner)).astype(np.uint8),
        "w": pack(codes, tile),
        "starts": starts_of(codes, ZERO_IN, tile),
        "scales": (random.uniform(0.5, 1, form.outputs) / 5000 / np.sqrt(form.inner) * 8).astype(np.float32),
        "bias": random.standard_normal(form.outputs).astype(np.float32),
        "residual": random.standard_normal(shape).astype(np.float32),
        "gamma": random.uniform(0.5, 1.5, form.outputs).astype(np.float32),
        "beta": random.standard_normal(form.outputs).astype(np.float32),
        "y": np.full(shape, np.nan, np.float32),
        "codes": np.full(shape, 255, np.uint8),
        "inverse": random.uniform(20, 40, form.outputs).astype(np.float32),
        "zero": np.array([ZERO_OUT], np.float32),
    }, codes


def expected(form: Form, given: dict[str, Any], codes: Any) -> tuple[Any, Any]:
    sums = (given["q"].astype(np.int64) - ZERO_IN) @ codes.T.astype(np.int64)
    y = sums * given["scales"].astype(np.float64) + given["bias"]
    if form.epilogue == "relu":
        y = np.maximum(y, 0)
    elif form.epilogue == "gelu":
        y = torch.nn.functional.gelu(torch.from_numpy(y)).numpy()
    elif form.epilogue == "gelu_tanh":
        y = torch.nn.functional.gelu(torch.from_numpy(y), approximate="tanh").numpy()
    elif form.epilogue in ("residual", "layer_norm"):
        y = y + given["residual"]
    if form.epilogue == "layer_norm":
        centred = y - y.mean(1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(1, keepdims=True) + form.eps)
        y = centred / deviation * given["gamma"] + given["beta"]
    return y, y * given["inverse"] + ZERO_OUT


@pytest.mark.parametrize("epilogue", get_args(Epilogue))
def test_results(build: Builder, form_of: Any, epilogue: Any) -> None:
    forms = {
        f"f{inner}_{outputs}_{floats}_{codes}": Form(inner, outputs, epilogue, floats, codes)
        for inner, outputs in SIZES
        for floats, codes in RESULTS
        if floats or epilogue != "layer_norm"
    }
    run = build([fused_int8(name, form, form_of) for name, form in forms.items()], form_of)
    for name, form in forms.items():
        for rows in ROWS:
            given, weight = operands(form, rows, form_of)
            run(name, *(given[key] for key in PARAMETERS))
            y, levels = expected(form, given, weight)
            if form.floats:
                np.testing.assert_allclose(given["y"], y, rtol=0, atol=4e-6 * max(1, np.abs(y).max(initial=0)))
            if form.codes:  # the float32 value decides a tie: only values near one may go to the other side
                distance = np.abs(given["codes"] - np.clip(levels, 0, 255))
                assert (distance <= 0.5 + 2e-3).all(), (name, rows, distance.max())


def test_sums_are_exact(build: Builder, form_of: Any) -> None:
    """The extremes of both ranges, where pairs of products do not fit 16 bits."""
    form = Form(1024, 32)
    tile = tile_for(32, form_of)
    codes = np.concatenate([np.full((16, 1024), 127), np.full((16, 1024), -127)]).astype(np.int8)
    given, _ = operands(form, 9, form_of)
    ones = np.ones(32, np.float32)
    given |= {"q": np.full((9, 1024), 255, np.uint8), "w": pack(codes, tile), "starts": starts_of(codes, 0, tile)}
    given |= {"scales": ones, "bias": 0 * ones}
    run = build(fused_int8("f", form, form_of), form_of)
    run("f", *(given[key] for key in PARAMETERS))
    assert (given["y"] == 255 * 127 * 1024 * np.where(np.arange(32) < 16, 1, -1)).all()


def test_rows_beyond_a_block(build: Builder, form_of: Any) -> None:
    """More rows than a block holds; the last tile reaches back into rows whose norm was already taken."""
    form = Form(2048, 48, "layer_norm", True, True)
    run = build(fused_int8("f", form, form_of), form_of)
    for rows in (95, 97, 193, 289):
        given, weight = operands(form, rows, form_of)
        run("f", *(given[key] for key in PARAMETERS))
        np.testing.assert_allclose(given["y"], expected(form, given, weight)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_short_gelu(build: Builder, form_of: Any, approximate: str) -> None:
    """Within 1.5e-5 of the function, far out too: in steps of 2**-12 it is the level beside it at most."""
    form = Form(4, 1, "gelu_tanh" if approximate == "tanh" else "gelu", False, True)
    run = build(fused_int8("f", form, form_of), form_of)
    given, _ = operands(form, 9, form_of)
    given["inverse"][:] = 4096
    given["scales"][:] = 0
    for x in np.linspace(-60, 6, 500):
        exact = float(torch.nn.functional.gelu(torch.tensor(np.float32(x)).double(), approximate=approximate))
        given["bias"][:], given["zero"][:] = x, 128 - np.rint(exact * 4096)
        run("f", *(given[key] for key in PARAMETERS))
        assert np.abs(given["codes"].astype(int) - 128).max() <= 1, x


def test_instructions(tmp_path: Path) -> None:
    form = Form(384, 96, "gelu", False, True)
    for target, wanted in (("x86-avx512-vnni", "vpdpbusd"), ("x86-avx-vnni", "vpdpbusd"), ("x86-avx2", "vpmaddwd")):
        text = assembly([fused_int8("f", form, machine(target))], machine(target), tmp_path)
        assert wanted in text
        inner = max(text.split("\n.LBB"), key=lambda block: block.count(wanted))
        spilled = [line for line in inner.split("\tjne")[0].splitlines() if "(%rsp)" in line and "mm" in line]
        assert not spilled, f"{target}: the register tile spills"


def test_refusals() -> None:
    with pytest.raises(Unsupported, match="multiple of 4 inputs; given 6 -> 8"):
        Form(6, 8)
    with pytest.raises(Unsupported, match="without results"):
        Form(8, 8, "none", False, False)
    with pytest.raises(Unsupported, match="rows are collected there"):
        Form(8, 8, "layer_norm", False, True)
    with pytest.raises(Unsupported, match="not for wasm"):
        tile_for(8, machine("wasm"))
