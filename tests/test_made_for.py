"""Files say for which instruction sets they were made, and using them elsewhere is not silent."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import fxopt
from fxopt.cost_model.host import detect_host
from fxopt.made_for import KEY, concern, recorded
from tests.conftest import mlp

VNNI, AVX2 = frozenset({"avx2", "avx512bw", "avx512_vnni"}), frozenset({"avx2", "fma"})
QUANTISED = {"fxopt.passes": "quantize-linear"}


def test_what_is_recorded() -> None:
    assert recorded(VNNI) == "avx2,avx512_vnni,avx512bw"
    assert recorded(frozenset({"sse"})) == ""


@pytest.mark.parametrize(
    ("made", "here", "text"),
    [
        (VNNI, AVX2, "made for a CPU with avx512_vnni; this one lacks it"),
        (AVX2, VNNI, "weights of 7 bits"),
        (VNNI, VNNI, ""),
        (AVX2, AVX2, ""),
        (VNNI, frozenset({"neon", "dotprod"}), ""),  # sums are wide there
    ],
)
def test_concerns(made: frozenset[str], here: frozenset[str], text: str) -> None:
    metadata = {KEY: recorded(made), **QUANTISED}
    assert text in concern(metadata, here, "m.onnx") and bool(text) == bool(concern(metadata, here, "m.onnx"))
    assert concern({KEY: recorded(made)}, here, "m.onnx") == ""  # nothing was quantised
    assert concern(QUANTISED, here, "m.onnx") == ""  # made elsewhere


def quantised(features: frozenset[str]) -> Any:
    target = dataclasses.replace(detect_host(1), features=features)
    batches = [{"x": torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]
    return fxopt.optimize(
        mlp(), target, calibration=batches, passes=["quantize-linear"], budget=None, objective="size", force=True
    )


def test_a_file_that_is_used_elsewhere_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    quantised(VNNI).save(path)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata[KEY] == "avx2,avx512_vnni,avx512bw"
    monkeypatch.setattr("fxopt.cost_model.host.instruction_sets", lambda: AVX2)
    with pytest.warns(UserWarning, match=r"m\.onnx was made for a CPU with avx512_vnni"):
        loaded = fxopt.load(path)
    assert any("made for a CPU" in text for text in loaded.report.warnings)
    again = fxopt.optimize(path, "host", passes=[])
    assert any("made for a CPU" in text for text in again.report.warnings)
    monkeypatch.setattr("fxopt.cost_model.host.instruction_sets", lambda: VNNI)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxopt.load(path)


def test_codes_without_vnni_do_not_saturate() -> None:
    """Sums of two products as vpmaddubsw forms them stay within 16 bits with the codes that are chosen there."""
    for features, safe in ((AVX2, True), (VNNI, False)):
        graph = quantised(features).graph
        worst = 0
        for node in graph.calls():
            if "linear_w8a8" not in str(node.target):
                continue
            codes = graph.constant(node.args[1])
            assert codes is not None
            pairs = codes.to(torch.int32).unfold(1, 2, 2)
            sums = torch.maximum(pairs.clamp(min=0).sum(-1), (-pairs).clamp(min=0).sum(-1)) * 255
            worst = max(worst, int(sums.max()))
        assert worst > 0 and (worst < 1 << 15) is safe
