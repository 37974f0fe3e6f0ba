"""Passes, targets and frontends that are not ours: an installed package, and a file."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper

import fxopt
from fxopt.ir.graph import Graph
from fxopt.passes.base import Candidate, Context, ExactPass, LossyPass, Refusal, Setting
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.testing import assert_neutral, assert_no_worse, assert_refuses, rewritten
from tests.conftest import ROOT, mlp

PACKAGE = ROOT / "tests" / "plugin_package"
NAME = "drop-repeated-activations"
Cli = Callable[..., Any]


def with_two_activations(path: Path) -> Path:
    """The perceptron with its hidden activation twice."""
    model = mlp()
    model.graph.node.insert(2, helper.make_node("Relu", ["a"], ["again"], name="act2"))
    model.graph.node[3].input[0] = "again"
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def activations(path: Path) -> int:
    return [node.op_type for node in onnx.load(path).graph.node].count("Relu")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built and installed into a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "package"
    shutil.copytree(PACKAGE, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run((*pip, "--target", str(target), str(source)), check=True, timeout=300)
    return target


def test_an_installed_pass_is_listed(spawn: Cli, installed: Path) -> None:
    ran = spawn("passes", "--json", "-", path=installed)
    assert ran.code == 0, ran.err
    (row,) = [row for row in json.loads(ran.out) if row["name"] == NAME]
    assert row["package"] == "fxopt-trim" and row["kind"] == "exact"
    assert row["options"] == {"operators": "Relu,Abs,Ceil,Floor,Round,Sign"}


def test_an_installed_pass_is_used(spawn: Cli, installed: Path, work: Path) -> None:
    model = with_two_activations(work / "model.onnx")
    ran = spawn(model, "-p", NAME, "--force", "-o", "out.onnx", "--json", "out.json", path=installed, cwd=work)
    assert ran.code == 0, ran.err
    assert activations(work / "out.onnx") == 1
    report = json.loads((work / "out.json").read_text())["report"]
    assert (NAME, 1) in [(run["name"], run["changes"]) for run in report["pass_runs"]]


def test_an_installed_target_is_used(spawn: Cli, installed: Path, model_file: Path, work: Path) -> None:
    ran = spawn("targets", "--json", "-", path=installed)
    assert "trim-board" in [row["name"] for row in json.loads(ran.out)]
    target = ("--target", "trim_board")
    for arguments in (("inspect", model_file), ("predict", model_file), ("explain", model_file), (model_file,)):
        out = ("-o", work / "out.onnx", "--calibration", "random") if arguments == (model_file,) else ()
        ran = spawn(*arguments, *target, *out, path=installed, cwd=work)
        assert ran.code == 0 and "Traceback" not in ran.err, ran.err
    assert onnx.load(work / "out.onnx").graph.node
    assert "on trim-board, +-" in ran.out + ran.err


def test_an_installed_frontend_is_used(spawn: Cli, installed: Path, work: Path) -> None:
    plain = with_two_activations(work / "model.onnx")
    packed = work / "packed.onnx.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for command in ("inspect", "explain"):
        ran = spawn(command, packed, path=installed, cwd=work)
        assert ran.code == 0, ran.err
    ran = spawn(packed, "-p", "none", "-o", "out.onnx", path=installed, cwd=work)
    assert ran.code == 0, ran.err
    assert onnx.load(work / "out.onnx") == onnx.load(plain)
    ran = spawn(packed, "-o", "other.onnx", cwd=work)
    assert ran.code == 2 and "is not an ONNX model" in ran.err


def test_without_the_package_the_name_is_unknown(cli: Cli, model_file: Path) -> None:
    ran = cli(model_file, "-p", NAME)
    assert ran.code == 2 and f"unknown pass '{NAME}'" in ran.err


@pytest.mark.parametrize(("options", "left"), [("", 1), ("{operators=Relu}", 1), ("{operators=Abs}", 2)])
def test_a_pass_in_a_file_is_used(cli: Cli, work: Path, options: str, left: int) -> None:
    model = with_two_activations(work / "model.onnx")
    file = PACKAGE / "fxopt_trim" / "passes.py"
    ran = cli(model, "-p", f"{file}:DropRepeatedActivations{options}", "--force", "-o", work / "out.onnx")
    assert ran.code == 0, ran.err
    assert activations(work / "out.onnx") == left


# ---- the helpers for authors


@dataclass(frozen=True)
class Twice(ExactPass):
    """Multiply weights by a factor: wrong unless it is 1."""

    factor: float = 2.0

    def run(self, graph: Graph, ctx: Context) -> int:
        for node in list(graph.fx.find_nodes(op="get_attr")):
            value = graph.constant(node)
            assert value is not None
            changed = graph.add_constant(value * self.factor, f"{node.name}_scaled")
            node.replace_all_uses_with(changed)
            graph.erase(node)
        return 1


@dataclass(frozen=True)
class Reluctant(LossyPass):
    """Offer or refuse the first node."""

    refuse: bool = True

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        refusal = Refusal("{} is not a multiple of group {}", 200, 128) if self.refuse else None
        yield Candidate(self.name, "fc1", "fc1", Setting.of(self.name), refusal)


X = torch.linspace(-1, 1, 48).reshape(3, 16)


@pytest.fixture
def graph() -> Graph:
    return fxopt.capture(mlp())


def test_no_worse(graph: Graph) -> None:
    assert_no_worse(graph, rewritten(Twice(1.0), graph), [(X,)])
    with pytest.raises(AssertionError, match="output 'y': error .* against float64, allowed"):
        assert_no_worse(graph, rewritten(Twice(1.0001), graph), [(X,)])


def test_neutral(graph: Graph) -> None:
    assert_neutral(Twice(1.0), graph, [(X,)])
    with pytest.raises(AssertionError, match="is not neutral: output 'y' of sample 0 differs"):
        assert_neutral(Twice(1.0001), graph, [(X,)])


def test_refuses(graph: Graph) -> None:
    assert_refuses(Reluctant(), graph, "200 is not a multiple of group 128")
    with pytest.raises(AssertionError, match="no refusal matches 'something else'"):
        assert_refuses(Reluctant(), graph, "something else")
    with pytest.raises(AssertionError, match="offers to change fc1"):
        assert_refuses(Reluctant(refuse=False), graph, "200")


def test_a_lossy_pass_is_applied_whole(graph: Graph) -> None:
    after = rewritten(QuantizeLinear(), graph, [(X,)])
    assert [str(node.target) for node in after.calls() if "w8a8" in str(node.target)]
    assert not [node for node in graph.calls() if "w8a8" in str(node.target)]
    assert_neutral(QuantizeLinear(bits=None), graph, [(X,)])
