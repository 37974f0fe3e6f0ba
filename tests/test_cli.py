"""What the commands print and write, and their exit codes."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import fxopt
from fxopt.cli.explain import _check_matches
from fxopt.cli.options import budget_from, shapes_from
from fxopt.cli.progress import ProgressReporter
from fxopt.cli.run import with_command
from fxopt.errors import InvalidOption, UnknownName
from fxopt.ir.ledger import Ledger, Verdict
from tests.conftest import ROOT, mlp

Cli = Callable[..., Any]
QUICK = ("--guard-seconds", "0.2")
COMMANDS = (
    "optimize",
    "inspect",
    "explain",
    "compare",
    "bench",
    "convert",
    "predict",
    "passes",
    "targets",
    "backends",
    "ops",
)


def outputs(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


@pytest.fixture
def calibration(work: Path) -> Path:
    path = work / "data.npz"
    np.savez(path, x=np.random.default_rng(1).standard_normal((16, 16)).astype(np.float32))
    return path


# ---- arguments


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["model.onnx", "-o", "out.onnx"], ["optimize", "model.onnx", "-o", "out.onnx"]),
        (["-o", "out.onnx", "model.onnx"], ["optimize", "-o", "out.onnx", "model.onnx"]),
        (["--debug", "dir/model"], ["optimize", "--debug", "dir/model"]),
        (["optimize", "model.onnx"], ["optimize", "model.onnx"]),
        (["optimise", "model.onnx"], ["optimise", "model.onnx"]),
        (["model.onxn"], ["optimize", "model.onxn"]),
        (["."], ["optimize", "."]),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_optimize_is_the_default_command(given: list[str], expected: list[str]) -> None:
    assert with_command(given) == expected


def test_budget_and_shapes() -> None:
    assert budget_from("0.1") == 0.1 and budget_from("none") is None
    assert shapes_from(["x:1,3,224,224", "scope/y:0:[2]"]) == {"x": (1, 3, 224, 224), "scope/y:0": (2,)}
    assert shapes_from([]) is None
    assert shapes_from(["ids:batch,128", "mask:?,128"]) == {"ids": ("batch", 128), "mask": (None, 128)}
    for wrong, message in (("x", "NAME:DIMENSIONS"), (":1", "NAME:DIMENSIONS"), ("x:0", "1 or more"), ("x:1,-", "'-'")):
        with pytest.raises(InvalidOption, match=message):
            shapes_from([wrong])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_json_and_debug(cli: Cli, command: str) -> None:
    ran = cli(command, "--help")
    assert ran.code == 0
    assert "--json" in ran.out and "--debug" in ran.out


def test_version(cli: Cli) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cli("--version").out == f"fxopt {project['version']}\n"


# ---- lists


@pytest.mark.parametrize("command", ["passes", "targets", "backends", "ops"])
def test_lists(cli: Cli, work: Path, command: str) -> None:
    shown = cli(command, "--json", work / "list.json")
    assert shown.code == 0
    rows = json.loads((work / "list.json").read_text())
    assert rows
    for row in rows:
        assert row["name"] in shown.text.replace(" ", "") or row["name"] in shown.text
    assert json.loads(cli(command, "--json", "-").out) == rows


def test_ops_with_a_torch_definition(cli: Cli) -> None:
    assert {"domain": "ai.onnx", "name": "Relu"} in json.loads(cli("ops", "--onnx", "--json", "-").out)


# ---- optimize


def test_optimize_writes_a_model_that_computes_the_same(cli: Cli, model_file: Path, work: Path) -> None:
    ran = cli(model_file, "-o", work / "out.onnx", *QUICK)
    assert ran.code == 0, ran.err
    for row in ("operators", "weights", "multiply-adds", "predicted time"):
        assert row in ran.text
    assert f"written: {work}/out.onnx" in ran.text.replace(" ", "").replace("written:", "written: ")
    onnx.checker.check_model(work / "out.onnx", full_check=True)
    x = np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32)
    np.testing.assert_allclose(outputs(work / "out.onnx", x), outputs(model_file, x), rtol=1e-5, atol=1e-6)
    assert [path.name for path in work.iterdir()] == ["out.onnx"]


def test_optimize_json_and_html(cli: Cli, model_file: Path, work: Path, calibration: Path) -> None:
    ran = cli(
        "optimize", model_file, "--calibration", calibration, "--json", "-", "--report", work / "r.html",
        "--guard_seconds", "0.2", "--input_shape", "x:4,16",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    data = json.loads(ran.out)
    assert data["output"] is None and "give --output" in ran.err
    assert data["report"]["before"]["op_counts"]
    assert data["ledger"]["verdicts"]
    html = (work / "r.html").read_text()
    assert "<table" in html and "http" not in html.split("<body>")[1].split("<script")[0]


def test_without_data_nothing_is_lossy_and_the_reason_is_given(cli: Cli, model_file: Path) -> None:
    ran = cli(model_file, "--json", "-", *QUICK)
    assert ran.code == 0, ran.err
    verdicts = json.loads(ran.out)["ledger"]["verdicts"]
    assert not [row for row in verdicts if row["outcome"] == "applied" and row["error"]]
    assert "--calibration" in ran.err


def test_no_passes_means_no_change(cli: Cli, model_file: Path, work: Path) -> None:
    ran = cli(model_file, "-o", work / "out.onnx", "-p", "none", *QUICK)
    assert ran.code == 0, ran.err
    assert onnx.load(work / "out.onnx").graph == onnx.load(model_file).graph


def test_dry_run_writes_nothing(cli: Cli, model_file: Path, work: Path, calibration: Path) -> None:
    ran = cli("optimize", model_file, "--dry-run", "--calibration", calibration)
    assert ran.code == 0, ran.err
    assert "dry run" in ran.out and list(work.iterdir()) == [calibration]


def test_a_requirement_that_is_not_met_is_exit_code_1_and_writes_nothing(
    cli: Cli, model_file: Path, work: Path
) -> None:
    ran = cli(model_file, "-o", work / "out.onnx", "--require-speedup", "1000", *QUICK)
    assert ran.code == 1, ran.err
    assert "failed: a speed-up of 1000 was required" in ran.text and not list(work.iterdir())


def test_a_required_pass_that_changed_nothing_is_exit_code_1(cli: Cli, model_file: Path, work: Path) -> None:
    ran = cli(model_file, "-o", work / "out.onnx", "--require-pass", "quantize_linear", *QUICK)
    assert ran.code == 1, ran.err
    assert "failed: pass quantize-linear was required and changed nothing" in ran.text and not list(work.iterdir())


def test_evaluate_uses_the_metric(cli: Cli, model_file: Path, work: Path) -> None:
    onnx.save(mlp(features=256, hidden=2048), model_file)
    np.savez(work / "data.npz", x=np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32))
    (work / "metric.py").write_text(
        "import torch\ndef steady(model):\n    y = model(torch.ones(2, 256))\n"
        "    y = y[0] if isinstance(y, (list, tuple)) else y\n    return float(torch.as_tensor(y).sum())\n"
    )
    metric = ("--evaluate", f"{work}/metric.py:steady", "--budget", "1000")
    ran = cli(
        model_file, "--calibration", work / "data.npz", *metric, "--force", "--json", "-", "--input-shape", "x:32,256"
    )
    assert ran.code == 0, ran.err
    error = json.loads(ran.out)["report"]["error"]
    assert error["metric_before"] != error["metric_after"] and "metric" in ran.err


# ---- explain, inspect, predict, compare, bench


def test_explain(cli: Cli, model_file: Path, calibration: Path) -> None:
    ran = cli("explain", model_file, "--calibration", calibration, "--json", "-")
    assert ran.code == 0, ran.err
    assert {"fc1", "fc2"} <= {row["node"] for row in json.loads(ran.out)["verdicts"]}


def test_explain_one_node(cli: Cli, model_file: Path, calibration: Path) -> None:
    ran = cli("explain", model_file, "--node", "^act$", "--calibration", calibration)
    assert ran.code == 0 and "act" in ran.out and "Relu" in ran.out and "fc1" not in ran.out
    ran = cli("explain", model_file, "--node", "fc1", "--pass", "quantize_linear", "--calibration", calibration)
    assert ran.code == 0 and "quantize-linear" in ran.out and "fc2" not in ran.out


def test_explain_a_pass_with_options_for_size(cli: Cli, model_file: Path, calibration: Path) -> None:
    wanted = "sparsify{pattern=4x1,sparsity=0.5}"
    ran = cli("explain", model_file, "-p", wanted, "--objective", "size", "--calibration", calibration, "--json", "-")
    rows = json.loads(ran.out)["verdicts"]
    assert ran.code == 0 and {row["pass_name"] for row in rows} == {"sparsify"}
    assert all(row["setting"].startswith("sparsify{pattern=4x1") for row in rows)
    assert not any("gives no time" in row["reason"] for row in rows)
    ran = cli("explain", model_file, "-p", "sparsify{patern=4x1}")
    assert ran.code == 2 and "unknown option of sparsify 'patern'; did you mean 'pattern'?" in ran.err


def test_explain_a_node_that_a_pass_made(model_file: Path) -> None:
    graph, ledger = fxopt.capture(str(model_file)), Ledger([Verdict("fuse-attention-heads", "attention", "applied", "")])
    for name in ("^attention$", "^fc1$"):
        _check_matches(graph, ledger, re.compile(name))
    with pytest.raises(UnknownName, match="--node atention matches no node: .*did you mean 'attention'"):
        _check_matches(graph, ledger, re.compile("atention"))


def test_inspect(cli: Cli, model_file: Path) -> None:
    ran = cli("inspect", model_file, "--json", "-")
    assert ran.code == 0, ran.err
    assert "fc1" in ran.text and json.loads(ran.out)


def test_predict(cli: Cli, model_file: Path) -> None:
    ran = cli("predict", model_file, "-t", "host", "--json", "-")
    assert ran.code == 0, ran.err
    assert [row["target"] for row in json.loads(ran.out)] == ["host"]


def test_compare_with_itself(cli: Cli, model_file: Path, calibration: Path) -> None:
    ran = cli("compare", model_file, model_file, "--data", calibration, "--json", "-")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)


def test_bench(cli: Cli, model_file: Path) -> None:
    ran = cli("bench", model_file, model_file, "--seconds", "0.2", "--json", "-")
    assert ran.code == 0, ran.err
    assert len(json.loads(ran.out)) == 2


# ---- errors that are ours


def test_an_unexpected_exception_is_reported_as_our_fault(
    cli: Cli, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fxopt

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by accident")

    monkeypatch.setattr(fxopt, "optimize", broken)
    ran = cli(model_file)
    assert ran.code == 2 and "Traceback" not in ran.err
    assert ran.err.startswith("internal error: ZeroDivisionError: by accident") and "--debug" in ran.err
    assert "Traceback" in cli(model_file, "--debug").err


def test_an_interruption_is_no_error(cli: Cli, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxopt

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fxopt, "optimize", interrupted)
    assert cli(model_file).code == 130


# ---- progress


def test_progress_is_silent_for_two_seconds_and_then_prints_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("fxopt.cli.progress.time.monotonic", lambda: clock[0])
    with ProgressReporter() as progress:
        for second in range(30):
            clock[0] = float(second)
            progress("calibrating", second, 30)
        progress("measuring", 1, 0)
    assert capsys.readouterr().err.splitlines() == [
        "calibrating 2/30", "calibrating 12/30", "calibrating 22/30", "measuring",
    ]  # fmt: skip


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("fxopt.cli.progress._PATIENCE", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    import time

    with ProgressReporter() as progress:
        time.sleep(0.3)
        progress("calibrating", 1, 3)
        time.sleep(0.3)
    assert "calibrating" in capsys.readouterr().err


def test_a_state_that_was_not_used_is_said(cli: Cli, model_file: Path, work: Path) -> None:
    ran = cli(model_file, "--resume", work / "state.bin", "--guard-seconds", "0.2")
    assert ran.code == 0 and "nothing was calibrated" in ran.out and "state.bin" in ran.out
    ran = cli(model_file, "--resume", work / "state.bin", "--guard-seconds", "0.2", "--calibration", "random")
    assert ran.code == 0 and "nothing was calibrated" not in ran.out


HOSTILE = "mm[/b]\x1b[31m\n\u202e<script>"
SHOWN = r"mm[/b]\x1b[31m"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("inspect",), 0),
        (("explain", "--calibration", "random"), 0),
        (("optimize", "--dry-run", "--calibration", "random"), 0),
        (("convert", "-o", "OUT", "--opset", "21"), 0),
        (("convert", "-o", "OUT", "--input-shape", "z:1"), 2),
    ],
)
def test_names_cannot_steer_the_terminal(arguments: tuple[str, ...], code: int, work: Path, cli: Cli) -> None:
    """Escapes and marks of direction in a model's names are shown as in Python."""
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 11]> g (float[n, 8] x) => (float[n, 8] y) <float[8, 8] w = {0}>'
        " { m = MatMul (x, w) y = Softmax <axis = 0> (m) }"
    )
    made.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((8, 8), np.float32), "w"))
    for node in made.graph.node:
        node.name = f"{node.op_type}{HOSTILE}"
    made.graph.node[0].input[0] = made.graph.input[0].name = HOSTILE
    path = work / "hostile.onnx"
    onnx.save(made, path)
    command, *rest = [str(work / "out.onnx") if word == "OUT" else word for word in arguments]
    ran = cli(command, path, *rest)
    assert ran.code == code, ran.text
    assert SHOWN in "".join(line.strip() for line in ran.text.splitlines()).replace(" ", "")
    assert not set(ran.text) & {"\x1b", "\u202e"}


def test_inspect_says_what_does_not_fit(work: Path, cli: Cli) -> None:
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18, "acme" : 1]> g (float[2, 3] x, float[4, 5] w) => (float[2, 5] y)'
        " { m = MatMul (x, w) y = acme.Magic (m) }"
    )
    made.graph.node[0].name = "first"
    path = work / "wrong.onnx"
    onnx.save(made, path)
    ran = cli("inspect", path, "--json", work / "said.json")
    assert ran.code == 0, ran.text
    assert "note: node 'first' does not take its inputs: " in ran.text
    assert "note: operators of domains that fxopt does not know are kept as they are: acme.Magic" in ran.text
    assert "note: types do not agree, as ONNX infers them: (op_type:MatMul, node name: first)" in ran.text
    notes = json.loads((work / "said.json").read_text())["notes"]
    assert len(notes) == 3
    ran = cli("convert", path, "-o", work / "newer.onnx", "--opset", "19", "--json", work / "said.json")
    assert ran.code == 0 and "every operator stays what it is" in ran.text
    assert json.loads((work / "said.json").read_text())["notes"] == notes[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "--input-shape", "x:4611686018427387904,16"), "expected at most 35184372088832, more than memory"),
        (("convert", "-o", "OUT", "--input-shape", "x:99999999999999999999,16"), "elements; expected at most"),
        (("optimize", "--calibration", "random", "--input-shape", "x:400000000000,16"), "error: out of memory: "),
    ],
)
def test_absurd_sizes(arguments: tuple[str, ...], message: str, model_file: Path, work: Path, cli: Cli) -> None:
    command, *rest = [str(work / "out.onnx") if word == "OUT" else word for word in arguments]
    ran = cli(command, model_file, *rest)
    assert ran.code == 2 and message in ran.err and "internal" not in ran.err, ran.text


def test_a_model_that_does_not_run(work: Path, cli: Cli) -> None:
    """Sizes that only a run finds wrong, here in every run, are no internal error."""
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[n, 8] x) => (float[a, b] y) '
        "<int64[2] s = {3, 7}> { y = Reshape (x, s) }"
    )
    path = work / "wrong.onnx"
    onnx.save(made, path)
    ran = cli("optimize", path, "--calibration", "random", "--guard-seconds", "0.1")
    assert ran.code == 2 and "error: the model does not run on sample 0 of the data given: RuntimeError: shape" in ran.err
