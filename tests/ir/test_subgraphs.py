"""Bodies are graphs: enumerated, copied, verified, typed, hashed, written as text, optimised and exported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import fx

from fxopt.errors import GraphSyntaxError, PassError, VerificationError
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph, label, shape_of
from fxopt.ir.onnx.export import save, to_model
from fxopt.ir.shapes import infer
from fxopt.ir.structural_hash import first_difference, structural_hash
from fxopt.ir.subgraphs import Subgraph
from fxopt.ir.text import constants_of, from_text, load_text, run_file, save_text, to_text
from fxopt.ir.verify import NumericCheck, verify_structure
from fxopt.passes.base import Context, ExactPass
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import exact_pipeline
from tests.onnx import flows
from tests.passes.helpers import context

ALL = {name: getattr(flows, name) for name in ("CAPTURING", "COUNTING", "WHILE", "SCANNING", "NESTED", "CALLING")}

FIVE = "{\n  [five] five = Constant <value = int64 {5}> ()\n"
FIVE_TIMES = flows.COUNTING.replace("(steps, yes, x)", "(five, yes, x)").replace("{\n", FIVE, 1)


def graph_of(text: str) -> Graph:
    graph = load(flows.model(text))
    infer(graph, {"n": 4})
    return graph


def body(graph: Graph, path: str) -> Graph:
    return {found.path: found.graph for found in graph.subgraphs()}[path]


def node(graph: Graph, name: str) -> fx.Node:
    found = graph.find(name)
    assert found is not None
    return found


def optimised(graph: Graph, *sample: Any) -> Context:
    ctx = context()
    PassManager(exact_pipeline()).run(graph, ctx, NumericCheck.of(graph, sample))
    return ctx


# ---- structure


def test_bodies_are_found_from_outside_to_inside() -> None:
    paths = [found.path for found in graph_of(flows.NESTED).subgraphs()]
    inner = [f"outer/then_branch/inner/{name}_branch" for name in ("then", "else")]
    assert paths == ["outer/then_branch", *inner, "outer/else_branch"]
    assert [found.path for found in graph_of(flows.NESTED).subgraphs(recursive=False)] == [paths[0], paths[3]]


def test_captures_are_the_last_inputs_of_a_body() -> None:
    inside = body(graph_of(flows.COUNTING), "loop/body")
    assert [spec.name for spec in inside.inputs] == ["i", "go", "a", "x"]
    assert inside.captures == ("x",)


def test_functions_are_no_bodies() -> None:
    assert list(graph_of(flows.CALLING).subgraphs()) == []


def test_a_copy_has_bodies_of_its_own() -> None:
    graph = graph_of(flows.CAPTURING)
    before, copied = to_model(graph), graph.copy()
    inside = body(copied, "choose/then_branch")
    two = node(inside, "two")
    double = node(inside, "double")
    double.args = (double.args[0], double.args[0])
    inside.erase(two)
    assert to_model(graph) == before
    assert to_model(copied) != before


def test_constants_of_bodies_count() -> None:
    assert graph_of(flows.CAPTURING).size_bytes() == 4


# ---- verification


def broken(change: str) -> Graph:
    graph = graph_of(flows.NESTED)
    inside = body(graph, "outer/then_branch/inner/else_branch")
    if change == "order":
        flat = node(inside, "flat")
        later = inside.call(flat.target, flat.args, before=inside.output, made_by="test")
        flat.args = (later,)
    elif change == "capture":
        node(graph, "outer").update_kwarg("_captured_names", ("d", "z"))
    else:
        inside.inputs = ()
        inside.captures = ()
    return graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("order", "outer/then_branch: inner/else_branch: node 'flat' uses .* not computed before it"),
        ("capture", r"captures \['x'\], which node 'outer' lacks"),
        ("signature", "inner/else_branch: 1 input nodes; the signature has 0"),
    ],
)
def test_verification_enters_bodies(change: str, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_structure(broken(change))


# ---- types


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        (flows.CAPTURING, {"choose": "4|2, 3"}),
        (flows.NESTED, {"outer": "2"}),
        (flows.WHILE, {"loop": "1"}),
        (flows.SCANNING, {"end": "2", "sums": "2, 4"}),
        (flows.COUNTING, {"last": "2", "all_1": None}),
        (FIVE_TIMES, {"all_1": "5, 2"}),
    ],
)
def test_types_follow_from_bodies(text: str, shapes: dict[str, str | None]) -> None:
    graph = graph_of(text)
    for name, expected in shapes.items():
        shape = shape_of(node(graph, name))
        assert (None if shape is None else ", ".join(map(str, shape))) == expected


def test_an_unknown_type_has_a_reason() -> None:
    assert node(graph_of(flows.COUNTING), "loop").meta["unknown"] == "the number of iterations depends on data"
    text = flows.CAPTURING.replace("t = Mul(s, two)", "t = Concat <axis = 0> (s, s)")
    text = text.replace("float[n, 3] y", "float[m, 3] y")
    choose = node(graph_of(text.replace("(float[n, 3] t)", "(float[m, 3] t)")), "choose")
    assert shape_of(choose) is None
    assert choose.meta["unknown"] == "the branches give different types"


def test_a_carried_value_that_grows_has_no_type() -> None:
    text = flows.COUNTING.replace("b = Add(a, f)", "b = Concat <axis = 0> (a, a)")
    for old, new in (
        ("e = Mul(b, x)", "e = Identity(x)"),
        ("float[2] last", "float[m] last"),
        ("float[2] b", "float[q] b"),
        ("float[2] a)", "float[p] a)"),
    ):
        text = text.replace(old, new)
    graph = graph_of(text)
    assert shape_of(node(graph, "last")) is None
    assert shape_of(node(body(graph, "loop/body"), "step")) is None


# ---- hash and text


def test_hashes_see_bodies_but_no_names() -> None:
    one = graph_of(flows.CAPTURING)
    renamed = flows.CAPTURING.replace(" s = ", " S = ").replace("(s", "(S").replace(", s)", ", S)")
    assert "Mul(S, two)" in renamed
    assert structural_hash(one) == structural_hash(graph_of(renamed))
    other = graph_of(flows.CAPTURING.replace("Add(one, one)", "Sub(one, one)"))
    assert structural_hash(one) != structural_hash(other)
    assert first_difference(one, other).startswith("then_branch of operator 2, operator")


def test_hashes_see_what_is_captured() -> None:
    other = flows.CAPTURING.replace("i = Identity(x)", "i = Identity(s)").replace("Add(i, s)", "Add(i, x)")
    assert structural_hash(graph_of(flows.CAPTURING)) != structural_hash(graph_of(other))


@pytest.mark.parametrize("name", ALL)
def test_text_round_trip(name: str, tmp_path: Path) -> None:
    graph = graph_of(ALL[name])
    read = from_text(to_text(graph), constants_of(graph))
    assert structural_hash(read) == structural_hash(graph)
    assert to_text(read).count("@graph") == to_text(graph).count("@graph")
    save_text(graph, tmp_path)
    assert structural_hash(load_text(tmp_path)) == structural_hash(graph)


@pytest.mark.parametrize("name", ["CAPTURING", "COUNTING", "CALLING"])
def test_an_edited_text_runs_as_python(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = graph_of(ALL[name])
    path = save_text(graph, tmp_path)
    path.write_text(path.read_text().replace("    return", "    print('edited')\n    return"))
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": "edited"}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    results = run_file(namespace["main"], path, [])
    assert "edited" in capsys.readouterr().out
    assert len(results) == len(graph.outputs)


def _inputs(graph: Graph) -> list[torch.Tensor]:
    made = []
    for spec in graph.inputs:
        assert spec.dtype is not None
        assert spec.shape is not None
        made.append(torch.ones([dim if isinstance(dim, int) else 2 for dim in spec.shape]).to(spec.dtype))
    return made


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("subgraph(\"c_choose_else_branch\", body_2)", "subgraph(\"c_choose_else_branch\", body_1)", "no other constant"),
        ("subgraph(\"c_choose_else_branch\", body_2)", "subgraph(\"c_choose_else_branch\", body_7)", "a function above"),
        ('captures=["s"]', 'captures=["s", "t"]', "2 captures of 1 inputs"),
        ('captures=["s"]', "captures=7", "expected a list of names"),
        ("def body_2", "def helper", "a text holds one function, main"),
        ('const("c_choose_then_branch.c_one")', 'const("c_one")', "is not among"),
    ],
)  # fmt: skip
def test_texts_of_another_form_are_refused(old: str, new: str, message: str) -> None:
    graph = graph_of(flows.CAPTURING)
    text = to_text(graph)
    assert old in text
    with pytest.raises(GraphSyntaxError, match=message):
        from_text(text.replace(old, new), constants_of(graph))


# ---- passes and export


def test_exact_passes_enter_bodies_and_say_where() -> None:
    graph = graph_of(flows.CAPTURING)
    ctx = optimised(graph, torch.tensor(True), torch.randn(4, 3), torch.randn(3))
    then, other = body(graph, "choose/then_branch"), body(graph, "choose/else_branch")
    assert [label(call) for call in then.calls()] == ["double"]
    assert [label(call) for call in other.calls()] == ["again"]
    assert [label(call) for call in graph.calls()] == ["scale", "choose"]  # nothing crossed the boundary
    rows = {(row.pass_name, row.node) for row in ctx.ledger.verdicts}
    assert ("remove-identities", "choose/else_branch/same") in rows
    assert ("eliminate-dead-code", "choose/then_branch/unused") in rows


def test_untouched_nodes_of_a_changed_body_stay_as_they_were() -> None:
    model = flows.model(flows.CAPTURING)
    graph = graph_of(flows.CAPTURING)
    optimised(graph, torch.tensor(True), torch.randn(4, 3), torch.randn(3))
    made = to_model(graph)
    onnx.checker.check_model(made, full_check=True)
    before, after = (proto.graph.node[1].attribute[0].g for proto in (model, made))
    assert [item.name for item in after.node] == ["double"]
    assert after.node[0].name == before.node[3].name
    assert after.output == before.output
    assert made.graph.node[0] == model.graph.node[0]


def test_captures_that_no_body_needs_are_dropped_with_what_computed_them() -> None:
    text = flows.CAPTURING.replace("t = Mul(s, two)", "t = Mul(x, two)").replace("e = Add(i, s)", "e = Identity(i)")
    text = text.replace("Neg(s)", "Neg(x)").replace("[one] one", "[dead] d = Neg(s)\n [one] one")
    graph = graph_of(text)
    optimised(graph, torch.tensor(True), torch.randn(4, 3), torch.randn(3))
    assert [label(call) for call in graph.calls()] == ["choose"]
    assert node(graph, "choose").kwargs["_captured_names"] == ("x",)


@pytest.mark.parametrize("name", ALL)
def test_optimised_models_compute_the_same_in_onnxruntime(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    graph = graph_of(ALL[name])
    sample = _inputs(graph)
    optimised(graph, *sample)
    save(graph, tmp_path / "out.onnx")
    feeds = {spec.name: np.asarray(value) for spec, value in zip(graph.inputs, sample, strict=True)}
    before = runtime.InferenceSession(flows.model(ALL[name]).SerializeToString()).run(None, feeds)
    after = runtime.InferenceSession(tmp_path / "out.onnx").run(None, feeds)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


class Break(ExactPass):
    """Breaks bodies only."""

    enters_bodies = True

    def run(self, graph: Graph, ctx: Context) -> int:
        if not ctx.where:
            return 0
        raise ValueError("broken")


def test_an_error_of_a_pass_names_the_body() -> None:
    with pytest.raises(PassError, match="break failed in loop/body after"):
        PassManager([Break()]).run(graph_of(flows.COUNTING), context())


class Swap(ExactPass):
    """Takes the wrong operand in every body."""

    enters_bodies = True

    def run(self, graph: Graph, ctx: Context) -> int:
        found = graph.find("double")
        if found is None or found.args[0] is found.args[1]:
            return 0
        found.args = (found.args[0], found.args[0])
        return 1


def test_a_pass_that_changes_what_a_body_computes_is_found() -> None:
    graph = graph_of(flows.CAPTURING)
    check = NumericCheck.of(graph, [torch.tensor(True), torch.randn(4, 3), torch.randn(3)])
    with pytest.raises(VerificationError, match="pass swap .*changed what the model computes"):
        PassManager([*exact_pipeline(), Swap()]).run(graph, context(), check)


def test_exclusion_sees_the_path() -> None:
    graph = graph_of(flows.CAPTURING)
    ctx = context(exclude=re.compile("^choose/else_branch/"))
    PassManager(exact_pipeline()).run(graph, ctx)
    assert [label(call) for call in body(graph, "choose/else_branch").calls()] == ["same", "again"]


def test_large_weights_in_bodies_are_written_once(tmp_path: Path) -> None:
    text = """
    main (bool c, float[64, 64] x) => (float[64, 64] y) {
      [if] y = If (c) <
        then_branch = then () => (float[64, 64] t) <float[64, 64] w> { [product] t = MatMul(x, w) },
        else_branch = other () => (float[64, 64] e) { [same] e = Identity(x) }>
    }
    """
    proto = onnx.parser.parse_model(flows.HEADER + text.replace("<float[64, 64] w>", ""))
    then = next(item for item in proto.graph.node[0].attribute if item.name == "then_branch").g
    then.initializer.append(onnx.numpy_helper.from_array(np.eye(64, dtype=np.float32), "w"))
    graph = load(proto)
    found: Subgraph = next(graph.subgraphs())
    assert found.graph.size_bytes() == 64 * 64 * 4
    assert to_model(graph) == proto
    save(graph, tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == proto
    record = next(item for item in found.graph.nodes if item.op == "get_attr").meta["onnx"]
    assert record.stripped
    assert not node(graph, "if").meta["onnx"].proto.attribute[0].g.initializer
