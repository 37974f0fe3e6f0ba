"""ONNX Runtime's other providers: named, listed, measured, verified; a stand-in where none is installed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import fxopt
from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.onnxruntime.providers import CPU, PROVIDERS, find_provider, others
from fxopt.backends.onnxruntime.session import OnnxExecutable, make_session
from fxopt.errors import InvalidModel, InvalidOption, MissingDependency, UnknownName
from fxopt.passes.quantize_linear import QuantizeLinear
from tests.conftest import mlp

OPENVINO = PROVIDERS["openvino"]
real = pytest.mark.skipif(bool(OPENVINO.missing), reason=f"provider openvino {OPENVINO.missing}")
Run = Callable[..., Any]


class Standin:
    """A session of ONNX Runtime that says it runs in the wished provider; delays in seconds, and wrong results."""

    delays: dict[str, float]
    factor: float
    falls_back: bool
    opened: list[list[Any]]

    def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
        self.session = REAL_SESSION(path, options, providers=[CPU.full_name])
        self.name = providers[0] if isinstance(providers[0], str) else providers[0][0]
        type(self).opened.append(providers)

    def get_providers(self) -> list[str]:
        return [CPU.full_name] if self.falls_back else [self.name, CPU.full_name]

    def get_inputs(self) -> Any:
        return self.session.get_inputs()

    def run(self, names: Any, feeds: Any) -> list[Any]:
        time.sleep(self.delays.get(self.name, 0.0))
        found: list[Any] = self.session.run(names, feeds)
        return [value * self.factor for value in found] if self.name != CPU.full_name else found


REAL_SESSION = onnxruntime.InferenceSession


@pytest.fixture
def openvino(monkeypatch: pytest.MonkeyPatch) -> type[Standin]:
    """A build of ONNX Runtime with OpenVINO's provider, ten times as fast as its own kernels."""
    Standin.delays = {CPU.full_name: 20e-3}
    Standin.factor, Standin.falls_back, Standin.opened = 1.0, False, []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [OPENVINO.full_name, CPU.full_name])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Standin)
    return Standin


@pytest.fixture
def quick(openvino: type[Standin], monkeypatch: pytest.MonkeyPatch) -> type[Standin]:
    """The same, where 8-bit linears take half as long in ONNX Runtime's own kernels too."""

    class Quick(Standin):
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            super().__init__(path, options, providers)
            kinds = {node.op_type for node in onnx.load(path).graph.node}
            self.delays = {CPU.full_name: 20e-3 if "DynamicQuantizeLinear" in kinds else 40e-3}

    monkeypatch.setattr(onnxruntime, "InferenceSession", Quick)
    return Quick


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without it, whatever is installed."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU.full_name])


BATCHES = [{"x": np.random.default_rng(seed).normal(size=(64, 512)).astype(np.float32)} for seed in range(4)]
MODEL = mlp(features=512, hidden=512)


def optimized(**options: Any) -> Any:
    return fxopt.optimize(MODEL, calibration=BATCHES, threads=1, guard_seconds=3.0, **options)


def about_openvino(result: Any) -> list[str]:
    return [note for note in result.report.warnings if "OpenVINO" in note]


def test_the_faster_provider_is_taken_and_said(openvino: type[Standin], tmp_path: Path) -> None:
    result = optimized(passes=[QuantizeLinear(activations="static", smooth="off")], budget=0.0)
    assert result.report.executed_on == "onnxruntime OpenVINO, 1 thread" and result.report.runtime == "openvino"
    (note,) = about_openvino(result)
    assert note.startswith("onnxruntime OpenVINO, 1 thread is used instead of onnxruntime CPU, 1 thread: measured ")
    assert result.report.outcome == "nothing paid"  # in the kernels that decided: the file is the same
    x = torch.from_numpy(BATCHES[0]["x"])
    assert torch.allclose(result(x), result.graph.run([x])[0], atol=1e-5)


def test_a_changed_file_says_where_it_was_measured(quick: type[Standin], tmp_path: Path) -> None:
    """Own kernels that are slow only for what came in: the result pays, and pays more elsewhere."""
    result = optimized(passes=[QuantizeLinear(activations="dynamic", smooth="off")], budget=None)
    report = result.report
    assert report.outcome == "optimized" and report.runtime == "openvino"
    assert report.measured is not None and report.measured.ratio > 3 and report.measured.low > 1
    assert report.measured.baseline == "onnxruntime CPU, 1 thread"
    assert "x in onnxruntime OpenVINO, 1 thread" in report.why
    path = tmp_path / "written.onnx"
    result.save(path)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata["fxopt.runtime"] == "openvino"
    assert fxopt.load(path, threads=1).report.executed_on == "onnxruntime OpenVINO, 1 thread"
    assert type(report).from_json(json.loads(json.dumps(report.to_json()))).runtime == "openvino"


def test_a_file_for_a_provider_that_is_not_here(plain: None, tmp_path: Path) -> None:
    model = mlp()
    for name, why in (("openvino", "needs onnxruntime-openvino in the place of"), ("fast", "does not know")):
        del model.metadata_props[:]
        model.metadata_props.add(key="fxopt.runtime", value=name)
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.warns(UserWarning, match=f"measured in the provider {name}, which .*{why}"):
            found = fxopt.load(tmp_path / "model.onnx", threads=1)
        assert found.report.executed_on == "onnxruntime CPU, 1 thread"
        assert any(why in text for text in found.report.warnings)


def test_a_slower_provider_is_not_taken(openvino: type[Standin]) -> None:
    openvino.delays = {OPENVINO.full_name: 20e-3, CPU.full_name: 5e-3}
    result = optimized()
    assert result.report.runtime == "cpu"
    (note,) = about_openvino(result)
    assert "is not used instead of onnxruntime CPU, 1 thread: measured 0." in note and "not surely faster" in note


@pytest.mark.parametrize(("is_lossy", "what"), [(False, "what rounding explains, 1e-06"), (True, "the budget, 0.02")])
def test_a_wrong_provider_is_not_taken(quick: type[Standin], is_lossy: bool, what: str) -> None:
    """However fast it is."""
    quick.factor = 1.5
    result = optimized(passes=[QuantizeLinear(activations="dynamic")] if is_lossy else ["fold-constants"])
    assert result.report.runtime == "cpu" and (result.report.error is not None) == is_lossy
    (note,) = about_openvino(result)
    assert "is not used" in note and f"exceeds {what}" in note


def test_a_provider_that_cannot_load_the_model(openvino: type[Standin]) -> None:
    openvino.falls_back = True
    result = optimized()
    assert result.report.runtime == "cpu"
    assert any("fell back from OpenVINO to its own kernels" in note for note in about_openvino(result))


def test_an_asked_for_provider_runs_everything(openvino: type[Standin]) -> None:
    result = optimized(backend="onnxruntime{provider=openvino}", passes=["fold-constants"])
    assert result.report.runtime == "openvino" and about_openvino(result) == []
    assert {given[0][0] for given in openvino.opened} == {OPENVINO.full_name}
    settings = json.loads(openvino.opened[0][0][1]["load_config"])
    assert settings == {"CPU": {"INFERENCE_NUM_THREADS": "1"}}
    openvino.opened.clear()
    assert optimized(backend="onnxruntime{provider=cpu}").report.runtime == "cpu"
    assert {given[0] for given in openvino.opened} == {CPU.full_name}


def test_unknown_names_are_errors_with_a_suggestion(plain: None) -> None:
    with pytest.raises(UnknownName, match="unknown provider of onnxruntime 'openvno'; did you mean 'openvino'"):
        optimized(backend="onnxruntime{provider=openvno}")
    with pytest.raises(UnknownName, match="unknown option of backend onnxruntime 'providr'; did you mean 'provider'"):
        optimized(backend="onnxruntime{providr=cpu}")
    with pytest.raises(UnknownName, match="unknown backend 'onxruntime'; did you mean 'onnxruntime'"):
        optimized(backend="onxruntime{provider=cpu}")
    with pytest.raises(InvalidOption, match="backend 'onnxruntime{cpu}': 'cpu' is not of the form option=value"):
        optimized(backend="onnxruntime{cpu}")
    with pytest.raises(MissingDependency, match="provider openvino needs onnxruntime-openvino .*: pip install"):
        optimized(backend="onnxruntime{provider=openvino}")
    assert others() == []


def test_backends_list_the_providers(plain: None, capsys: pytest.CaptureFixture[str]) -> None:
    from fxopt.cli.lists import backends

    backends(json="-")
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    found = rows["onnxruntime"]["runtimes"]
    assert found["cpu"] == "yes" and found["openvino"].startswith("needs onnxruntime-openvino in the place of")
    assert rows["eager"]["runtimes"] == {}


def test_the_file_outlives_either_executable(openvino: type[Standin], tmp_path: Path) -> None:
    from fxopt.frontends.onnx import load
    from fxopt.testing import PLAIN_CPU

    first = OnnxRuntime().compile(load(mlp()), PLAIN_CPU, threads=1)
    assert isinstance(first, OnnxExecutable)
    second = first.moved(OPENVINO)
    del first
    second.save(tmp_path / "copy.onnx")
    assert onnx.load(tmp_path / "copy.onnx").graph.node
    assert second.executed_on == "onnxruntime OpenVINO, 1 thread"
    second.close()


@real
def test_the_real_provider_gives_the_same_numbers(tmp_path: Path) -> None:
    onnx.save(MODEL, tmp_path / "model.onnx")
    x = BATCHES[0]
    names = [value.name for value in make_session(tmp_path / "model.onnx", 1).get_inputs()]
    feed = dict(zip(names, x.values(), strict=True))
    found = [
        make_session(tmp_path / "model.onnx", 1, provider=find_provider(name)).run(None, feed)[0] for name in PROVIDERS
    ]
    assert np.allclose(found[0], found[1], atol=1e-4)


@real
def test_the_real_provider_is_measured() -> None:
    (note,) = about_openvino(optimized())
    assert "used instead of onnxruntime CPU, 1 thread: " in note


def test_a_model_that_neither_loads(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(InvalidModel, match="cannot load model.onnx: "):
        make_session(tmp_path / "model.onnx")
