"""8-bit products are exact integers; the rounding is that of the definition; the right instructions are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fxopt.ir.ops.linear_w8a8 import dynamic_range
from fxopt.passes.quantize_linear.grids import quantize_weight
from tests.backends.tvm.harness import EMULATED, RUNNABLE, Builder, build, guarded, machine, randn

from fxopt.backends.tvm.codes import Levels  # isort: skip
from fxopt.backends.tvm.kernels.dense import pack_bias  # isort: skip
from fxopt.backends.tvm.kernels.dense_int8 import Product, dense_int8, work_space  # isort: skip
from fxopt.backends.tvm.kernels.dot import column_sums, dot_for, in_groups, pack_codes, preferred  # isort: skip
from fxopt.backends.tvm.kernels.quantize import dequantize, find_range, quantize, quantize_to_range  # isort: skip
from fxopt.backends.tvm.lower import assembly  # isort: skip
from fxopt.backends.tvm.values import tvm_type  # isort: skip

__all__ = ["build"]
pytestmark = pytest.mark.slow
EPS = np.finfo(np.float32).eps
TARGETS = (*RUNNABLE, "x86-avx2", *EMULATED)
SHAPES = [(1, 1, 1), (3, 13, 5), (7, 64, 33), (9, 131, 48)]  # rows, inputs, outputs
INSTRUCTIONS = {
    "x86-avx2": "vpmaddubsw",
    "x86-avx512-vnni": "vpdpbusd",
    "x86-avx-vnni": "vpdpbusd",
    "cortex-a53": "smlal",
    "cortex-a76": "sdot",
    "wasm": "i32x4.dot_i16x8_s",
    "wasm-relaxed": "i32x4.relaxed_dot_i8x16_i7x16_add_s",
}


def weight_codes(outputs: int, inner: int, kind: str) -> np.ndarray[Any, Any]:
    """Codes of all eight bits, or as the quantiser makes them for the machine's fastest instruction."""
    if kind == "any":
        codes = np.random.default_rng(1).integers(-127, 128, (outputs, inner)).astype(np.int8)
        codes[0] = 127
        return codes
    sums = {"pairs": 16, "seven bits": 7}[kind]
    weight = torch.from_numpy(randn(outputs, inner))
    weight[0] = 3.0
    return quantize_weight(weight, sums)[0].numpy()


def stored(q: np.ndarray[Any, Any], levels: Levels) -> np.ndarray[Any, Any]:
    """Codes 0 ... 255 as a kernel takes them."""
    return (q - levels.shift).astype(tvm_type(levels.stored.dtype))


@pytest.mark.parametrize("kind", ["any", "pairs", "seven bits"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(build: Builder, target: str, shape: tuple[int, int, int], kind: str) -> None:
    m = machine(target)
    rows, inner, outputs = shape
    codes = weight_codes(outputs, inner, kind)
    dot = dot_for(m, codes)
    levels = Levels(0.04, 131, dot.x)
    size = Product(rows, inner, outputs)
    kind, count = work_space(size, dot, m)
    run = build([quantize("q", rows * inner, levels, m), dense_int8("d", size, dot, m)], m)
    x = randn(rows, inner) * 3  # some saturate
    x[0, 0] = 4.5 * levels.scale  # halves go to even
    q = guarded(rows, inner, dtype=tvm_type(dot.x.dtype))
    run("q", x, q)
    expected = np.clip(np.rint(x / np.float32(levels.scale)) + levels.zero, 0, 255).astype(np.int64)
    assert (q.astype(np.int64) + levels.shift == expected).all()
    padded = np.zeros((rows, in_groups(inner, dot)), q.dtype)
    padded[:, :inner] = q
    scales, bias = np.random.default_rng(2).random(outputs).astype(np.float32), randn(outputs)
    starts = ((levels.shift - levels.zero) * column_sums(codes, m.columns)).astype(np.int32)
    given = [padded, pack_codes(codes, m.columns, dot), starts]
    given += [pack_bias(array, outputs, m.columns) for array in (scales, bias)]
    given += [guarded(count, dtype=kind)] if count else []
    y = guarded(rows, outputs)
    run("d", *given, y)
    total = (expected - levels.zero) @ codes.astype(np.int64).T
    exact = total * scales.astype(np.float64) + bias
    assert (np.abs(y - exact) <= 3 * EPS * (np.abs(total * scales) + np.abs(bias))).all()


@pytest.mark.parametrize("target", TARGETS)
def test_the_largest_codes_do_not_saturate(build: Builder, target: str) -> None:
    m = machine(target)
    for highest in (127, 64, 63):
        codes = np.concatenate([np.full((8, 64), highest), np.full((8, 64), -highest)]).astype(np.int8)
        dot = dot_for(m, codes)
        size = Product(2, 64, 16)
        kind, count = work_space(size, dot, m)
        ones, none = pack_bias(np.ones(16, np.float32), 16, m.columns), pack_bias(None, 16, m.columns)
        run = build(dense_int8("d", size, dot, m), m)
        for code in (0, 255):
            levels = Levels(1.0, 0, dot.x)
            q, y = stored(np.full((2, 64), code), levels), guarded(2, 16)
            starts = (levels.shift * column_sums(codes, m.columns)).astype(np.int32)
            space = [guarded(count, dtype=kind)] if count else []
            run("d", q, pack_codes(codes, m.columns, dot), starts, ones, none, *space, y)
            assert (y == code * 64 * codes[:, 0].astype(np.int64)).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("zero", [0, 100, 255])
def test_codes_stand_for_their_values(build: Builder, target: str, zero: int) -> None:
    m = machine(target)
    levels = Levels(0.3, zero, preferred(m).x)
    run = build(dequantize("d", 256, levels, m), m)
    codes, y = np.arange(256), guarded(256)
    run("d", stored(codes, levels), y)
    assert np.allclose(y, (codes - zero) * 0.3, rtol=EPS, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", ["both signs", "positive", "negative", "zeros"])
def test_ranges_found_at_run_time(build: Builder, target: str, case: str) -> None:
    m = machine(target)
    form = preferred(m).x
    x = randn(131)
    x = {"both signs": x, "positive": np.abs(x) + 1, "negative": -np.abs(x) - 1, "zeros": 0 * x}[case]
    run = build([find_range("r", 131, m), quantize_to_range("q", 131, form, m)], m)
    found, q = guarded(2), guarded(131, dtype=tvm_type(form.dtype))
    run("r", x, found)
    run("q", x, found, q)
    scale, zero = (float(value) for value in dynamic_range(torch.from_numpy(x)))
    assert (found == np.array([scale, zero], np.float32)).all()
    expected = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255)
    assert (q.astype(np.int64) + form.shift(int(zero)) == expected).all()


@pytest.mark.parametrize(("target", "instruction"), INSTRUCTIONS.items())
def test_instructions(tmp_path: Path, target: str, instruction: str) -> None:
    m = machine(target)
    text = assembly([dense_int8("d", Product(8, 64, 64), preferred(m), m)], m, tmp_path)
    assert instruction in text


def test_what_weights_do_not_fit_an_instruction_take_the_next() -> None:
    wide, narrow = np.array([[127, 127]], np.int8), np.array([[63, -64]], np.int8)
    found = [
        dot_for(machine(name), codes).instruction for name in ("wasm-relaxed", "x86-avx2") for codes in (wide, narrow)
    ]
    assert found == ["dot_i16x8", "relaxed_dot", "vpmaddwd", "vpmaddubsw"]
