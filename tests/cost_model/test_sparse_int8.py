"""Break-evens of block-sparse 8-bit products: what they depend on, and in which direction."""

from __future__ import annotations

import pytest

from fxopt.cost_model.sparse_int8 import break_even

AVX512 = frozenset({"avx2", "avx512bw", "avx512_vnni", "avx_vnni"})
LEVELS = [AVX512, frozenset({"avx2", "avx_vnni"}), frozenset({"avx2", "fma"})]


@pytest.mark.parametrize("features", LEVELS, ids=["avx512", "avx_vnni", "avx2"])
def test_full_panels(features: frozenset[str]) -> None:
    shares = [break_even(features, inner, 64) for inner in (16, 384, 768, 1536, 3072, 12288)]
    assert shares == sorted(shares) and 0 < shares[0] <= shares[-1] < 0.6
    assert break_even(features, 384, 128) == shares[1] == break_even(features, 384, 64 * 50)


@pytest.mark.parametrize("features", LEVELS, ids=["avx512", "avx_vnni", "avx2"])
def test_few_rows_need_more_zeros(features: frozenset[str]) -> None:
    whole, half, one, none = (break_even(features, 384, rows) for rows in (64, 32, 1, 0))
    assert whole < half < one < 1 and none == whole
    assert break_even(features, 384, 65) < half  # the last row costs a pass, the others share one


def test_the_form_that_the_cpu_runs_counts() -> None:
    avx512, vnni, plain = (break_even(features, 384, 64) for features in LEVELS)
    assert plain < avx512 < vnni
    assert break_even(AVX512 - {"avx512bw"}, 384, 64) == vnni
