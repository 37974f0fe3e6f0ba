"""Dense and sparse products against float64, over odd shapes, on this machine and in wasmtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.errors import InvalidInput
from tests.backends.tvm.harness import ALL, RUNNABLE, Builder, build, guarded, machine, randn

from fxopt.backends.tvm.kernels.bsr import bsr, pack_bsr, unpack_bsr  # isort: skip
from fxopt.backends.tvm.kernels.dense import dense, pack_bias, pack_dense  # isort: skip
from fxopt.backends.tvm.kernels.nm import nm, pack_nm  # isort: skip
from fxopt.backends.tvm.kernels.panels import pack_powers, pack_two_of_four, panel_dense, scratch_size  # isort: skip
from fxopt.backends.tvm.lower import assembly  # isort: skip

__all__ = ["build"]
EPS = np.finfo(np.float32).eps  # twice the unit roundoff
SHAPES = [(1, 1, 1), (7, 13, 5), (13, 33, 17), (64, 64, 64), (5, 1300, 70)]  # rows, inputs, outputs


def close(y: Any, x: Any, w: Any, b: Any) -> None:
    """The error bound of a float32 dot product in any order: inputs * eps * sum |x w| (Higham, 2002, section 3.1)."""
    exact = x.astype(np.float64) @ w.astype(np.float64).T + b
    bound = (x.shape[1] + 2) * EPS * (np.abs(x).astype(np.float64) @ np.abs(w).T + np.abs(b)) / 2 + 1e-30
    assert (np.abs(y - exact) <= bound).all(), np.abs(y - exact).max()


@pytest.mark.parametrize("target", RUNNABLE)
def test_dense(build: Builder, target: str) -> None:
    m = machine(target)
    functions = [dense(f"d{i}", *shape, m) for i, shape in enumerate(SHAPES)]
    run = build(functions, m)
    for i, (rows, inner, outputs) in enumerate(SHAPES):
        x, w, b, y = randn(rows, inner), randn(outputs, inner, seed=1), randn(outputs), guarded(rows, outputs)
        run(f"d{i}", x, pack_dense(w, m.columns), pack_bias(b, outputs, m.columns), y)
        close(y, x, w, b)


def blocks(outputs: int, inner: int, width: int, density: float) -> np.ndarray[Any, Any]:
    """A weight whose blocks of `width` outputs x 1 input are zero or not as a whole."""
    keep = np.random.default_rng(3).random((-(-outputs // width), inner)) < density
    return randn(outputs, inner, seed=2) * np.repeat(keep, width, 0)[:outputs]


@pytest.mark.parametrize("target", RUNNABLE)
@pytest.mark.parametrize("width", [4, 8, 16])
def test_bsr(build: Builder, target: str, width: int) -> None:
    m = machine(target)
    weights = [blocks(outputs, inner, width, 0.3) for _, inner, outputs in SHAPES]
    packed = [pack_bsr(w, width) for w in weights]
    functions = [
        bsr(f"s{i}", *shape, len(p.values), width, m) for i, (shape, p) in enumerate(zip(SHAPES, packed, strict=True))
    ]
    run = build(functions, m)
    for i, ((rows, inner, outputs), w, p) in enumerate(zip(SHAPES, weights, packed, strict=True)):
        x, b, y = randn(rows, inner), randn(outputs), guarded(rows, outputs)
        values = p.values if len(p.values) else np.zeros((1, width), np.float32)
        run(f"s{i}", x, values, p.inputs if len(p.inputs) else np.zeros(1, np.int32), p.starts,
            pack_bias(b, outputs, width), y)  # fmt: skip
        close(y, x, w, b)


def shared(outputs: int, inner: int, n: int, m: int, width: int) -> np.ndarray[Any, Any]:
    """A weight that keeps n of every m inputs, the same for `width` neighbouring outputs."""
    order = np.random.default_rng(4).random((-(-outputs // width), inner // m, m)).argsort(-1)
    keep = np.repeat((order < n).reshape(-1, inner), width, 0)[:outputs]
    return randn(outputs, inner, seed=2) * keep


@pytest.mark.parametrize("target", RUNNABLE)
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_nm(build: Builder, target: str, width: int, n: int, m: int) -> None:
    made_for = machine(target)
    shapes = [(7, 16, 5), (13, 40, 17), (64, 64, 64)]
    run = build([nm(f"n{i}", *shape, n, m, width, made_for) for i, shape in enumerate(shapes)], made_for)
    for i, (rows, inner, outputs) in enumerate(shapes):
        w = shared(outputs, inner, n, m, width)
        p = pack_nm(w, n, m, width)
        x, b, y = randn(rows, inner), randn(outputs), guarded(rows, outputs)
        run(f"n{i}", x, p.values, p.inputs, pack_bias(b, outputs, width), y)
        close(y, x, w, b)


def stored(kind: str, outputs: int, inner: int) -> np.ndarray[Any, Any]:
    """A weight that a form of fewer bytes holds."""
    w = randn(outputs, inner, seed=5)
    if kind == "powers":
        return np.where(np.abs(w) < 0.1, 0, np.sign(w) * np.exp2(np.rint(np.log2(np.abs(w))))).astype(np.float32)
    groups = w.reshape(outputs, -1, 4)
    order = np.abs(groups).argsort(-1).argsort(-1)
    return (groups * (order >= 2)).reshape(outputs, inner)


@pytest.mark.parametrize("target", RUNNABLE)
@pytest.mark.parametrize("kind", ["powers", "two of four"])
def test_panels(build: Builder, target: str, kind: str) -> None:
    m = machine(target)
    shapes = [(7, 16, 5), (13, 40, 17), (70, 64, 64)]
    weights = [stored(kind, outputs, inner) for _, inner, outputs in shapes]
    pack = pack_powers if kind == "powers" else pack_two_of_four
    packed = [found for w in weights if (found := pack(w, m.columns)) is not None]
    assert len(packed) == len(shapes)
    run = build(
        [panel_dense(f"p{i}", *s, form, m) for i, (s, (form, _)) in enumerate(zip(shapes, packed, strict=True))], m
    )
    for i, ((rows, inner, outputs), w, (form, arrays)) in enumerate(zip(shapes, weights, packed, strict=True)):
        x, b, y = randn(rows, inner), randn(outputs), guarded(rows, outputs)
        scratch = guarded(scratch_size(form, inner, m))
        run(f"p{i}", x, *arrays, pack_bias(b, outputs, m.columns), scratch, y)
        close(y, x, w, b)


@given(st.integers(-120, 120), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_powers_of_two_are_found(exponent: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    w = (random.choice([-1.0, 0.0, 1.0], (5, 6)) * np.exp2(random.integers(exponent, exponent + 5, (5, 6)))).astype(
        np.float32
    )
    found = pack_powers(w, 4)
    assert (found is None) == bool((w == 0).all())
    if found is not None:
        codes = found[1][0].transpose(0, 2, 1).reshape(-1, 6)[:5].astype(np.int64)
        size = np.where(codes & 0x7F, np.exp2((codes & 0x7F) - 127.0 + found[0].exponent), 0)
        assert (np.where(codes & 0x80, -size, size) == w).all()
    w[0, 0] = 3.0
    assert pack_powers(w, 4) is None and pack_two_of_four(randn(4, 8), 4) is None


@pytest.mark.parametrize("target", ALL)
def test_code_is_generated_with_the_instructions_of_the_machine(tmp_path: Path, target: str) -> None:
    m = machine(target)
    text = assembly([dense("d", 12, 64, 64, m)], m, tmp_path)
    fused = {"x86": "vfmadd", "arm": "fmla", "wasm": "relaxed_madd" if "+relaxed-simd" in m.features else "f32x4.mul"}
    assert fused[m.family] in text
    assert "TVMBackend" not in text


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 4, 8]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_bsr_packs_without_loss(outputs: int, inner: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    w = (random.standard_normal((outputs, inner)) * (random.random((outputs, inner)) < 0.3)).astype(np.float32)
    packed = pack_bsr(w, width)
    assert (unpack_bsr(packed) == w).all()
    assert 0 <= packed.density <= 1


def test_patterns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidInput, match="10 inputs are no multiple of m = 4"):
        pack_nm(randn(8, 10), 2, 4, 4)
    with pytest.raises(InvalidInput, match="a group of 4 inputs has 4 that 8 neighbouring outputs use; expected 2"):
        pack_nm(randn(8, 16), 2, 4, 8)
