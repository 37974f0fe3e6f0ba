"""8-bit products are exact integers; the rounding is that of the definition; the right instructions are used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.backends.tvm.harness import RUNNABLE, Builder, build, guarded, machine, randn

from fxopt.backends.tvm.kernels.dense import pack_bias  # isort: skip
from fxopt.backends.tvm.kernels.dense_int8 import code_range, code_sums, dense_int8, pack_int8, padded, quantize  # isort: skip
from fxopt.backends.tvm.lower import assembly  # isort: skip

__all__ = ["build"]
pytestmark = pytest.mark.slow
SHAPES = [(1, 1, 1), (3, 13, 5), (7, 64, 33), (9, 131, 48)]
INSTRUCTIONS = {
    "x86-avx2": "vpmaddubsw",
    "x86-avx512-vnni": "vpdpbusd",
    "x86-avx-vnni": "vpdpbusd",
    "cortex-a76": "sdot",
    "wasm": "i32x4.dot_i16x8_s",
    "wasm-relaxed": "i32x4.relaxed_dot_i8x16_i7x16_add_s",
}


@pytest.mark.parametrize("target", RUNNABLE)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8(build: Builder, target: str, shape: tuple[int, int, int]) -> None:
    m = machine(target)
    rows, inner, outputs = shape
    r = code_range(m)
    zero = (r.low + r.high) // 2 + 3
    scale = 6.0 / (r.high - r.low)
    run = build([quantize("q", rows, inner, scale, zero, m), dense_int8("d", *shape, m)], m)
    x = randn(rows, inner) * 2  # some saturate
    x[0, 0] = 4.5 * scale  # halves go to even
    codes = np.random.default_rng(1).integers(-127, 128, (outputs, inner)).astype(np.int8)
    codes[0] = 127
    weight_scales, bias = np.random.default_rng(2).random(outputs).astype(np.float32), randn(outputs)
    q = guarded(rows, padded(inner, m), dtype=np.dtype(r.dtype))
    run("q", x, q)
    expected = np.clip(np.rint(x / np.float32(scale)), r.low - zero, r.high - zero).astype(np.int64)
    assert (q[:, :inner].astype(np.int64) - zero == expected).all()
    y = guarded(rows, outputs)
    scales = pack_bias(weight_scales * np.float32(scale), outputs, m.columns)
    run("d", q, pack_int8(codes, m), code_sums(codes, zero, m.columns), scales, pack_bias(bias, outputs, m.columns), y)
    total = expected @ codes.astype(np.int64).T
    exact = total * scales[:outputs].astype(np.float64) + bias
    assert (np.abs(y - exact) <= 3 * np.finfo(np.float32).eps * (np.abs(total * scales[:outputs]) + np.abs(bias))).all()


@pytest.mark.parametrize("target", RUNNABLE)
def test_the_largest_codes_do_not_saturate(build: Builder, target: str) -> None:
    m = machine(target)
    r = code_range(m)
    codes = np.concatenate([np.full((8, 64), 127), np.full((8, 64), -127)]).astype(np.int8)
    q, y = np.full((2, 64), r.high, r.dtype), guarded(2, 16)
    ones, none = pack_bias(np.ones(16, np.float32), 16, m.columns), pack_bias(None, 16, m.columns)
    run = build(dense_int8("d", 2, 64, 16, m), m)
    run("d", q, pack_int8(codes, m), code_sums(codes, 0, m.columns), ones, none, y)
    assert (y == q.astype(np.int64) @ codes.astype(np.int64).T).all()


@pytest.mark.parametrize(("target", "instruction"), INSTRUCTIONS.items())
def test_instructions(tmp_path: Path, target: str, instruction: str) -> None:
    m = machine(target)
    assert instruction in assembly([dense_int8("d", 8, 64, 64, m)], m, tmp_path)


def test_arm_without_dot_product_compiles(tmp_path: Path) -> None:
    m = machine("cortex-a53")
    text = assembly([dense_int8("d", 8, 64, 64, m)], m, tmp_path)
    assert "sdot" not in text and ("mla" in text or "smull" in text or "smlal" in text)
