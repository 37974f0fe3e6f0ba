"""Finding components by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fxopt import catalog
from fxopt.errors import InvalidOption, MissingDependency, UnknownName
from fxopt.passes.base import Pass, kebab

OWN_PASS = '''
from __future__ import annotations
from dataclasses import dataclass
from fxopt.passes.base import ExactPass
import neighbour

@dataclass(frozen=True)
class MyPass(ExactPass):
    """Do nothing."""
    level: int = neighbour.LEVEL
    def run(self, graph, ctx): return 0

class Other: ...
def metric(model): return 1.0
number = 3
'''


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_pass.py"
    path.write_text(OWN_PASS)
    (tmp_path / "neighbour.py").write_text("LEVEL = 2\n")
    return path


def with_points(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    made = [EntryPoint(name, value, "fxopt.passes") for name, value in points]
    monkeypatch.setattr(catalog, "entry_points", lambda group: made if group == "fxopt.passes" else [])


def test_every_pass_is_named_like_its_file_and_has_a_docstring_and_defaults() -> None:
    found = catalog.all_passes()
    assert found
    for name, kind in found.items():
        assert kebab(kind.__name__) == name
        assert kind.__module__.split(".")[2] == name.replace("-", "_") or catalog.entries("pass")[name].attribute
        assert (kind.__doc__ or "").split("\n")[0].endswith("."), f"{name} has no one-sentence docstring"
        assert str(kind()) == name


def test_dashes_and_underscores_are_the_same() -> None:
    name = next(iter(catalog.all_passes()))
    assert catalog.find_pass(name) is catalog.find_pass(name.replace("-", "_"))


@pytest.mark.parametrize("kind", ["pass", "target", "backend", "frontend"])
def test_unknown_names_suggest_near_ones(kind: catalog.Kind) -> None:
    known = sorted(catalog.entries(kind))
    assert known
    with pytest.raises(UnknownName, match=f"unknown {kind} .*did you mean .*{known[0]}"):
        catalog.find(kind, known[0] + "x")


@pytest.mark.parametrize("kind", ["target", "backend", "frontend"])
def test_every_component_loads(kind: catalog.Kind) -> None:
    for name in catalog.entries(kind):
        catalog.find_target(name) if kind == "target" else catalog.find(kind, name)


def test_entry_points_add_passes(monkeypatch: pytest.MonkeyPatch, own_file: Path) -> None:
    monkeypatch.syspath_prepend(own_file.parent)
    with_points(monkeypatch, ("my-pass", "my_pass:MyPass"))
    assert str(catalog.pass_from_text("my_pass{level=4}")) == "my-pass{level=4}"
    assert "my-pass" in catalog.all_passes()


def test_a_clash_with_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = next(iter(catalog.all_passes()))
    with_points(monkeypatch, (ours, "elsewhere:Thing"))
    with pytest.raises(InvalidOption, match=f"pass '{ours}' is defined twice, by fxopt .* and by .*elsewhere"):
        catalog.find_pass(ours)


def test_a_clash_between_plug_ins_is_refused_and_a_repetition_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with_points(monkeypatch, ("new-one", "a:NewOne"), ("new_one", "a:NewOne"))
    assert "new-one" in catalog.entries("pass")
    with_points(monkeypatch, ("new-one", "a:NewOne"), ("new-one", "b:NewOne"))
    with pytest.raises(InvalidOption, match=r"defined twice, .*\(a\) and by .*\(b\)"):
        catalog.entries("pass")


def test_broken_plug_ins_are_named(monkeypatch: pytest.MonkeyPatch, own_file: Path) -> None:
    monkeypatch.syspath_prepend(own_file.parent)
    with_points(
        monkeypatch, ("gone", "no_such_module:X"), ("absent", "my_pass:Absent"), ("other", "my_pass:Other"),
        ("misnamed", "my_pass:MyPass"),
    )  # fmt: skip
    with pytest.raises(MissingDependency, match="pass 'gone' .* cannot be imported: .*no_such_module"):
        catalog.find_pass("gone")
    with pytest.raises(InvalidOption, match="my_pass has no Absent"):
        catalog.find_pass("absent")
    with pytest.raises(InvalidOption, match="not a subclass"):
        catalog.find_pass("other")
    with pytest.raises(InvalidOption, match="whose name means 'my-pass'"):
        catalog.find_pass("misnamed")


def test_a_pass_in_a_file(own_file: Path) -> None:
    step = catalog.pass_from_text(f"{own_file}:MyPass{{level=7}}")
    assert isinstance(step, Pass) and str(step) == "my-pass{level=7}"
    assert str(catalog.pass_from_text(f"{own_file}:MyPass")) == "my-pass"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{folder}/absent.py:MyPass", UnknownName, r"absent\.py: no such file"),
        ("{folder}/my_pass.py:MyPas", UnknownName, "defines no 'MyPas'; did you mean 'MyPass'"),
        ("{folder}/my_pass.py:Other", InvalidOption, "Other is not a subclass"),
        ("{folder}/my_pass.py", InvalidOption, r"expected \./file\.py:Class"),
        ("{folder}/my_pass.py:MyPass{{lvel=1}}", UnknownName, "unknown option of my-pass 'lvel'; did you mean 'level'"),
        ("{folder}/my_pass.py:MyPass{{level=high}}", InvalidOption, "level=high is not of type int"),
        ("{folder}/broken.py:MyPass", InvalidOption, r"broken\.py cannot be imported: ZeroDivisionError"),
        ("no such pass", InvalidOption, "expected name or name{option=value"),
    ],
)
def test_wrong_texts(own_file: Path, text: str, error: type[Exception], message: str) -> None:
    (own_file.parent / "broken.py").write_text("1 / 0\n")
    with pytest.raises(error, match=message):
        catalog.pass_from_text(text.format(folder=own_file.parent))


def test_a_metric_in_a_file(own_file: Path) -> None:
    assert catalog.function_from_text(f"{own_file}:metric")(None) == 1.0
    with pytest.raises(InvalidOption, match="number is a int, not a function"):
        catalog.function_from_text(f"{own_file}:number")
    with pytest.raises(InvalidOption, match=r"expected file\.py:function"):
        catalog.function_from_text("metric")


def test_frontends_are_sources_of_models() -> None:
    assert set(catalog.entries("frontend")) == {"fx", "onnx", "torch-export"}
    for name in catalog.entries("frontend"):
        assert callable(catalog.find("frontend", name).load)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def load(model): ...", "frontend 'mine' .* has no function accepts"),
        ("def accepts(model): return True\ndef load(model): return 1", "frontend 'mine' .* loads a int, not a Graph"),
    ],
)
def test_frontends_of_plugins_are_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, message: str
) -> None:
    name = f"frontend_of_{len(code)}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("mine", name, "fxopt.frontends")]
    monkeypatch.setattr(catalog, "entry_points", lambda group: points if group == "fxopt.frontends" else [])
    with pytest.raises(InvalidOption, match=message):
        catalog.read_by_plugin("model.onnx")
