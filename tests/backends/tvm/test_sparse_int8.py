"""Block-sparse 8-bit products against their definition, on every x86 form that this computer runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.tvm.harness import Builder, build, machine

from fxopt.backends.tvm.kernels.fused_int8 import Epilogue  # isort: skip
from fxopt.backends.tvm.kernels.sparse_int8 import (
    BLOCK,
    SPARSE_PARAMETERS,
    SparseForm,
    group_of,
    kept_blocks,
    pack_sparse,
    sparse_int8,
    sparse_starts,
)  # fmt: skip  # isort: skip

from fxopt.backends.tvm.kernels.turn_u8 import PANEL, panel_to_rows, rows_to_panel  # isort: skip
from fxopt.backends.tvm.lower import assembly  # isort: skip
from fxopt.cost_model.targets import get_target
from fxopt.errors import Unsupported
from fxopt.ir.ops.linear_u8s8 import linear_u8s8

__all__ = ["build"]
NEEDS = {
    "x86-avx2": {"avx2", "fma"},
    "x86-avx-vnni": {"avx2", "fma", "avx_vnni"},
    "x86-avx512-vnni": {"avx512bw", "avx512_vnni"},
}
ZERO_IN, ZERO_OUT, EPS = 7, 60, 1e-5
SIZES = [(64, 96), (64, 48), (384, 64), (12, 5), (67, 17), (30, 31), (1, 1)]  # inputs, outputs
ROWS = [1, 3, 16, 17, 31, 32, 33, 48, 63, 64]
SHARES = [0.0, 0.7, 1.0]  # of zero blocks
RESULTS = [(True, False), (False, True), (True, True)]


@pytest.fixture(params=list(NEEDS))
def form_of(request: pytest.FixtureRequest) -> Any:
    missing = NEEDS[request.param] - get_target("host").features
    if missing:
        pytest.skip(f"this computer lacks {sorted(missing)}")
    return machine(request.param)


def weight(outputs: int, inner: int, zeros: float, seed: int = 0) -> Any:
    random = np.random.default_rng((outputs, inner, seed))
    codes = random.integers(-127, 128, (outputs, inner)).astype(np.int8)
    kept = random.random((-(-outputs // BLOCK), inner)) >= zeros
    return codes * np.repeat(kept, BLOCK, 0)[:outputs]


def panel_of(q: Any) -> Any:
    """[rows, inner] as a panel; what lies beyond the rows has no meaning."""
    panel = np.full((q.shape[1], PANEL), 0xAB, np.uint8)
    panel[:, : len(q)] = q.T
    return panel


def operands(form: SparseForm, rows: int, codes: Any, group: int) -> dict[str, Any]:
    random = np.random.default_rng(rows)
    packed = pack_sparse(codes, group)
    shape = (rows, form.outputs)
    q = random.integers(0, 256, (rows, form.inner)).astype(np.uint8)
    return {
        "q": q,
        "rows": np.array([rows], np.int32),
        "panel": panel_of(q),
        "stream": packed.stream,
        "firsts": packed.firsts,
        "starts": sparse_starts(codes, ZERO_IN),
        "scales": (random.uniform(0.5, 1, form.outputs) / 600 / np.sqrt(form.inner)).astype(np.float32),
        "bias": random.standard_normal(form.outputs).astype(np.float32),
        "residual": random.standard_normal(shape).astype(np.float32),
        "gamma": random.uniform(0.5, 1.5, form.outputs).astype(np.float32),
        "beta": random.standard_normal(form.outputs).astype(np.float32),
        "y": np.full(shape, np.nan, np.float32),
        "codes": np.full(shape if form.in_rows else (form.outputs, PANEL), 255, np.uint8),
        "inverse": random.uniform(20, 40, form.outputs).astype(np.float32),
        "zero": np.array([ZERO_OUT], np.float32),
    }


def defined(form: SparseForm, given: dict[str, Any], codes: Any) -> Any:
    held = {name: torch.from_numpy(value) for name, value in given.items()}
    residual = held["residual"] if form.epilogue in ("residual", "layer_norm") else None
    norm = (held["gamma"], held["beta"])
    return linear_u8s8.function(
        held["q"], torch.from_numpy(codes), held["scales"], held["bias"], ZERO_IN, form.epilogue, residual, *norm, EPS
    ).numpy()


# ---- packing


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 21), st.integers(1, 23), st.sampled_from([2, 4]), st.integers(0, 10), st.integers(0, 99))
def test_packing_keeps_every_weight(outputs: int, inner: int, group: int, tenths: int, seed: int) -> None:
    codes = weight(outputs, inner, tenths / 10, seed)
    packed = pack_sparse(codes, group)
    rows = -(-outputs // BLOCK)
    found = np.zeros((rows, BLOCK, inner), np.int64)
    records = packed.stream.reshape(-1, group + BLOCK)
    assert len(packed.firsts) == rows + 1 and packed.firsts[0] == 0 and packed.firsts[-1] == len(records)
    for row in range(rows):
        for record in records[packed.firsts[row] : packed.firsts[row + 1]]:
            places, words = record[:group], np.ascontiguousarray(record[group:])
            assert (places % PANEL == 0).all()
            values = words.view(np.int8 if group == 4 else np.int16).reshape(BLOCK, group)
            for k in range(group):
                found[row, :, places[k] // PANEL] += values[:, k]
    assert np.array_equal(found.reshape(-1, inner)[:outputs], codes)
    blocks = kept_blocks(codes)
    assert packed.density == blocks.mean()
    assert len(records) == (-(-blocks.sum(1) // group)).sum()  # no more groups than the kept blocks need


def test_nothing_is_kept() -> None:
    packed = pack_sparse(np.zeros((9, 7), np.int8), 4)
    assert packed.density == 0 and packed.stream.size == 0 and packed.firsts.tolist() == [0, 0, 0, 0]


def test_refusals() -> None:
    with pytest.raises(Unsupported, match="without results"):
        SparseForm(8, 8, "none", False, False)
    with pytest.raises(Unsupported, match="rows are collected there"):
        SparseForm(8, 8, "layer_norm", False, True)
    with pytest.raises(Unsupported, match="sparse product of 8 -> 0"):
        SparseForm(8, 0)
    with pytest.raises(Unsupported, match="not for wasm"):
        group_of(machine("wasm"))


# ---- kernels


def test_one_product(build: Builder, form_of: Any) -> None:
    check(build, form_of, {"f": SparseForm(20, 9, "none", True, True, EPS)}, [5, 40])


@pytest.mark.slow
@pytest.mark.parametrize("epilogue", get_args(Epilogue))
def test_results(build: Builder, form_of: Any, epilogue: Any) -> None:
    forms = {
        f"f{inner}_{outputs}_{floats}_{codes}": SparseForm(inner, outputs, epilogue, floats, codes, EPS)
        for inner, outputs in SIZES
        for floats, codes in RESULTS
        if floats or epilogue != "layer_norm"
    }
    check(build, form_of, forms, ROWS)


def check(build: Builder, made_for: Any, forms: dict[str, SparseForm], counts: list[int]) -> None:
    run = build([sparse_int8(name, form, made_for) for name, form in forms.items()], made_for)
    for name, form in forms.items():
        for zeros in SHARES:
            codes = weight(form.outputs, form.inner, zeros)
            for rows in counts:
                given = operands(form, rows, codes, group_of(made_for))
                run(name, *(given[key] for key in SPARSE_PARAMETERS))
                y = defined(form, given, codes)
                if form.floats:
                    np.testing.assert_allclose(given["y"], y, rtol=0, atol=6e-6 * max(1, np.abs(y).max()))
                if form.codes:  # the float32 value decides a tie: only values near one may go to the other side
                    found = given["codes"] if form.in_rows else given["codes"][:, :rows].T
                    distance = np.abs(found - np.clip(y * given["inverse"] + ZERO_OUT, 0, 255))
                    assert (distance <= 0.5 + 2e-3).all(), (name, rows, zeros, distance.max())


@pytest.mark.slow
def test_sums_are_exact(build: Builder, form_of: Any) -> None:
    """The extremes of both ranges, where pairs of products do not fit 16 bits, and random sums to the last bit."""
    forms = {"f": SparseForm(1024, 32), "g": SparseForm(130, 37)}
    run = build([sparse_int8(name, form, form_of) for name, form in forms.items()], form_of)
    extreme = np.concatenate([np.full((16, 1024), 127), np.full((16, 1024), -127)]).astype(np.int8)
    for name, codes, rows in (("f", extreme, 64), *(("g", weight(37, 130, share), 29) for share in SHARES)):
        form = forms[name]
        given = operands(form, rows, codes, group_of(form_of))
        if name == "f":
            given["q"][:] = 255
        given |= {"panel": panel_of(given["q"]), "scales": np.ones(form.outputs, np.float32)}
        given["bias"][:] = 0
        run(name, *(given[key] for key in SPARSE_PARAMETERS))
        assert np.array_equal(given["y"], (given["q"].astype(np.int64) - ZERO_IN) @ codes.T.astype(np.int64))


@pytest.mark.slow
def test_bytes_saturate(build: Builder, form_of: Any) -> None:
    """Far beyond both ends, from where integers are packed."""
    form = SparseForm(16, 8, "none", False, True)
    run = build(sparse_int8("f", form, form_of), form_of)
    given = operands(form, 64, weight(8, 16, 0.0), group_of(form_of))
    given["bias"][:] = [-3e38, -1e9, -1e5, -400, 400, 1e5, 1e9, 3e38]
    given["inverse"][:] = 1
    given["zero"][:] = 0
    run("f", *(given[key] for key in SPARSE_PARAMETERS))
    assert given["codes"].tolist() == [[0] * PANEL] * 4 + [[255] * PANEL] * 4


@pytest.mark.slow
def test_turning(build: Builder, form_of: Any) -> None:
    run = build([rows_to_panel("turn", form_of), panel_to_rows("back", form_of)], form_of)
    for size in (1, 5, 15, 16, 17, 40, 100, 768):
        for count in ROWS:
            rows = np.random.default_rng(size).integers(0, 256, (count, size)).astype(np.uint8)
            panel, sizes = np.zeros((size, PANEL), np.uint8), np.array([count, size], np.int32)
            run("turn", sizes, rows, panel)
            assert np.array_equal(panel[:, :count], rows.T)
            assert (panel[:, count:] == rows[-1][:, None]).all()
            back = np.full((count + 1, size), 77, np.uint8)
            run("back", sizes, back, panel)
            assert np.array_equal(back[:count], rows) and (back[count] == 77).all()


@pytest.mark.slow
def test_instructions(tmp_path: Path) -> None:
    for target, wanted in (("x86-avx512-vnni", "vpdpbusd"), ("x86-avx-vnni", "vpdpbusd"), ("x86-avx2", "vpmaddwd")):
        for form in (SparseForm(384, 96, "gelu", False, True), SparseForm(384, 96, "layer_norm", True, True)):
            text = assembly([sparse_int8("f", form, machine(target))], machine(target), tmp_path)
            inner = max(text.split("\n.LBB"), key=lambda block: block.count(wanted))
            lines = inner.split("\tjne")[0].splitlines()
            assert sum(wanted in line for line in lines) >= 8
            assert not [line for line in lines if "(%rsp)" in line and "mm" in line], f"{target}: the tile spills"
