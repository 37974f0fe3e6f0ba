"""The public functions, from a model to a file and back."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt.errors import InvalidInput, InvalidModel, InvalidOption, NotReady, OutputError, UnknownName, Unsupported
from tests.conftest import digest, mlp

torch.set_num_threads(1)

QUICK: dict[str, Any] = {"guard_seconds": 0.1, "threads": 1}
X = torch.linspace(-1, 1, 64).reshape(4, 16)


class Net(torch.nn.Module):
    """Large enough for integers to pay by prediction on a100, small enough for tests."""

    def __init__(self, features: int = 16, hidden: int = 32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(features, hidden)
        self.second = torch.nn.Linear(hidden, features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Pair(NamedTuple):
    sum: torch.Tensor
    rest: dict[str, torch.Tensor]


class Structured(Net):
    """Inputs in a list and by keyword, outputs in containers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: list[torch.Tensor], *, scale: torch.Tensor) -> Any:  # type: ignore[override]
        y = super().forward(x[0] + x[1]) * scale
        z = {"twice": y * 2, "neg": -y}
        return {"tuple": (y, z["neg"]), "dict": z, "list": [y, [z["twice"]]], "pair": Pair(y, z)}[self.kind]


def same(a: Any, b: Any) -> None:
    """Equal structure and types, and values up to rounding."""
    from torch.utils import _pytree as pytree

    assert pytree.tree_structure(a) == pytree.tree_structure(b)
    for left, right in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def state(model: torch.nn.Module) -> tuple[str, bool]:
    """Of the weights and of the mode."""
    content = hashlib.sha256()
    for name, value in model.state_dict().items():
        content.update(name.encode() + value.numpy().tobytes())
    return content.hexdigest(), model.training


# ---- nn.Module in, nn.Module out


@pytest.mark.parametrize(
    ("kind", "target"),
    [("tuple", "host"), ("pair", "host"), ("tuple", "a100"), ("dict", "a100"), ("list", "a100"), ("pair", "a100")],
)
def test_the_structure_of_inputs_and_outputs_is_kept(kind: str, target: str) -> None:
    model = Structured(kind).eval()
    args = ([X, X.flip(0)],)
    kwargs = {"scale": torch.tensor(0.5)}
    fast = fxopt.optimize(model, target, example_inputs={"x": args[0], **kwargs}, **QUICK)
    assert isinstance(fast, torch.nn.Module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(fast(*args, **kwargs), model(*args, **kwargs))


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = torch.nn.Sequential(Net(), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.5)).train(training)
    before = state(model)
    fast = fxopt.optimize(model, example_inputs=(X,), **QUICK)
    fast(X)
    assert state(model) == before
    same(fast(X), model.eval()(X))  # what is optimised is inference
    assert not list(fast.parameters())


def test_without_example_inputs_the_first_call_captures() -> None:
    model = Net().eval()
    fast = fxopt.optimize(model, **QUICK)
    for name in ("report", "ledger", "graph"):
        with pytest.raises(
            NotReady, match=re.escape("not been captured yet: give optimize(example_inputs=...) or call")
        ):
            getattr(fast, name)
    with pytest.raises(NotReady):
        fast.save("nowhere.onnx")
    with pytest.warns(UserWarning, match="captured at the first call; one sample is little to calibrate on"):
        result = fast(X)
    same(result, model(X))
    assert "captured at the first call: that call is the only sample" in fast.report.warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(fast(X), model(X))


def test_the_first_call_may_use_keywords_and_containers() -> None:
    model = Structured("dict").eval()
    fast = fxopt.optimize(model, passes=[])
    with pytest.warns(UserWarning, match="first call"):
        same(fast([X, X], scale=torch.ones(1)), model([X, X], scale=torch.ones(1)))


def test_a_first_call_that_cannot_be_captured_may_be_repeated() -> None:
    fast = fxopt.optimize(Net().eval(), passes=[])
    with pytest.warns(UserWarning), pytest.raises(fxopt.FxoptError):
        fast(torch.ones(4, 5))
    with pytest.warns(UserWarning, match="first call"):
        assert fast(X).shape == (4, 16)


def test_dynamic_dimensions_stay_dynamic() -> None:
    model = Net().eval()
    fast = fxopt.optimize(model, example_inputs=(X,), dynamic_shapes={"x": {0: "batch"}}, **QUICK)
    assert fast.graph.inputs[0].shape == ("batch", 16)
    same(fast(torch.ones(7, 16)), model(torch.ones(7, 16)))


def test_an_exported_program() -> None:
    model = Net().eval()
    fast = fxopt.optimize(torch.export.export(model, (X,)), **QUICK)
    same(fast(X), model(X))


# ---- ONNX in


@pytest.mark.parametrize("form", ["path", "text", "message"])
def test_onnx_models_in_every_form(form: str, model_file: Path) -> None:
    source = {"path": model_file, "text": str(model_file), "message": onnx.load(model_file)}[form]
    before = digest(model_file)
    fast = fxopt.optimize(source, calibration="random", **QUICK)
    (expected,) = onnxruntime.InferenceSession(str(model_file)).run(None, {"x": X.numpy()})
    np.testing.assert_allclose(fast(X).numpy(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fast(x=X).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert digest(model_file) == before
    if form == "message":
        assert source == mlp()


def test_no_passes_write_the_same_bytes_of_meaning(model_file: Path, work: Path) -> None:
    fxopt.optimize(model_file, passes=[]).save(work / "out.onnx")
    assert onnx.load(work / "out.onnx") == onnx.load(model_file)


def test_several_outputs_are_a_tuple() -> None:
    model = mlp()
    model.graph.output.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", 32]))
    result = fxopt.optimize(model, passes=[])(X)
    assert isinstance(result, tuple) and [tuple(value.shape) for value in result] == [(4, 8), (4, 32)]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"0 inputs given, the model takes 1: .*x"),
        ((X, X), {}, "2 inputs given, the model takes 1"),
        ((), {"y": X}, "unknown input 'y'.*Known: x"),
        ((X,), {"x": X}, "input 'x' was given twice"),
        ((X[:, :3],), {}, r"input 'x' has shape \[4, 3\], expected \[batch, 16\]"),
        ((X.double(),), {}, "input 'x' has element type float64, expected float32"),
        ((X[0],), {}, r"input 'x' has shape \[16\], expected \[batch, 16\]"),
    ],
)
def test_inputs_that_do_not_fit(args: Any, kwargs: Any, message: str) -> None:
    fast = fxopt.optimize(mlp(), passes=[])
    with pytest.raises(InvalidInput, match=message):
        fast(*args, **kwargs)


# ---- unknown names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "a10"}, r"unknown target 'a10'; did you mean 'a100'.*\? Known: .*host"),
        ({"passes": ["quantise-linear"]}, "unknown pass 'quantise-linear'; did you mean 'quantize-linear'"),
        ({"passes": ["quantize-linear{bit=8}"]}, "unknown option of quantize-linear 'bit'; did you mean 'bits'"),
        ({"backend": "onnx-runtime"}, "unknown backend 'onnx-runtime'; did you mean 'onnxruntime'"),
        ({"objective": "speed"}, "unknown objective 'speed'. Known: latency, size"),
        ({"objective": "latence"}, "unknown objective 'latence'; did you mean 'latency'"),
        ({"input_shapes": {"y": (1, 16)}}, "unknown .*input 'y'.*x"),
    ],
)
def test_unknown_names_suggest_near_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        fxopt.optimize(mlp(), **options)


@pytest.mark.parametrize(
    "options", [{"target": "a10"}, {"passes": ["fold"]}, {"objective": "fast"}, {"backend": "ort"}]
)
def test_unknown_names_are_found_before_the_first_call(options: dict[str, Any]) -> None:
    with pytest.raises(UnknownName):
        fxopt.optimize(Net(), **options)


def test_an_unknown_option_of_explain() -> None:
    with pytest.raises(UnknownName, match="unknown option of explain 'calibrate'; did you mean 'calibration'"):
        fxopt.explain(mlp(), calibrate="random")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -0.1}, "budget=-0.1; expected a number of at least 0, or None"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"include": "("}, r"include='\(' is not a regular expression"),
        ({"passes": ["quantize-linear{bits=5}"]}, "bits=5"),
        ({"passes": "quantize-linear"}, r"passes='quantize-linear'; expected a list"),
        ({"passes": [3]}, r"passes\[0\] is 3; expected a pass or its text"),
        ({"threads": 0}, "threads=0; expected"),
        ({"guard_seconds": 0}, "guard_seconds=0; expected"),
        ({"guard_seconds": -1}, "guard_seconds=-1; expected"),
        ({"guard_seconds": "1"}, "guard_seconds='1' is a str; expected a number"),
        ({"budget": "0.1"}, "budget='0.1' is a str; expected a number, or None"),
        ({"threads": 1.5}, "threads=1.5 is a float; expected a whole number"),
        ({"require_speedup": True}, "require_speedup=True is a bool; expected a number"),
        ({"backend": 3}, "backend=3 is a int; expected a name"),
        ({"target": 7}, "target=7 is a int; expected a name or a Target"),
        ({"evaluate": 0.5}, "evaluate=0.5; expected a function"),
        ({"calibration": "random", "evaluate": lambda model: "good", "force": True}, "evaluate returned 'good'; expected a"),
        ({"calibration": "random", "evaluate": lambda model: float("nan"), "force": True}, "evaluate returned nan for the model that came in"),
    ],
)
def test_illegal_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOption, match=message):
        fxopt.optimize(mlp(), **options)


def test_what_is_no_model_is_refused_at_once() -> None:
    with pytest.raises(InvalidInput, match="expected a path, a ModelProto, a torch.nn.Module or a Graph, got a int"):
        fxopt.optimize(3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 2, 3), "3 dimensions"), ((1, 8), r"x:\[1, 8\].*16")],
)
def test_input_shapes_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises((InvalidInput, InvalidOption), match=message):
        fxopt.optimize(mlp(), input_shapes={"x": shape})


# ---- absent targets


@pytest.fixture(scope="module")
def on_a100() -> fxopt.Optimized:
    """A network whose first linear is quantised, for a chip that is not here."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(64, 512, generator=generator) for _ in range(2)]
    return fxopt.optimize(Net(512, 1024).eval(), "a100", example_inputs=(data[0],), calibration=data)


def test_an_absent_target_decides_and_runs_the_reference(on_a100: fxopt.Optimized) -> None:
    assert on_a100.report.outcome == "optimized" and on_a100.report.target == "a100"
    assert on_a100.report.executed_on == "eager (reference)" and on_a100.report.measured is None
    assert {row.node for row in on_a100.ledger.select(outcome="applied")}
    model = Net(512, 1024).eval()
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(5))
    fresh = fxopt.optimize(model, "a100", example_inputs=(x,))
    with pytest.warns(UserWarning, match="compiled for a100, running the reference"):
        y = fresh(x)
    assert ((y - model(x)).square().sum() / (model(x) - model(x).mean()).square().sum()).item() < 0.02
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh(x)


def test_an_onnx_model_for_an_absent_target(model_file: Path, work: Path) -> None:
    fast = fxopt.optimize(model_file, "a100", calibration="random")
    fast.save(work / "out.onnx")
    onnx.checker.check_model(work / "out.onnx", full_check=True)


def test_saving_for_an_absent_target(on_a100: fxopt.Optimized, work: Path) -> None:
    on_a100.save(work / "folder")
    kernels = {"kernels"} if importlib.util.find_spec("triton") else set()
    assert {path.name for path in (work / "folder").iterdir()} == {"manifest.json", "graph", *kernels}
    back = fxopt.load(work / "folder")
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    with pytest.warns(UserWarning, match="compiled for a100, running the reference"):
        assert torch.equal(back(x), on_a100(x))
    assert back.report.to_json() == on_a100.report.to_json()
    assert back.ledger == on_a100.ledger
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def test_a_torch_graph_for_a_gpu_has_no_onnx_form(on_a100: fxopt.Optimized, work: Path) -> None:
    with pytest.raises(
        Unsupported, match=r"optimised for a100 has no ONNX form \(it holds .*fxopt.linear_w8a8.*save it as a folder"
    ):
        on_a100.save(work / "out.onnx")
    assert not list(work.iterdir())


def test_an_onnx_file_of_compiled_code_holds_the_graph_alone(model_file: Path, work: Path) -> None:
    pytest.importorskip("tvm", reason="WebAssembly is written with TVM")
    compiled = fxopt.optimize(
        model_file, "wasm-simd", calibration="random", input_shapes={"x": (2, 16)}, buckets={"batch": 2}
    )
    with pytest.warns(UserWarning, match=r"out\.onnx holds the graph alone.* for wasm-simd is saved in a folder"):
        compiled.save(work / "out.onnx")
    assert compiled(torch.zeros(2, 16)).shape == fxopt.load(work / "out.onnx")(torch.zeros(2, 16)).shape


# ---- saving and loading


@pytest.fixture
def fast(model_file: Path) -> fxopt.Optimized:
    return fxopt.optimize(model_file, passes=[])


def test_results_are_no_pickles(fast: fxopt.Optimized, work: Path) -> None:
    for attempt in (lambda: torch.save(fast, work / "out.pt"), lambda: copy.deepcopy(fast)):
        with pytest.raises(Unsupported, match=r"cannot be pickled or copied; write it with \.save\(path\)"):
            attempt()


def test_a_file(fast: fxopt.Optimized, work: Path) -> None:
    fast.save(work / "out.onnx")
    back = fxopt.load(work / "out.onnx")
    assert torch.equal(back(X), fast(X)) and torch.equal(back(x=X), fast(X))
    assert back.report.outcome == "unchanged" and back.report.why == "loaded from a file" and back.unmet == ""
    back.save(work / "again.onnx")
    assert onnx.load(work / "again.onnx") == mlp()


def test_a_folder(work: Path) -> None:
    model = Net().eval()
    fast = fxopt.optimize(model, example_inputs=(X,), force=True, passes=["quantize-linear"], budget=None)
    fast.save(work / "folder")
    assert {path.name for path in (work / "folder").iterdir()} == {"manifest.json", "model.onnx"}
    back = fxopt.load(work / "folder")
    assert torch.equal(back(X), fast(X))
    assert back.report.outcome == fast.report.outcome and back.ledger == fast.ledger


@pytest.mark.parametrize("kind", ["dict", "pair"])
def test_a_folder_keeps_the_structure_of_the_call(work: Path, kind: str) -> None:
    """Where it is plain: a class of the user's is not saved, and then inputs and outputs are flat."""
    inputs = {"x": [X, X], "scale": torch.ones(1)}
    fast = fxopt.optimize(Structured(kind).eval(), "a100", example_inputs=inputs, passes=[])
    fast.save(work / "folder")
    back = fxopt.load(work / "folder")
    with pytest.warns(UserWarning, match="running the reference"):
        expected = fast(**inputs)
    with pytest.warns(UserWarning, match="running the reference"):
        found = back(**inputs) if kind == "dict" else back(X, X, torch.ones(1))
    same(found, expected if kind == "dict" else (expected.sum, *expected.rest.values()))


def test_a_folder_is_as_readable_as_any_other(fast: fxopt.Optimized, work: Path) -> None:
    (work / "usual").mkdir()
    fast.save(work / "folder")
    assert (work / "folder").stat().st_mode == (work / "usual").stat().st_mode


def test_a_result_replaces_an_earlier_one(fast: fxopt.Optimized, work: Path) -> None:
    for name in ("folder", "file.onnx"):
        fast.save(work / name)
        fast.save(work / name)
    assert sorted(path.name for path in work.iterdir()) == ["file.onnx", "folder"]
    assert torch.equal(fxopt.load(work / "folder")(X), fast(X))


def test_a_folder_with_other_content_is_not_touched(fast: fxopt.Optimized, work: Path) -> None:
    (work / "mine").mkdir()
    (work / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="mine is a folder with other content; give an empty or a new one"):
        fast.save(work / "mine")
    assert (work / "mine" / "thesis.txt").read_text() == "precious"


def test_an_earlier_result_with_a_file_of_the_user_is_not_touched(fast: fxopt.Optimized, work: Path) -> None:
    fast.save(work / "folder")
    (work / "folder" / "notes.txt").write_text("precious")
    with pytest.raises(OutputError, match="folder with other content"):
        fast.save(work / "folder")
    assert (work / "folder" / "notes.txt").read_text() == "precious"


def test_an_empty_folder_is_filled(fast: fxopt.Optimized, work: Path) -> None:
    (work / "empty").mkdir()
    fast.save(work / "empty")
    assert (work / "empty" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("missing/out.onnx", OutputError, "the folder .*missing does not exist"),
        ("missing/out", OutputError, "the folder .*missing does not exist"),
        ("out.pt", Unsupported, r"out\.pt: results are written as \.onnx, or as a folder"),
        ("file", OutputError, "file is a file; give the name of a folder"),
        ("folder.onnx", OutputError, "folder.onnx is a folder; give the name of a file"),
    ],
)
def test_paths_that_cannot_be_written(
    fast: fxopt.Optimized, work: Path, path: str, error: type[Exception], message: str
) -> None:
    (work / "file").write_text("x")
    (work / "folder.onnx").mkdir()
    with pytest.raises(error, match=message):
        fast.save(work / path)
    assert sorted(entry.name for entry in work.iterdir()) == ["file", "folder.onnx"]


def test_a_failure_half_way_leaves_the_old_result(
    fast: fxopt.Optimized, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast.save(work / "folder")
    before = digest(work / "folder" / "model.onnx")

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        fast.save(work / "folder")
    assert [path.name for path in work.iterdir()] == ["folder"] and digest(work / "folder" / "model.onnx") == before


def test_what_cannot_be_loaded(work: Path) -> None:
    with pytest.raises(InvalidModel, match="no such file or folder"):
        fxopt.load(work / "nothing")
    with pytest.raises(InvalidModel, match=r"holds no manifest\.json"):
        fxopt.load(work)
    (work / "manifest.json").write_text("{")
    with pytest.raises(InvalidModel, match="is not JSON"):
        fxopt.load(work)
    for content in ("[]", "3", '{"format": 99}', "{}"):
        (work / "manifest.json").write_text(content)
        with pytest.raises(InvalidModel, match="this version reads format 1"):
            fxopt.load(work)
    (work / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(InvalidModel, match="manifest.json.* lacks 'graph'"):
        fxopt.load(work)
    (work / "manifest.json").write_text('{"format": 1, "graph": "onnx", "report": {}, "ledger": {}}')
    with pytest.raises(InvalidModel):
        fxopt.load(work)


def test_a_model_with_weights_beside_it(work: Path) -> None:
    onnx.save(mlp(64, 64), work / "in.onnx", save_as_external_data=True, location="in.weights", size_threshold=0)
    fast = fxopt.optimize(work / "in.onnx", passes=[])
    (work / "out").mkdir()
    fast.save(work / "out" / "out.onnx")
    assert {path.name for path in (work / "out").iterdir()} == {"out.onnx", "out.onnx.data"}
    x = torch.ones(2, 64)
    assert torch.equal(fxopt.load(work / "out" / "out.onnx")(x), fast(x))
    fast.save(work / "folder")
    assert torch.equal(fxopt.load(work / "folder")(x), fast(x))


# ---- capture, explain, predict


def test_capture() -> None:
    assert fxopt.capture(mlp()).origin == "onnx"
    graph = fxopt.capture(Net().eval(), (X,))
    assert graph.origin == "torch" and "aten.linear.default" in {str(node.target) for node in graph.calls()}
    assert torch.equal(graph.run([X])[0], Net()(X))


def test_explain_runs_nothing_of_the_backend(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxopt.backends.onnxruntime.session as session

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("explain started a session")

    monkeypatch.setattr(session, "make_session", forbidden)
    ledger = fxopt.explain(model_file, calibration="random")
    assert {"fc1", "fc2"} <= {row.node for row in ledger.select(pass_name="quantize-linear")}
    assert all(row.reason for row in ledger.verdicts)
    ledger = fxopt.explain(model_file, "a100")
    assert "no data to measure the budget" in next(iter(ledger.select(node="fc1"))).reason


def test_explain_a_module() -> None:
    ledger = fxopt.explain(Net(), "a100", example_inputs=(X,), passes=["quantize-linear"])
    assert {row.pass_name for row in ledger.verdicts} >= {"quantize-linear"}
    with pytest.raises(fxopt.FxoptError, match="example_inputs"):
        fxopt.explain(Net(), "a100")


@pytest.mark.parametrize("target", ["host", "a100", "h100", "x86-avx512-vnni"])
def test_predict(target: str) -> None:
    found = fxopt.predict(mlp(), target, input_shapes={"x": (8, 16)})
    assert found.macs == 8 * (16 * 32 + 32 * 8)
    assert [row.node for row in found.rows] == ["fc1", "act", "fc2"]
    assert found.weight_bytes == 4 * (16 * 32 + 32 + 32 * 8 + 8)
    assert 0 < found.total.low < found.total.seconds < found.total.high
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    larger = fxopt.predict(mlp(), target, input_shapes={"x": (800, 16)})
    assert larger.macs == 100 * found.macs and larger.total.seconds > found.total.seconds


def test_predict_a_module_and_a_graph() -> None:
    graph = fxopt.capture(Net().eval(), (X,))
    assert (
        fxopt.predict(graph, "a100").macs == fxopt.predict(Net(), "a100", example_inputs=(X,)).macs == 4 * 2 * 16 * 32
    )


# ---- compare and bench


def perturbed(noise: float) -> onnx.ModelProto:
    """The perceptron with a disturbed second bias."""
    model = mlp()
    for tensor in model.graph.initializer:
        if tensor.name == "b2":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(noise), "b2"))
    return model


def test_compare_with_itself(model_file: Path) -> None:
    found = fxopt.compare(model_file, mlp(), threads=1, seconds=0.2)
    assert found.error.noise_to_signal == 0 and found.error.cosine == 1
    assert found.low <= found.ratio <= found.high and found.a_seconds > 0 and found.b_seconds > 0
    assert found.bursts >= 3 and found.samples == 16


def test_compare_finds_the_difference(model_file: Path) -> None:
    data = [torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = fxopt.compare(model_file, perturbed(0.01), data, threads=1, seconds=0.1)
    outputs = torch.cat([fxopt.optimize(model_file, passes=[])(x) for x in data]).double()
    expected = 1e-4 * outputs.numel() / (outputs - outputs.mean()).square().sum().item()
    assert found.error.noise_to_signal == pytest.approx(expected, rel=1e-2) and found.samples == 3


def test_compare_takes_results_and_notes_random_data(model_file: Path) -> None:
    fast = fxopt.optimize(model_file, passes=[])
    found = fxopt.compare(fast, model_file, threads=1, seconds=0.1)
    assert any("random" in note for note in found.notes)
    with pytest.raises(Unsupported, match="compare takes paths, ModelProtos and results of optimize, not Net"):
        fxopt.compare(Net(), model_file)


def test_compare_refuses_other_signatures(model_file: Path) -> None:
    other = mlp()
    for node in other.graph.node:
        for index, name in enumerate(node.input):
            if name == "x":
                node.input[index] = "z"
    other.graph.input[0].name = "z"
    with pytest.raises(InvalidInput, match=re.escape("the models take different inputs: ['x'] and ['z']")):
        fxopt.compare(model_file, other)
    more = mlp()
    more.graph.output.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["batch", 32]))
    with pytest.raises(InvalidInput, match="the models have 1 and 2 outputs"):
        fxopt.compare(model_file, more)
    with pytest.raises(
        InvalidInput, match="the second model does not take the data: input 'x' has shape .*16.*, expected .*8"
    ):
        fxopt.compare(model_file, mlp(8), seconds=0.1)


def test_bench(model_file: Path) -> None:
    found = fxopt.bench([model_file, mlp(16, 2048), model_file], threads=1, seconds=0.3, input_shapes={"x": (64, 16)})
    assert [row.model for row in found] == [str(model_file), "model 1", f"{model_file} (2)"]
    assert found[0].ratio == 1 and found[1].ratio < 1 and found[1].median > found[0].median
    assert all(0 < row.minimum <= row.median and row.bursts >= 3 for row in found)
    with pytest.raises(InvalidInput, match="bench needs at least one model"):
        fxopt.bench([])


# ---- shapes from outside, old opsets, unknown domains


def old_model(opset: int = 11, domain: str = "") -> onnx.ModelProto:
    """x [n, 64] -> Gemm -> y, or an operator of another domain behind it."""
    random = np.random.default_rng(0)
    weight = (random.standard_normal((64, 64)) / 8).astype(np.float32)
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")]
    if domain:
        nodes.append(onnx.helper.make_node("Unknown", ["y"], ["z"], name="odd", domain=domain))
    info = onnx.helper.make_tensor_value_info
    body = onnx.helper.make_graph(
        nodes,
        "old",
        [info("x", onnx.TensorProto.FLOAT, ["n", 64])],
        [info("z" if domain else "y", onnx.TensorProto.FLOAT, ["n", 64])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", opset)] + ([onnx.helper.make_opsetid(domain, 1)] if domain else [])
    return onnx.helper.make_model(body, opset_imports=opsets, ir_version=8)


def test_an_old_model_is_brought_to_an_opset_that_can_be_quantised(work: Path) -> None:
    batches = [{"x": torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))} for seed in range(4)]
    found = fxopt.optimize(
        old_model(), calibration=batches, passes=["quantize-linear{activations=dynamic,smooth=off}"], force=True,
        objective="size",
    )  # fmt: skip
    assert any("converted from opset 11 to 13" in note for note in found.ledger.notes)
    assert [row.outcome for row in found.ledger.select(pass_name="quantize-linear")] == ["applied"]
    found.save(work / "new.onnx")
    made = onnx.load(work / "new.onnx")
    assert {entry.domain: entry.version for entry in made.opset_import}[""] == 13
    assert found.report.error is not None and 0 < found.report.error.noise_to_signal < 0.02
    unchanged = fxopt.optimize(old_model(), calibration=batches, passes=[])
    unchanged.save(work / "same.onnx")
    assert onnx.load(work / "same.onnx") == old_model()


def test_operators_of_unknown_domains_are_kept_and_said() -> None:
    model = old_model(20, "vendor.example")
    graph = fxopt.capture(model)
    from fxopt.frontends.onnx import foreign_operators

    assert foreign_operators(graph) == (
        "operators of domains that fxopt does not know are kept as they are: vendor.example.Unknown"
    )
    assert foreign_operators(fxopt.capture(old_model(20))) == ""


def test_names_of_dimensions_from_outside() -> None:
    found = fxopt.optimize(
        old_model(20), calibration="random", input_shapes={"x": ("rows", 64)}, passes=["remove-identities"]
    )
    assert found.graph.inputs[0].shape == ("rows", 64)
    sized = fxopt.optimize(
        old_model(20), calibration="random", input_shapes={"x": (5, 64)}, passes=["remove-identities"]
    )
    assert sized.graph.inputs[0].shape == ("n", 64) and sized.graph.sizes["n"] == 5


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 16)], "input_shapes is a list; expected shapes by input"),
        ({"x": "1,16"}, "input_shapes: 'x' has '1,16'; expected a tuple"),
        ({"x": (0, 16)}, "input_shapes: 'x' has a size of 0; expected 1 or more"),
        ({"x": (1 << 62, 16)}, "input_shapes: 'x' has 73786976294838206464 elements; expected at most"),
    ],
)
def test_input_shapes_that_are_none(shapes: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        fxopt.optimize(mlp(), input_shapes=shapes)


def test_one_dimension_has_one_size() -> None:
    two = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[n, 8] a, float[n, 8] b) => (float[n, 8] y) { y = Add (a, b) }'
    )
    with pytest.raises(InvalidInput, match="--input-shape b: dimension 'n' of the model is 2 by another shape, not 3"):
        fxopt.predict(two, input_shapes={"a": (2, 8), "b": (3, 8)})
