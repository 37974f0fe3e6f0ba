"""Import and export take at most five times what onnx takes to load and save the file, plus a millisecond per node."""

from __future__ import annotations

from pathlib import Path

import onnx

from benchmarks.onnx_speed import measure
from tests.test_large_graph import network


def test_ten_thousand_nodes(tmp_path: Path) -> None:
    onnx.save(network(10_000), tmp_path / "in.onnx")
    row = measure(tmp_path / "in.onnx", repeats=1)
    assert row.nodes == 10_000
    assert row.fxopt_seconds <= row.bound, f"{row.fxopt_seconds:.2f} s; onnx takes {row.onnx_seconds:.2f} s"
