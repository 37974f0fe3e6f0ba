"""The kernels' inline assembly, evaluated: it gives exactly what its plain twin and the packed layouts mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fxopt.backends.triton import ptx
from tests.backends.triton import ptx_evaluator as evaluator

READ: dict[str, Callable[..., Any]] = {"fp16": evaluator.fp16, "bf16": evaluator.bf16}


def words() -> list[Any]:
    """Two words: random ones, and every code beside every other."""
    random = np.random.default_rng(0)
    return [random.integers(0, 2**32, 4096, dtype=np.uint32) for _ in range(2)]


@pytest.mark.parametrize("element", ["fp16", "bf16"])
@pytest.mark.parametrize("bits", [2, 4])
def test_integer_codes(element: ptx.Element, bits: int) -> None:
    planes = 32 // bits
    pair = words()
    results = evaluator.evaluate(ptx.integers(element, bits), planes, pair)
    for plane, result in enumerate(results):
        for half, word in enumerate(pair):
            codes = (word >> np.uint32(bits * plane)) & np.uint32((1 << bits) - 1)
            assert (READ[element](result)[:, half] == codes.astype(float) - (1 << (bits - 1))).all()


@pytest.mark.parametrize("element", ["fp16", "bf16"])
def test_powers_of_two(element: ptx.Element) -> None:
    pair = words()
    results = evaluator.evaluate(ptx.shift4(element), 8, pair)
    for plane, result in enumerate(results):
        for half, word in enumerate(pair):
            codes = (word >> np.uint32(4 * plane)) & np.uint32(15)
            magnitude = np.where(codes & 7, 2.0 ** ((codes & 7).astype(float) - 15), 0.0)
            assert (READ[element](result)[:, half] == np.where(codes & 8, -magnitude, magnitude)).all()


@pytest.mark.parametrize("element", ["fp16", "bf16"])
@pytest.mark.parametrize("with_offset", [False, True])
def test_scales(element: ptx.Element, with_offset: bool) -> None:
    code, scale, offset = (ptx.half_bits(element, value) for value in (-7.0, 1.5, 3.0))
    operands = [np.full(2, half << 16 | half, np.uint32) for half in (code, scale, offset)]
    (result,) = evaluator.evaluate(ptx.scaled(element, with_offset), 1, operands[: 2 + with_offset])
    assert (READ[element](result) == (-7.5 if with_offset else -10.5)).all()


@pytest.mark.parametrize(
    ("element", "bits", "most"), [("fp16", 4, 1.25), ("bf16", 4, 1.5), ("fp16", 2, 1.125), ("bf16", 2, 1.25)]
)
def test_instructions_per_value(element: ptx.Element, bits: int, most: float) -> None:
    """Constants are loaded once, outside of the loop."""
    lines = [line.strip() for line in ptx.integers(element, bits).strip("{} ").split(";")]
    counted = [line for line in lines if line and not line.startswith((".reg", "mov"))]
    assert len(counted) / (2 * 32 / bits) <= most


def test_the_evaluator_knows_no_more_than_it_should() -> None:
    with pytest.raises(KeyError, match=r"mul\.f16x2"):
        evaluator.evaluate("mul.f16x2 $0, $1, $1;", 1, [np.zeros(1, np.uint32)])
    with pytest.raises(AssertionError, match="x is not declared"):
        evaluator.evaluate("mov.b32 x, $1;", 1, [np.zeros(1, np.uint32)])
