"""Sparsity on a trained model: the byte-level language model of the repository."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.sparse_lm import Armor, bits_per_byte, captured, corrected, joint, layer_errors, plain, sparse
from fxopt.ir.sparsity import Pattern

TWO_OF_FOUR = Pattern.parse("2:4")


@pytest.mark.parametrize(
    ("text", "sparsity"),
    [("2:4", 0.5), ("4:8", 0.5), ("8x2:4", 0.5), ("4x1", 0.5), ("4x1", 0.7), ("unstructured", 0.5)],
)
def test_every_layer_is_in_order(text: str, sparsity: float) -> None:
    errors = layer_errors(Pattern.parse(text), sparsity)
    assert len(errors) == 18
    assert all(row["sparsegpt"] < row["wanda"] < row["magnitude"] for row in errors.values()), errors


@pytest.mark.slow
def test_bits_per_byte() -> None:
    """In bits per byte more than dense."""
    dense = bits_per_byte(captured())
    increase = {name: sparse(plain(name, TWO_OF_FOUR, 0)).bits - dense for name in ("magnitude", "sparsegpt")}
    low_rank = sparse(partial(corrected, 0.08, TWO_OF_FOUR)).bits - dense
    rounded = sparse(partial(joint, TWO_OF_FOUR)).bits - dense
    assert increase["sparsegpt"] <= 0.30 * increase["magnitude"]
    assert low_rank <= 0.65 * increase["sparsegpt"]
    assert rounded <= 1.3 * increase["sparsegpt"]


@pytest.mark.slow
def test_armor() -> None:
    """Its loss is never above that of the start; with a third more parameters it beats SparseGPT."""
    dense = bits_per_byte(captured())
    wrapped, start = Armor(TWO_OF_FOUR, 150), Armor(TWO_OF_FOUR, 0)
    increase, from_start = sparse(wrapped).bits - dense, sparse(start).bits - dense
    assert all(min(losses) < 0.6 * losses[0] for losses in wrapped.losses) and len(wrapped.losses) == 18
    assert increase <= 0.3 * from_start
