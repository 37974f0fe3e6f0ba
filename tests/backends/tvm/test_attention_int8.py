"""Attention on bytes against numpy, on every x86 form that this computer runs."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.backends.tvm.harness import Builder, build, machine

from fxopt.backends.tvm.kernels.attention_int8 import (  # isort: skip
    ATTENTION_PARAMETERS, AttentionForm, attention_int8, attention_tile, scratch,
)  # fmt: skip
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
FORMS = [AttentionForm(32, 96), AttentionForm(64, 64), AttentionForm(96, 128)]
LENGTHS = [(1, 1), (5, 3), (12, 32), (13, 33), (50, 197), (128, 128)]  # queries, keys
ZERO = 120


@pytest.mark.parametrize("target", list(NEEDS))
def test_attention(build: Builder, target: str) -> None:
    missing = NEEDS[target] - get_target("host").features
    if missing:
        pytest.skip(f"this computer lacks {sorted(missing)}")
    made_for = machine(target)
    functions = [attention_int8(f"a{form.width}", form, made_for) for form in FORMS]
    run = build(functions, made_for)
    random = np.random.default_rng(0)
    for form in FORMS:
        tile, width = attention_tile(form, made_for), form.width
        for (queries, keys), mask_rows in product(LENGTHS, (False, True)):
            rows = (queries, keys, keys)
            q, k, v = (random.integers(0, 256, (n, form.stride)).astype(np.uint8) for n in rows)
            shape = (queries, keys) if mask_rows else (keys,)
            mask = np.where(random.random(shape) < 0.2, -np.inf, random.standard_normal(shape)).astype(np.float32)
            mask[..., 0] = 0
            packed, floats, count = scratch(form, tile, keys)
            given: dict[str, Any] = {
                "sizes": np.array([queries, keys, keys * mask_rows], np.int32), "q": q, "k": k, "v": v, "mask": mask,
                "factor": np.array([1 / 8000 / np.sqrt(width)], np.float32), "zero": np.array([ZERO], np.float32),
                "inverse": random.uniform(0.5, 1.5, width).astype(np.float32),
                "codes": np.full((queries, form.stride), 7, np.uint8),
                "packed": np.zeros(packed, np.int8 if tile.group == 4 else np.int16),
                "floats": np.full(floats, np.nan, np.float32), "bytes": np.zeros(count, np.uint8),
            }  # fmt: skip
            run(f"a{width}", *(given[name] for name in ATTENTION_PARAMETERS))
            a, b, c = (x[:, :width].astype(np.float64) - 128 for x in (q, k, v))
            scores = a @ b.T * float(given["factor"][0]) + mask
            codes = np.rint(255 * np.exp(scores - scores.max(1, keepdims=True)))
            levels = codes / codes.sum(1, keepdims=True) @ c * given["inverse"] + ZERO
            found = given["codes"]
            # a probability near a tie may get the next code: one value of v in some hundreds
            assert np.abs(found[:, :width] - np.clip(levels, 0, 255)).max() < 1.5, (form, queries, keys)
            assert (found[:, width:] == 7).all()


def test_hidden_keys_only(build: Builder) -> None:
    """A query without keys gets the code of zero."""
    made_for = machine("host") if get_target("host").arch == "x86-64" else pytest.skip("no x86-64")
    form, keys = AttentionForm(32, 32), 40
    tile = attention_tile(form, made_for)
    packed, floats, count = scratch(form, tile, keys)
    q = np.full((3, 32), 200, np.uint8)
    k = np.full((keys, 32), 90, np.uint8)
    codes, ones = np.zeros((3, 32), np.uint8), np.ones(32, np.float32)
    arrays = [
        np.array([3, keys, 0], np.int32),
        q,
        k,
        k,
        np.full(keys, -np.inf, np.float32),
        ones[:1],
        ones,
        120 * ones[:1],
    ]
    arrays += [codes, np.zeros(packed, np.int8 if tile.group == 4 else np.int16)]
    arrays += [np.zeros(floats, np.float32), np.zeros(count, np.uint8)]
    build(attention_int8("a", form, made_for), made_for)("a", *arrays)
    assert (codes == 120).all()


def test_refusals() -> None:
    with pytest.raises(Unsupported, match="multiple of 32 channels; given 48"):
        attention_tile(AttentionForm(48, 96), machine("x86-avx512-vnni"))
    with pytest.raises(Unsupported, match="not for wasm"):
        attention_tile(AttentionForm(32, 96), machine("wasm"))
