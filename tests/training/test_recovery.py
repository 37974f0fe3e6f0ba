"""What fine-tuning is for: most of what pruning lost comes back. Slow, on the model of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxopt
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
MODEL = ROOT / "examples" / "models" / "byte-lm.onnx"


def test_70_percent_of_4x1_blocks_are_recovered_within_150_steps() -> None:
    from benchmarks.finetune import bits, pruned, training_data, zeros_lost
    from fxopt.ir.masks import verify_masks

    dense = fxopt.capture(MODEL)
    start = pruned(dense)
    tuned = fxopt.finetune(start, training_data(150), teacher=dense, learning_rate=3e-3, progress=False)
    before, after, best = bits(start), bits(tuned.graph), bits(dense)
    assert before - best > 0.5, "pruning lost next to nothing"
    assert (before - after) / (before - best) >= 0.7
    assert zeros_lost(start, tuned.graph) == 0
    verify_masks(tuned.graph)


def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.evaluate import byte_lm_bits
    from examples.finetune_sparse import main

    main(["--steps", "8", "--out", str(tmp_path)])
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {word[0]: (float(word[1]), float(word[5])) for word in words if len(word) > 5}
    assert rows["dense"][0] < rows["fine-tuned"][0] < rows["pruned"][0]
    assert rows["packed"][1] == rows["pruned"][1] < 0.4 * rows["dense"][1]
    loaded = fxopt.load(tmp_path / "byte-lm.sparse.onnx")
    assert -byte_lm_bits(loaded) == pytest.approx(rows["packed"][0], abs=2e-3)
