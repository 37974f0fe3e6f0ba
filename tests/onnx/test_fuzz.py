"""Mutated models: success or one of our errors, never anything else (10,000 cases: `python -m benchmarks.onnx_fuzz`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.onnx_fuzz import case, one, seeds


@pytest.fixture(scope="module")
def contents() -> list[bytes]:
    """A network, sub-graphs and functions, and converted PyTorch operators."""
    return seeds(("pytorch-operator",))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(index=st.integers(0, 1 << 40))
def test_mutations(contents: list[bytes], tmp_path: Path, index: int) -> None:
    content, mutations = case(contents, 1, index)
    path = tmp_path / "mutated.onnx"
    path.write_bytes(content)
    assert one(path), mutations


def test_the_models_are_valid_before(contents: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "valid.onnx"
    for content in contents:
        path.write_bytes(content)
        assert one(path) == "succeeded"
