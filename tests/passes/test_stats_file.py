"""A calibration that was cut off goes on: the same statistics as in one go, and never with other data's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from fxopt.errors import InvalidInput, OutputError
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.passes.stats import Stats, ValueStats, collect
from tests.conftest import mlp


class Killed(Exception):
    """Stands for the end of the process."""


def graph_and_samples(count: int = 6) -> tuple[Graph, list[list[torch.Tensor]], list[fx.Node]]:
    graph = load(mlp())
    samples = [[torch.randn(5, 16, generator=torch.Generator().manual_seed(seed))] for seed in range(count)]
    return graph, samples, [graph.placeholders[0], *graph.calls()]


def assert_equal(found: Stats, expected: Stats) -> None:
    assert found.samples == expected.samples and found.values.keys() == expected.values.keys()
    for name, value in expected.values.items():
        for field, wanted in vars(value).items():
            _assert_same(getattr(found.values[name], field), wanted)


def _assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    elif isinstance(wanted, tuple):
        for one, other in zip(found, wanted, strict=True):
            _assert_same(one, other)
    elif hasattr(wanted, "__dict__"):
        for field, inner in vars(wanted).items():
            _assert_same(getattr(found, field), inner)
    else:
        assert found == wanted


@pytest.mark.parametrize("histograms", [False, True])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_killed_run_goes_on(after: int, histograms: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.passes.stats._STATE_SECONDS", -1.0)
    graph, samples, nodes = graph_and_samples()
    state, ran = tmp_path / "state.npz", []

    def progress(text: str, done: int, total: int) -> None:
        ran.append(done)
        if done == after and len(ran) == after:
            raise Killed

    with pytest.raises(Killed):
        collect(graph, samples, nodes, progress=progress, histograms=nodes if histograms else (), state=state)
    found = collect(graph, samples, nodes, progress=progress, histograms=nodes if histograms else (), state=state)
    assert ran == list(range(1, 7))  # no sample twice
    assert_equal(found, collect(graph, samples, nodes, histograms=nodes if histograms else ()))
    again = collect(graph, samples, nodes, progress=progress, histograms=nodes if histograms else (), state=state)
    assert_equal(again, found) if len(ran) == 6 else pytest.fail("a finished calibration ran again")
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


def test_another_model_other_data_or_other_passes(tmp_path: Path) -> None:
    graph, samples, nodes = graph_and_samples()
    state = tmp_path / "state.npz"
    collect(graph, samples, nodes, state=state)
    other = [[value + 1 for value in sample] for sample in samples]
    for arguments in (
        (load(mlp(seed=1)), samples, None),
        (graph, other, nodes),
        (graph, samples[:-1], nodes),
        (graph, samples, nodes[:1]),
    ):
        made, data, wanted = arguments
        with pytest.raises(InvalidInput, match=r"state\.npz belongs to another model, other data or other passes"):
            collect(made, data, [made.placeholders[0], *made.calls()] if wanted is None else wanted, state=state)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x00" * 100])
def test_files_of_another_kind(content: bytes, tmp_path: Path) -> None:
    graph, samples, nodes = graph_and_samples()
    state = tmp_path / "state.npz"
    state.write_bytes(content)
    with pytest.raises(InvalidInput, match="not the state of a calibration"):
        collect(graph, samples, nodes, state=state)
    np.savez(state, header=np.frombuffer(b"{}", np.uint8))
    with pytest.raises(InvalidInput, match="not the state of a calibration"):
        collect(graph, samples, nodes, state=state)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    graph, samples, nodes = graph_and_samples()
    with pytest.raises(OutputError, match="cannot be written"):
        collect(graph, samples, nodes, state=tmp_path / "missing" / "state.npz")


def test_statistics_of_either_half() -> None:
    value = ValueStats()
    for low, high in ((-1.0, 2.0), (-5.0, 1.0), (-2.0, 3.0)):
        value.add(torch.tensor([[low, high]]))
    assert [(half.minimum, half.maximum) for half in value.halves] == [(-2.0, 3.0), (-5.0, 1.0)]
    assert value.sample_half is not None and value.sample_half.tolist() == [0, 1, 0]
    assert value.largest().tolist() == [5.0, 3.0]
