"""The tables in the docs are those that the result files give."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.bursts import local, race
from benchmarks.cpu_int8 import names, samples
from benchmarks.models import MODELS
from benchmarks.peers import openvino_python
from benchmarks.tables import PAGE, cpu_int8, page


def test_the_page_is_generated_from_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m benchmarks.tables"


def test_a_race_gives_the_ratio_of_the_competitors() -> None:
    clock = {"slow": 0.004, "fast": 0.002}
    bursts = {name: (lambda dropped, timed, s=seconds: [s] * timed) for name, seconds in clock.items()}
    rows = race(bursts, "slow", seconds=0.0)
    assert rows["slow"]["ratio_of_medians"] == 1.0 and rows["fast"]["ratio_of_medians"] == 2.0
    assert rows["fast"]["low"] == rows["fast"]["high"] == 2.0 and rows["fast"]["milliseconds"] == 2.0
    assert rows["fast"]["runs"] == 5 and rows["fast"]["bursts"] >= 5


def test_a_burst_drops_its_first_calls() -> None:
    calls: list[int] = []
    assert len(local(lambda: calls.append(1))(3, 4)) == 4 and len(calls) == 7


def test_unknown_models_are_named() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="unknown model 'resnet51'; known: minilm_b1, .*resnet50"):
        names("bert4,resnet51", list(MODELS))


def test_a_row_without_openvino_says_why() -> None:
    python, reason = openvino_python("/bin/false")
    assert python == "" and "give --openvino-python" in reason
    row = {"speed": {"1": {"ratio_of_medians": 1.5}}, "mean_cosine": 0.99, "noise_to_signal": 0.01}
    model = {"title": "a model", "competitors": {"fxopt": row}, "not_measured": {"openvino_nncf": reason}}
    machine = {"cpu": "c", "family": 1, "model": 1, "cores": 1, "instruction_sets": ["avx2"], "python": "3"}
    text = "\n".join(cpu_int8({"machine": {**machine, "versions": {}}, "models": {"m": model}}))
    assert "| fxopt | 1.50 | 0.01 | 0.9900 |" in text and "| openvino_nncf | not measured |" in text
    assert "On a CPU with VNNI: not measured." in text


def test_calibration_and_held_out_samples_differ() -> None:
    calibration, held_out = samples("resnet50")
    assert len(calibration) == len(held_out) == 16
    assert not any((a["x"] == b["x"]).any() for a in calibration for b in held_out)
