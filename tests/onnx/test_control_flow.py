"""If, Loop, Scan, SequenceMap, FlexAttention, Gradient and functions run in torch, as the specification says."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.backend.test.loader import load_model_tests

from fxopt import onnx_backend
from fxopt.errors import InvalidInput, InvalidModel, MissingReference
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.shapes import infer
from tests.onnx import flows


def run(text: str, *inputs: Any) -> list[Any]:
    """The outputs, of the graph and of a copy; they must be the same bits."""
    graph = load(flows.model(text))
    results, again = graph.run(inputs), graph.copy().run(inputs)
    for one, other in zip(results, again, strict=True):
        assert torch.equal(one, other)
    return results


@pytest.mark.parametrize("choice", [True, False])
def test_if_runs_one_branch_with_captured_values(choice: bool) -> None:
    x, w = torch.randn(4, 3), torch.randn(3)
    (y,) = run(flows.CAPTURING, torch.tensor(choice), x, w)
    assert torch.equal(y, x * w * 2 if choice else x + x * w)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_loop_counts_and_stacks(steps: int) -> None:
    x = torch.tensor([1.0, -2.0])
    last, stacked = run(flows.COUNTING, torch.tensor(steps), x)
    rows, value = [], x
    for step in range(steps):
        value = value + step
        rows.append(value * x)
    assert torch.equal(last, value)
    assert stacked.shape == (steps, 2)
    assert stacked.dtype == torch.float32
    if steps:
        assert torch.equal(stacked, torch.stack(rows))


def test_loop_runs_while_its_condition_holds() -> None:
    assert run(flows.WHILE, torch.tensor([3.0]))[0].tolist() == [192.0]


def test_loop_without_trip_count_and_condition_is_refused() -> None:
    text = flows.WHILE.replace('Loop ("", yes, x)', 'Loop ("", "", x)')
    with pytest.raises(InvalidModel, match="neither a trip count nor a condition"):
        load(flows.model(text)).run([torch.tensor([3.0])])


def test_loop_without_condition_ignores_the_one_of_its_body() -> None:
    text = flows.COUNTING.replace("(steps, yes, x)", '(steps, "", x)').replace("Identity(go)", "Not(go)")
    last, _ = run(text, torch.tensor(4), torch.zeros(2))
    assert last.tolist() == [6.0, 6.0]


def test_elements_of_a_scan_output_must_have_one_shape() -> None:
    text = """
    growing (float[n] x) => (float[m] last, float[k, l] all) {
      [three] n = Constant <value = int64 {3}> ()
      [loop] last, all = Loop (n, "", x) <body = body (int64 i, bool go, float[p] a) => (bool on, float[q] b, float[q] e) {
          [keep] on = Identity(go)
          [longer] b = Concat <axis = 0> (a, a)
          [copy] e = Identity(b)
        }>
    }
    """
    with pytest.raises(InvalidInput, match="shapes"):
        load(flows.model(text)).run([torch.zeros(2)])


def test_scan_axes_and_directions() -> None:
    start, x = torch.tensor([1.0, 2.0]), torch.arange(8.0).reshape(2, 4)
    end, sums = run(flows.SCANNING, start, x)
    states = [start + x[:, 3 - step :].sum(1) for step in range(4)]
    assert torch.equal(end, states[-1])
    assert torch.equal(sums, torch.stack(states[::-1], -1))


def test_scan_of_nothing_gives_its_states_and_empty_outputs() -> None:
    text = flows.SCANNING.replace("float[2, 4]", "float[2, n]")
    end, sums = run(text, torch.tensor([1.0, 2.0]), torch.empty(2, 0))
    assert end.tolist() == [1.0, 2.0]
    assert sums.shape == (2, 0)


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3), seed=st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_scan_of_opset_8_stops_at_each_length(lengths: list[int], seed: int) -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["a", "v"], ["b"]), helper.make_node("Identity", ["b"], ["e"])],
        "body",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "av"],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "be"],
    )
    values = [helper.make_tensor_value_info("lengths", TensorProto.INT64, ["n"])]
    values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("s", "x")]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z")]
    node = helper.make_node("Scan", ["lengths", "s", "x"], ["y", "z"], body=body, num_scan_inputs=1, directions=[1])
    graph = helper.make_graph([node], "main", values, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)])
    start = torch.zeros(len(lengths), 2)
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 9, (len(lengths), 4, 2)).astype(np.float32))
    end, sums = load(model, check=False).run([torch.tensor(lengths), start, x])
    for index, length in enumerate(lengths):
        assert torch.equal(end[index], x[index, :length].sum(0))
        assert torch.equal(sums[index, :length], x[index, :length].flip(0).cumsum(0))
        assert not sums[index, length:].any()


def test_a_sequence_map_needs_sequences_of_one_length() -> None:
    text = """
    mapping (seq(float[n]) a, seq(float[n]) b) => (seq(float[n]) c) {
      [map] c = SequenceMap (a, b) <body = body (float[n] x, float[n] y) => (float[n] z) { [add] z = Add(x, y) }>
    }
    """
    graph = load(flows.model(text))
    one, two = torch.ones(2), torch.full((3,), 2.0)
    (found,) = graph.run([[one, two], [one, two]])
    assert [item.tolist() for item in found] == [[2, 2], [4, 4, 4]]
    assert graph.run([[], []]) == [[]]
    with pytest.raises(InvalidInput, match=r"\[1, 2\] items"):
        graph.run([[one, two], [one]])


def test_functions_run_with_the_attributes_of_each_call() -> None:
    y, z = run(flows.CALLING, torch.tensor([1.0, -1.0]))
    assert y.tolist() == [3.0, -3.0]
    assert z.tolist() == [2.0, -2.0]


def test_a_function_is_imported_once() -> None:
    graph = load(flows.model(flows.CALLING))
    assert len([node for node in graph.nodes if node.op == "get_attr"]) == 1


def test_bodies_in_functions_see_its_attributes() -> None:
    text = """
    main (bool c, float[2] x) => (float[2] y) { [call] y = my.pick <by = 5.0> (x, c) }
    <domain: "my", opset_import: ["" : 21]>
    pick <by> (v, c) => (r) {
      r = If (c) <
        then_branch = then () => (float[2] t) { f = Constant <value_float: float = @by> () t = Mul(v, f) },
        else_branch = other () => (float[2] e) { e = Neg(v) }>
    }
    """
    assert run(text, torch.tensor(True), torch.ones(2))[0].tolist() == [5.0, 5.0]
    assert run(text, torch.tensor(False), torch.ones(2))[0].tolist() == [-1.0, -1.0]


def test_overloads_are_different_functions() -> None:
    def function(overload: str, op_type: str) -> onnx.FunctionProto:
        node = helper.make_node(op_type, ["v"], ["r"])
        opsets = [helper.make_opsetid("", 21)]
        return helper.make_function("my", "f", ["v"], ["r"], [node], opsets, [], overload=overload)

    nodes = [helper.make_node("f", ["x"], [name], domain="my", overload=name) for name in ("neg", "abs")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "neg", "abs")]
    graph = helper.make_graph(nodes, "main", values[:1], values[1:])
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("my", 1)],
        functions=[function("neg", "Neg"), function("abs", "Abs")],
        ir_version=10,
    )
    negated, absolute = load(model).run([torch.tensor([1.0, -2.0])])
    assert negated.tolist() == [-1.0, 2.0]
    assert absolute.tolist() == [1.0, 2.0]


def test_recursive_functions_are_refused() -> None:
    text = """
    main (float[2] x) => (float[2] y) { [call] y = my.a (x) }
    <domain: "my", opset_import: ["" : 21, "my" : 1]>
    a (v) => (r) { r = my.b (v) }
    <domain: "my", opset_import: ["" : 21, "my" : 1]>
    b (v) => (r) { r = my.a (v) }
    """
    with pytest.raises(InvalidModel, match="calls itself: my::a -> my::b -> my::a"):
        load(onnx.parser.parse_model(flows.HEADER + text), check=False)


def chain(length: int) -> onnx.ModelProto:
    """A call of a function that calls a function that ..., inside an If."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("my", 1)]
    functions = []
    for level in range(length):
        last = level == length - 1
        node = helper.make_node("Neg" if last else f"f{level + 1}", ["v"], ["r"], domain="" if last else "my")
        functions.append(helper.make_function("my", f"f{level}", ["v"], ["r"], [node], opsets, []))
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    call = helper.make_node("f0", ["x"], ["y"], domain="my")
    branch = helper.make_graph([call], "branch", [], [value])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    inputs = [helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]))
    graph = helper.make_graph([node], "main", inputs, [value])
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def test_deep_calls_run_and_too_deep_ones_are_a_clear_error() -> None:
    (y,) = load(chain(59), check=False).run([torch.tensor(True), torch.ones(2)])
    assert y.tolist() == [-1.0, -1.0]
    with pytest.raises(InvalidModel, match="'f59' is inside 60 sub-graphs and functions"):
        load(chain(500), check=False)


def test_an_operator_without_reference_runs_through_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt.ir.onnx import registry

    found = registry.lookup
    monkeypatch.setattr(
        registry, "lookup", lambda domain, name: None if name == "ThresholdedRelu" else found(domain, name)
    )
    text = """
    main (float[3] x) => (float[3] y, float[3] z) {
      [given] y = ThresholdedRelu <alpha = 2.0> (x)
      [default] z = ThresholdedRelu (x)
    }
    """
    y, z = run(text, torch.tensor([-1.0, 1.5, 3.0]))
    assert y.tolist() == [0.0, 0.0, 3.0]
    assert z.tolist() == [0.0, 1.5, 3.0]


def test_errors_in_bodies_name_every_node() -> None:
    text = flows.NESTED.replace("Neg(x)", "my.vendor(x)")
    with pytest.raises(MissingReference, match="'outer'.*'inner'.*'flat'.*vendor"):
        load(flows.model(text)).run([torch.tensor(True), torch.tensor(False), torch.ones(2)])


def nested(depth: int) -> onnx.ModelProto:
    """If in If in If, this deep; built from outside to inside, since messages of this depth cannot be copied."""
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    inputs = [helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]))
    model = helper.make_model(helper.make_graph([], "main", inputs, [value]), ir_version=10)
    graph = model.graph
    for level in range(depth):
        node = graph.node.add(op_type="If", name=f"if {level}", input=["c"], output=["y"])
        for name in ("else_branch", "then_branch"):
            graph = node.attribute.add(name=name, type=onnx.AttributeProto.GRAPH).g
            graph.name = f"level {level}"
            graph.output.add().CopyFrom(value)
            if name == "else_branch" or level == depth - 1:
                graph.node.add(op_type="Identity", input=["x"], output=["y"])
    return model


def test_thirty_nested_bodies_run() -> None:
    assert load(nested(30), check=False).run([torch.tensor(True), torch.ones(2)])[0].tolist() == [1, 1]


@pytest.mark.parametrize("depth", [31, 1000])
def test_too_deep_nesting_is_a_clear_error(depth: int) -> None:
    with pytest.raises(InvalidModel, match="30 nested sub-graphs"):
        load(nested(depth))


def test_too_deep_files_are_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "deep.onnx"
    path.write_bytes(deep_bytes(1000))
    with pytest.raises(InvalidModel, match="nested too deeply"):
        load(path)


def deep_bytes(depth: int) -> bytes:
    """The bytes of a model with this many nested graphs, which protobuf itself writes no more."""

    def field(number: int, content: bytes) -> bytes:
        length, size = b"", len(content)
        while size > 127:
            length, size = length + bytes([size % 128 + 128]), size // 128
        return bytes([number * 8 + 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(depth):
        attribute = field(1, b"then_branch") + field(6, graph) + bytes([20 * 8 % 128 + 128, 1, 5])
        graph = field(1, field(4, b"If") + field(5, attribute))
    return bytes([8, 10]) + field(7, graph)


def differentiated(xs: list[str], zs: list[str], second: bool = False) -> Graph:
    """The derivatives of y = a * a * b, and of the first of them by `a`."""
    nodes = [helper.make_node("Mul", ["a", "a"], ["s"]), helper.make_node("Mul", ["s", "b"], ["y"])]
    names = [f"d{name}" for name in xs]
    options: dict[str, Any] = {"xs": xs, "y": "y", "domain": "ai.onnx.preview.training"}
    if zs:
        options["zs"] = zs
    nodes.append(helper.make_node("Gradient", [*xs, *zs], names, **options))
    if second:
        options["y"] = "da"
        nodes.append(helper.make_node("Gradient", [*xs, *zs], [f"d{name}" for name in names], **options))
        names += [f"d{name}" for name in names]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in (*"ab", *names)]
    graph = helper.make_graph(nodes, "main", values[:2], values[2:])
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("ai.onnx.preview.training", 1)]
    return load(helper.make_model(graph, opset_imports=opsets, ir_version=8), check=False)


def test_gradient() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert torch.equal(differentiated(["a"], ["b"]).run([a, b])[0], 2 * a * b)
    first, second = differentiated(["a", "b"], []).run([a, b])
    assert torch.equal(first, 2 * a * b)
    assert torch.equal(second, a * a)


def test_gradient_of_a_gradient() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert torch.equal(differentiated(["a"], ["b"], second=True).run([a, b])[1], 2 * b)


def test_gradient_by_too_little_is_refused() -> None:
    with pytest.raises(InvalidModel, match="depends on 'b', which is in neither xs nor zs"):
        differentiated(["a"], [])


def test_the_last_case_of_the_suite() -> None:
    """`test_loop16_seq_none`: the suite itself cannot compare the scalar in its expected sequence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = next(case for case in load_model_tests(kind="node") if case.name == "test_loop16_seq_none")
    assert case.data_sets is not None
    for inputs, expected in case.data_sets:
        prepared = onnx_backend.prepare(case.model)
        (found,) = prepared.run(inputs)
        assert not prepared.fallback_nodes
        assert len(found) == len(expected[0])
        for one, other in zip(found, expected[0], strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


def test_nothing_of_onnx_evaluates() -> None:
    """A run imports neither ONNX's reference evaluator nor ONNX Runtime."""
    script = (
        "import sys, torch\n"
        "from tests.onnx import flows\n"
        "from fxopt.frontends.onnx import load\n"
        "load(flows.model(flows.COUNTING)).run([torch.tensor(3), torch.ones(2)])\n"
        "load(flows.model(flows.CALLING)).run([torch.ones(2)])\n"
        "assert not {'onnx.reference', 'onnxruntime'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_types_of_a_scan_that_scans_more_than_it_takes() -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["a", "v"], ["b"]), helper.make_node("Identity", ["b"], ["e"])],
        "body",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "av"],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "be"],
    )
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, 2]) for name in ("s", "x")]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "z")]
    node = helper.make_node("Scan", ["s", "x"], ["y", "z"], body=body, num_scan_inputs=4)
    main = helper.make_graph([node], "main", values, results)
    graph = load(helper.make_model(main, opset_imports=[helper.make_opsetid("", 17)]), check=False)
    infer(graph)
    (scan,) = graph.calls()
    assert "num_scan_inputs=4" in str(scan.meta)
