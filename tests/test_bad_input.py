"""Wrong input: one clear message, exit code 2, no traceback, nothing written, the input untouched.

The last part is about calibration data that are right.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import fx

import fxopt
from fxopt.calibration import load
from fxopt.errors import InvalidInput, InvalidOption
from fxopt.ir.graph import Graph, ValueSpec
from tests.conftest import digest, mlp

Cli = Callable[..., Any]
PROGRESS = re.compile(r"warning: |[a-z ]+( \d+/\d+)?$")  # what a slow machine prints before the message
QUICK = ("--guard-seconds", "0.2")


def assert_refused(ran: Any, message: str) -> None:
    assert ran.code == 2, ran.out + ran.err
    assert "Traceback" not in ran.err and "internal error" not in ran.err
    lines = [line for line in ran.err.splitlines() if line and not PROGRESS.match(line)]
    assert lines[0].startswith("error: ") and len(lines) <= 2, ran.err
    assert len(lines) == 1 or lines[1].startswith("Try 'fxopt"), ran.err
    assert re.search(message, lines[0]), ran.err


def everything(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_reference_itself_is_accepted(cli: Cli, model_file: Path, work: Path) -> None:
    assert cli(model_file, "-o", work / "out.onnx", *QUICK).code == 0


# ---- models


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _random(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(4096))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _unchecked(path: Path) -> None:
    model = mlp()
    model.graph.node[0].op_type = "NoSuchOperator"
    path.write_bytes(model.SerializeToString())


def _unsorted(path: Path) -> None:
    model = mlp()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    path.write_bytes(model.SerializeToString())


def _text(path: Path) -> None:
    path.write_text("weights, biases and dreams\n" * 40)


def _no_external_data(path: Path) -> None:
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.data", size_threshold=0)
    path.with_name("model.data").unlink()


@pytest.mark.parametrize("command", ["optimize", "inspect", "explain", "predict", "bench"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"model\.onnx: no such file"),
        (_truncated, r"model\.onnx is not an ONNX model, or is truncated"),
        (_random, r"model\.onnx is not an ONNX model"),
        (_empty, r"model\.onnx is not an ONNX model"),
        (_text, r"model\.onnx is not an ONNX model"),
        (_unchecked, r"model\.onnx is not a valid ONNX model; the ONNX checker says: .*NoSuchOperator"),
        (_unsorted, r"model\.onnx: node .fc2. .*must be sorted"),
        (_no_external_data, r"model\.data"),
    ],
)
def test_models(
    cli: Cli, model_file: Path, work: Path, command: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(model_file)
    before = everything(model_file.parent)
    output = ("-o", work / "out.onnx") if command == "optimize" else ()
    assert_refused(cli(command, model_file, *output), message)
    assert everything(model_file.parent) == before and not everything(work)


def test_a_folder_is_no_model(cli: Cli, model_file: Path) -> None:
    assert_refused(cli("optimize", model_file.parent), "is a folder; expected an ONNX model file")


def test_a_missing_model_suggests_its_neighbours(cli: Cli, model_file: Path) -> None:
    assert_refused(
        cli(model_file.with_name("modle.onnx")), r"no such file; expected an ONNX model; there is model\.onnx"
    )


# ---- names and options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "hots"), "unknown target 'hots'; did you mean .*'host'"),
        (("--backend", "onnxruntme"), "unknown backend 'onnxruntme'; did you mean 'onnxruntime'"),
        (("-p", "quantize-linaer"), "unknown pass 'quantize-linaer'; did you mean 'quantize-linear'"),
        (("-p", "quantize-linear{bit=8}"), "unknown option of quantize-linear 'bit'; did you mean 'bits'"),
        (("-p", "quantize-linear{bits=7}"), "quantize-linear: bits=7; expected"),
        (("-p", "quantize-linear{bits}"), "'bits' is not of the form option=value"),
        (("-p", "quantize-linear{"), "expected name or name{option=value"),
        (("-p", "./absent.py:MyPass"), r"absent\.py: no such file"),
        (("--require-pass", "quantise-linear"), "unknown pass 'quantise-linear'; did you mean 'quantize-linear'"),
        (("--targt", "host"), "No such option: --targt.*--target"),
        (("--energy", "1"), "No such option: --energy"),
        (("--budget", "-1"), "--budget -1: expected a number"),
        (("--budget", "some"), "--budget some: expected a number"),
        (("--objective", "speed"), "(?i)objective.*speed.*latency"),
        (("--threads", "0"), "--threads 0: expected 1 or more"),
        (("--input-shape", "x=1"), "--input-shape x=1: expected NAME:DIMENSIONS"),
        (("--input-shape", "z:1,16", "--calibration", "random"), "unknown input 'z'"),
        (("--exclude", "nothing_like_this"), r"unknown node \(no node matches --exclude\) 'nothing_like_this'"),
        (("--include", "fc3"), r"unknown node \(no node matches --include\) 'fc3'; did you mean .*fc1"),
        (("--exclude", "["), r"exclude='\[' is not a regular expression"),
        (("--evaluate", "metric"), "'metric': expected file.py:function"),
        (("--evaluate", "absent.py:metric"), r"absent\.py: no such file"),
        (("--evaluate", "{metrics}:broken", "--calibration", "random", "--force"), "broken failed: ZeroDivisionError"),
        (("--evaluate", "{metrics}:nothing", "--calibration", "random", "--force"), "nothing gave NaN"),
        (("--evaluate", "{metrics}:brokn"), "defines no 'brokn'; did you mean 'broken'"),
        (("--dry-run", "-o", "x.onnx"), "--dry-run .* writes nothing; leave --output out"),
        (("--dry-run", "--report", "x.html"), "--dry-run .* writes nothing; leave --report out"),
        (("-o", "x.txt"), "--output x.txt: expected a name that ends in .onnx"),
        (("--dump", "{metrics}"), "--dump .* is a file; expected a folder"),
        (("second.onnx",), "(?i)unexpected extra argument.*second.*one model at a time, so run it for each"),
        (("--weights", "extern"), "'--weights': 'extern' is not one of 'embedded', 'external'"),
    ],
)
def test_options(
    cli: Cli, model_file: Path, work: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(work)
    metrics = model_file.with_name("metrics.py")
    metrics.write_text("def broken(model): 1 / 0\ndef nothing(model): return float('nan')\n")
    onnx.save(mlp(features=256, hidden=2048), model_file)
    assert_refused(
        cli("optimize", model_file, *(text.replace("{metrics}", str(metrics)) for text in arguments)), message
    )
    assert not everything(work)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", "MODEL", "--node", "fc7"), "--node fc7 matches no node: .*did you mean .*fc1"),
        (("explain", "MODEL", "--pass", "quantize"), "unknown pass 'quantize'; did you mean"),
        (("predict", "MODEL", "--target", "a101"), "unknown target 'a101'; did you mean .*a100"),
        (("inspect", "MODEL", "--target", "nowhere"), "unknown target 'nowhere'"),
        (("compare", "MODEL", "other.onnx"), r"other\.onnx: no such file"),
        (("compare", "MODEL"), "(?i)missing argument"),
        (("bench",), "(?i)missing argument"),
        (("optimise", "MODEL"), "No such command 'optimise'. Did you mean 'optimize'"),
    ],
)
def test_commands(cli: Cli, model_file: Path, arguments: tuple[str, ...], message: str) -> None:
    given = [str(model_file) if argument == "MODEL" else argument for argument in arguments]
    assert_refused(cli(*given), message)


def test_the_environment(cli: Cli, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_THREADS", "many")
    assert_refused(cli(model_file), "FXOPT_THREADS=many: expected a number of threads")


# ---- calibration


def _npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


X = np.zeros((4, 16), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": X}, "unknown model input 'X'; did you mean 'x'|unknown model input 'X'. Known: x"),
        ({"x": X, "mask": X}, "unknown model input 'mask'"),
        ({}, r"model input x: float32\[batch, 16\] is missing"),
        ({"x": X[:, :8]}, r"input 'x' has shape \[1, 8\], expected \[batch, 16\]"),
        ({"x": X[:, :, None]}, r"input 'x' has shape \[16, 1\], expected \[batch, 16\]"),
        ({"x": X.astype(np.int64)}, "input 'x' has element type int64, expected float32"),
        ({"x": X[:0]}, r"'x' has shape \[0, 16\]; expected samples"),
        ({"x": np.full((4, 16), np.nan, np.float32)}, "input 'x' holds NaN"),
        ({"x": np.full((4, 16), "a")}, "input 'x' has element type <U1"),
        ({"x": np.array([[object()]])}, r"data\.npz cannot be read"),
    ],
)
def test_calibration(cli: Cli, model_file: Path, work: Path, arrays: dict[str, Any], message: str) -> None:
    data = _npz(work / "data.npz", **arrays)
    before = everything(work)
    assert_refused(cli(model_file, "--calibration", data, "-o", work / "out.onnx"), message)
    assert everything(work) == before


def test_calibration_files(cli: Cli, model_file: Path, work: Path) -> None:
    assert_refused(cli(model_file, "--calibration", work / "absent.npz"), r"absent\.npz: no such file")
    assert_refused(cli(model_file, "--calibration", "randm"), r"a folder or 'random'; did you mean 'random'\?")
    assert_refused(cli(model_file, "--calibration", work), "the folder holds no .npz, .npy, .jsonl or .json files")
    (work / "data.txt").write_text("1 2 3")
    assert_refused(
        cli(model_file, "--calibration", work / "data.txt"), r"expected an \.npz, \.npy, \.jsonl or \.json file"
    )
    (work / "data.npz").write_bytes(b"PK\x03\x04 no archive")
    assert_refused(cli(model_file, "--calibration", work / "data.npz"), r"data\.npz cannot be read")


# ---- outputs


@pytest.mark.parametrize("option", ["--output", "--report", "--json"])
def test_outputs(cli: Cli, model_file: Path, work: Path, option: str) -> None:
    (work / "folder").mkdir()
    (work / "folder" / "mine.txt").touch()
    reason = " with other content; give an empty or a new one" if option == "--output" else "; give the name"
    assert_refused(cli("optimize", model_file, option, work / "folder"), f"{option} .*folder is a folder{reason}")
    assert_refused(cli("optimize", model_file, option, work / "no" / "x.onnx"), "the folder .*no does not exist")
    assert list(everything(work)) == ["folder/mine.txt"]


def test_the_input_is_not_overwritten(cli: Cli, model_file: Path) -> None:
    before = digest(model_file)
    assert_refused(cli(model_file, "-o", model_file), "is the input, which is never changed")
    link = model_file.with_name("link.onnx")
    link.hardlink_to(model_file)
    assert_refused(cli(model_file, "-o", link), "is the input, which is never changed")
    assert digest(model_file) == before


def test_a_folder_without_permission(cli: Cli, model_file: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    assert_refused(cli(model_file, "-o", work / "out.onnx"), "permission denied")


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a file system of 64 KiB; where none can be mounted, one in which every large write fails."""
    folder = tmp_path / "full"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.is_relative_to(folder) and len(data) > 65536:
            write_bytes(path, data[:65536])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    yield folder


def test_a_full_disk(cli: Cli, model_file: Path, full_disk: Path) -> None:
    onnx.save(mlp(hidden=4096), model_file)
    before = digest(model_file)
    (full_disk / "out.onnx").write_bytes(b"an older result")
    ran = cli(model_file, "-o", full_disk / "out.onnx", *QUICK)
    assert_refused(ran, "out.onnx cannot be written: No space left on device")
    assert digest(model_file) == before
    assert [path.name for path in full_disk.iterdir()] == ["out.onnx"]
    assert (full_disk / "out.onnx").read_bytes() == b"an older result"


def test_a_report_that_cannot_be_written_leaves_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.cli.output import write_text
    from fxopt.errors import OutputError

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"r\.html cannot be written: No space left on device"):
        write_text(work / "r.html", "text")
    assert not list(work.iterdir())


# ---- the real thing, in a process of its own


def test_in_a_process(spawn: Cli, model_file: Path, work: Path) -> None:
    _truncated(model_file)
    before = digest(model_file)
    ran = spawn(model_file, "-o", work / "out.onnx", cwd=work)
    assert_refused(ran, "is not an ONNX model, or is truncated")
    assert not ran.out and digest(model_file) == before and not everything(work)
    assert "Traceback" in spawn(model_file, "--debug", cwd=work).err


def test_strings_cannot_be_calibrated(cli: Cli, model_file: Path, work: Path) -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("Identity", ["x"], ["y"], name="same")
    body = helper.make_graph([node], "s", [value("x", TensorProto.STRING, [2])], [value("y", TensorProto.STRING, [2])])
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), model_file)
    assert_refused(cli(model_file, "--calibration", "random"), "input 'x' is not a tensor of numbers")


# ---- calibration data that the model cannot take, or that say little


def _looks_up(moved: bool) -> Graph:
    """A table of five rows, indexed by `ids`, whose shape changes on the way where `moved`."""
    graph = graph_of(spec("ids", torch.int64, "batch", "seq"))
    table = graph.add_constant(torch.zeros(5, 2), "table")
    (ids,) = graph.placeholders
    if moved:
        ids = graph.call(torch.ops.aten.view.default, (ids, [-1]), before=graph.output, made_by="test")
        ids = graph.call(torch.ops.aten.unsqueeze.default, (ids, 0), before=graph.output, made_by="test")
    graph.call(torch.ops.aten.embedding.default, (table, ids), before=graph.output, made_by="test")
    return graph


@pytest.mark.parametrize("moved", [False, True])
def test_indices_outside_of_the_table(moved: bool) -> None:
    assert load([np.array([[0, 4]])], _looks_up(moved), warn=quiet)
    with pytest.raises(InvalidInput, match="'ids' holds integers from 1 to 5, and the table .* has 5 rows"):
        load([np.array([[0, 4]]), np.array([[1, 5]])], _looks_up(moved), warn=quiet)
    assert load("random", _looks_up(moved), warn=quiet)[0]["ids"].max() > 1


def test_a_sample_on_which_the_model_fails() -> None:
    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(10, 16))
            self.linear = torch.nn.Linear(16, 16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.linear(self.table[ids * 2])

    good, bad = torch.full((4,), 3), torch.full((4,), 7)
    with pytest.raises(InvalidInput, match="the model does not run on sample 1 of the data given: IndexError: .*14"):
        fxopt.optimize(Doubled().eval(), example_inputs=(good,), calibration=[good, bad, good], guard_seconds=0.1)


def test_data_that_say_little_are_said() -> None:
    said: list[str] = []
    load([np.zeros((2, 3)), np.zeros((4, 3))], IMAGE, warn=said.append)
    assert said == [
        "calibration: every value of input 'x' is 0: ranges and errors found with it may hold for nothing else"
    ]
    said.clear()
    load([np.eye(3), np.eye(3)], IMAGE, warn=said.append)
    assert len(said) == 1 and said[0].startswith("calibration: all 2 samples are equal: the error is measured on what")
    said.clear()
    load([np.eye(3), 2 * np.eye(3)], IMAGE, warn=said.append)
    load([(np.array([[1, 2]]), np.array([[True, True]])), (np.array([[1, 3]]), np.array([[True, True]]))], PAIR)
    assert not said


# ---- calibration data that are accepted


def spec(name: str, dtype: torch.dtype | None, *shape: int | str | None) -> ValueSpec:
    return ValueSpec(name, dtype, shape)


def graph_of(*inputs: ValueSpec) -> Graph:
    """A graph that returns its inputs."""
    nodes = fx.Graph()
    nodes.output(tuple(nodes.placeholder(value.name) for value in inputs))
    return Graph(nodes, torch.nn.Module(), "torch", inputs, inputs)


IMAGE = graph_of(spec("x", torch.float32, "batch", 3))
PAIR = graph_of(spec("ids", torch.int64, "batch", "seq"), spec("mask", torch.bool, "batch", "seq"))


def quiet(_: str) -> None:
    pass


def test_an_npz_is_cut_into_batches(work: Path) -> None:
    data = _npz(work / "d.npz", x=np.arange(15, dtype=np.float32).reshape(5, 3))
    batches = load(data, IMAGE, batch_size=2)
    assert [batch["x"].tolist() for batch in batches] == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert len(load(str(data), IMAGE)) == 5 and len(load(data, IMAGE, samples=3)) == 3


def test_a_fixed_batch_is_filled_and_rows_without_one_are_whole_inputs(work: Path) -> None:
    data = _npz(work / "d.npz", x=np.zeros((6, 3)))
    assert [tuple(b["x"].shape) for b in load(data, graph_of(spec("x", torch.float32, 2, 3)))] == [(2, 3)] * 3
    assert [tuple(b["x"].shape) for b in load(data, graph_of(spec("x", torch.float32, 3)))] == [(3,)] * 6
    with pytest.raises(InvalidInput, match="6 samples do not fill one batch of 8"):
        load(data, graph_of(spec("x", torch.float32, 8, 3)))


def test_folders_of_files(work: Path) -> None:
    for name in ("a", "b"):
        np.save(work / f"{name}.npy", np.zeros((2, 3), np.float32))
    assert len(load(work, IMAGE)) == 4
    for file in work.iterdir():
        file.unlink()
    np.save(work / "ids.npy", np.zeros((2, 4), np.int64))
    np.save(work / "mask.npy", np.ones((2, 4), bool))
    assert [sorted(batch) for batch in load(work, PAIR)] == [["ids", "mask"]] * 2


@pytest.mark.parametrize(
    "item", [{"ids": [[1, 2]], "mask": [[True, False]]}, (torch.tensor([[1, 2]]), np.array([[True, False]]))]
)
def test_iterables_of_batches(item: object) -> None:
    (batch,) = load(iter([item]), PAIR)
    assert batch["ids"].tolist() == [[1, 2]] and batch["mask"].dtype == torch.bool


def test_safe_conversions_are_made() -> None:
    (batch,) = load([np.zeros((1, 3))], IMAGE)
    assert batch["x"].dtype == torch.float32
    (batch,) = load([(np.zeros((1, 2), np.uint8), np.zeros((1, 2), bool))], PAIR)
    assert batch["ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("source", "graph", "message"),
    [
        ([], IMAGE, "gave no batches"),
        (torch.zeros(1, 3), IMAGE, "put a single batch into a list"),
        (3, IMAGE, "expected a path, .* or an iterable of batches, got a int"),
        ([(torch.zeros(1, 3), torch.zeros(1))], IMAGE, "batch 0 has 2 values, the model takes 1: .*leave labels out"),
        ([{"x": torch.zeros(1, 3)}, {"y": torch.zeros(1, 3)}], IMAGE, "batch 1: unknown model input 'y'"),
        ([{"ids": [[1]], "mask": [[True, True]]}], PAIR, "'mask' has seq=2, but input 'ids' has seq=1"),
        ([{"ids": [[1]]}], PAIR, r"the model input mask: bool\[batch, seq\] is missing; given: ids"),
        ([np.full((1, 2), 300)], graph_of(spec("b", torch.uint8, "n", 2)), "element type int64, expected uint8; some"),
        ([{"x": [[1, 2], [3]]}], IMAGE, "input 'x' is not an array"),
    ],
)
def test_iterables_that_do_not_fit(source: Any, graph: Graph, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        load(source, graph)


def test_random_data_are_seeded_and_stay_below_what_is_looked_up() -> None:
    graph = graph_of(spec("ids", torch.int64, "batch", "seq"), spec("x", torch.float16, "batch", "seq", 4))
    table = graph.add_constant(torch.zeros(5, 2), "table")
    graph.call(torch.ops.aten.embedding.default, (table, graph.placeholders[0]), before=graph.output, made_by="test")
    said: list[str] = []
    first = load("random", graph, samples=4, batch_size=3, warn=said.append)
    again = load("random", graph, samples=4, batch_size=3, warn=quiet)
    assert all(
        torch.equal(a["ids"], b["ids"]) and torch.equal(a["x"], b["x"]) for a, b in zip(first, again, strict=True)
    )
    assert (
        first[0]["ids"].shape == (3, 16) and first[0]["x"].shape == (3, 16, 4) and first[0]["x"].dtype == torch.float16
    )
    assert set(torch.cat([batch["ids"].flatten() for batch in first]).tolist()) == {0, 1, 2, 3, 4}
    assert "input 'ids': random integers from 0 to 4 (rows of the table that it indexes)" in said
    assert not torch.equal(load("random", graph, seed=1, warn=quiet)[0]["ids"], first[0]["ids"])
    (batch, *_) = load("random", graph, input_shapes={"ids": (2, 7)}, warn=quiet)
    assert batch["x"].shape == (2, 7, 4)


def test_random_shapes_must_fit() -> None:
    with pytest.raises(InvalidOption, match="unknown model input 'z'"):
        load("random", IMAGE, input_shapes={"z": (1, 3)}, warn=quiet)
    with pytest.raises(InvalidOption, match=r"input shape of 'x' has shape \[1, 4\], expected \[batch, 3\]"):
        load("random", IMAGE, input_shapes={"x": (1, 4)}, warn=quiet)
    with pytest.raises(InvalidInput, match="has no shape; give --input-shape x:1"):
        load("random", graph_of(ValueSpec("x", torch.float32, None)), warn=quiet)


def test_threads_of_code_that_runs_on_one() -> None:
    with pytest.raises(InvalidOption, match="threads=2; code for cortex-a76 runs on one thread: leave it out"):
        fxopt.optimize(torch.nn.Linear(4, 4), "cortex-a76", example_inputs=(torch.zeros(1, 4),), threads=2)

