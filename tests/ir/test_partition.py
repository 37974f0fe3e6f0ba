"""Partition by capability, dominators, regions, critical paths, and tied dimensions."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx
import onnx
import onnx.helper as oh
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxopt.errors import InvalidInput
from fxopt.ir import shapes
from fxopt.ir.graph import Graph, ValueSpec
from fxopt.ir.ledger import Refusal
from fxopt.ir.partition import (
    critical_path,
    dominators,
    extract,
    immediate_dominators,
    partition,
    run_partitioned,
    single_entry_single_exit,
    to_networkx,
)
from fxopt.ir.tied import tied_dimensions

aten = torch.ops.aten
SLOW = ("encoder", "bert", "gpt2", "llama", "vit")
SPEC = ValueSpec("x", torch.float32, (3, 4))


def named(graph: Graph, *names: str) -> list[fx.Node]:
    found = [graph.find(name) for name in names]
    assert None not in found
    return found  # type: ignore[return-value]


def refuse(*targets: Any) -> Callable[[fx.Node], str]:
    return lambda node: f"{node.target} is not supported" if node.target in targets else ""


def torch_graph(build: Callable[[fx.Graph, fx.Node, Callable[[str, torch.Tensor], fx.Node]], Any]) -> Graph:
    """A graph over one float32[3, 4] input, its types inferred."""
    body, root = fx.Graph(), torch.nn.Module()
    x = body.placeholder("x")

    def weight(name: str, value: torch.Tensor) -> fx.Node:
        root.register_buffer(name, value)
        return body.create_node("get_attr", name, name=name)

    results = build(body, x, weight)
    body.output(tuple(results) if isinstance(results, (tuple, list)) else (results,))
    graph = Graph(body, root, "torch", (SPEC,), tuple(SPEC for _ in body.output_node().args[0]))  # type: ignore[union-attr]
    mode = shapes.fake_mode(graph)
    x.meta["val"] = mode.from_tensor(torch.empty(3, 4), static_shapes=True)
    shapes.infer(graph)
    return graph


def call(body: fx.Graph, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
    return body.create_node("call_function", target, args, kwargs, name=name)


def diamond() -> Graph:
    """x -> a -> (relu -> left, neg -> right) -> total"""

    def build(body: fx.Graph, x: fx.Node, weight: Any) -> fx.Node:
        a = call(body, aten.mul.Tensor, x, weight("k", torch.ones(4)), name="a")
        left = call(body, aten.relu.default, a, name="left")
        right = call(body, aten.neg.default, a, name="right")
        return call(body, aten.add.Tensor, left, right, name="total")

    return torch_graph(build)


# ---- networkx


def test_to_networkx() -> None:
    graph = diamond()
    found = to_networkx(graph)
    assert nx.is_directed_acyclic_graph(found)
    assert list(found) == list(graph.nodes)
    a, left, total = named(graph, "a", "left", "total")
    assert set(found.successors(a)) == set(a.users) and found.has_edge(left, total)
    assert found.nodes[a]["label"] == "a"


# ---- partition


def check(graph: Graph, refuses: Callable[[fx.Node], str]) -> None:
    """Every operator once, regions in an order that runs, no cycle between them, none that could be merged."""
    parts = partition(graph, refuses)
    work = [node for node in graph.nodes if node.op == "call_function"]
    assert sorted(node for region in parts.regions for node in region.nodes) == sorted(work)
    where = {node: region.index for region in parts.regions for node in region.nodes}
    quotient = nx.DiGraph()
    quotient.add_nodes_from(where.values())
    for node in work:
        if node.target is operator.getitem:
            assert where[node] == where[node.args[0]]  # type: ignore[index]
        for user in node.users:
            if user.op != "output":
                assert where[node] <= where[user]
                quotient.add_edge(where[node], where[user])
    quotient.remove_edges_from(list(nx.selfloop_edges(quotient)))
    assert nx.is_directed_acyclic_graph(quotient)
    for region in parts.regions:
        assert all(
            (node in region.reasons) == (not region.accepted) or node.target is operator.getitem
            for node in region.nodes
        )
        assert all(refuses(node) == reason != "" for node, reason in region.reasons.items())
    closure = nx.transitive_closure(quotient)
    accepted = [region.index for region in parts.regions if region.accepted]
    for first in accepted:
        for second in accepted:
            if first < second:  # merging makes a cycle: a path leads through another region
                assert any(closure.has_edge(first, other) and closure.has_edge(other, second) for other in quotient)


@st.composite
def random_graphs(draw: st.DrawFn) -> Graph:
    count = draw(st.integers(0, 14))

    def build(body: fx.Graph, x: fx.Node, weight: Any) -> list[fx.Node]:
        values = [x, weight("k", torch.ones(3, 4))]
        for _ in range(count):
            a, b = (values[draw(st.integers(0, len(values) - 1))] for _ in range(2))
            kind = draw(st.sampled_from(["add", "relu", "split", "mul"]))
            if kind == "split":
                parts = call(body, aten.split.Tensor, a, 2, 1)
                halves = [call(body, operator.getitem, parts, index) for index in (1, 0)]
                values.append(call(body, aten.cat.default, halves, 1))
            elif kind == "relu":
                values.append(call(body, aten.relu.default, a))
            else:
                values.append(call(body, getattr(aten, kind).Tensor, a, b))
        return [values[draw(st.integers(0, len(values) - 1))] for _ in range(draw(st.integers(1, 3)))]

    return torch_graph(build)


@given(
    random_graphs(), st.sets(st.sampled_from([aten.add.Tensor, aten.relu.default, aten.split.Tensor, aten.cat.default]))
)
@settings(max_examples=60, deadline=None)
def test_partitions_of_random_graphs(graph: Graph, refused: set[Any]) -> None:
    refuses = refuse(*refused)
    check(graph, refuses)
    parts = partition(graph, refuses)
    pieces = [extract(graph, region) for region in parts.regions]
    sample = torch.randn(3, 4)
    results = run_partitioned(graph, parts, [piece.run for piece in pieces], [sample])
    for expected, got in zip(graph.run([sample]), results, strict=True):
        assert torch.equal(expected, got)


def test_everything_accepted_is_one_region_and_everything_refused_too() -> None:
    graph = diamond()
    (only,) = partition(graph, lambda node: "").regions
    assert only.accepted and [node.name for node in only.nodes] == ["a", "left", "right", "total"]
    assert [node.name for node in only.inputs] == ["x"] and [node.name for node in only.outputs] == ["total"]
    (only,) = partition(graph, lambda node: f"no {node.name}").regions
    assert not only.accepted and set(only.reasons.values()) == {"no a", "no left", "no right", "no total"}


def test_a_refused_branch() -> None:
    graph = diamond()
    parts = partition(graph, refuse(aten.neg.default))
    shown = [(region.accepted, [node.name for node in region.nodes]) for region in parts.regions]
    assert shown == [(True, ["a", "left"]), (False, ["right"]), (True, ["total"])]
    first, fallback, last = parts.regions
    assert [node.name for node in first.outputs] == ["a", "left"]
    assert [node.name for node in last.inputs] == ["left", "right"]
    (right,) = named(graph, "right")
    assert fallback.reasons == {right: "aten.neg.default is not supported"}
    assert parts.region_of(right) is fallback
    assert "right" in str(parts) and "aten.neg.default is not supported" in str(parts)


def test_regions_that_do_not_depend_on_each_other_are_one() -> None:
    def build(body: fx.Graph, x: fx.Node, weight: Any) -> fx.Node:
        early = call(body, aten.relu.default, x)
        refused = call(body, aten.neg.default, x)
        late = call(body, aten.relu.default, refused)
        return call(body, aten.add.Tensor, early, late)

    parts = partition(torch_graph(build), refuse(aten.neg.default))
    assert [region.accepted for region in parts.regions] == [False, True]


def test_extract_shares_constants_and_knows_its_signature() -> None:
    graph = diamond()
    parts = partition(graph, refuse(aten.neg.default))
    piece = extract(graph, parts.regions[0])
    assert piece.attribute("k") is graph.attribute("k")
    assert piece.inputs == (ValueSpec("x", torch.float32, (3, 4)),)
    assert [spec.name for spec in piece.outputs] == ["a", "left"]
    assert all(spec.dtype == torch.float32 and spec.shape == (3, 4) for spec in piece.outputs)
    assert [node.name for node in piece.placeholders] == ["x"]
    assert all("val" in node.meta for node in piece.nodes if node.op != "output")


def onnx_graph(refresh: bool = True) -> Graph:
    """(batch, 8) -> Split -> Add -> Shape/Reshape -> Relu, with file names that are no identifiers."""
    from fxopt.frontends.onnx import load

    model = oh.make_model(
        oh.make_graph(
            [
                oh.make_node("Split", ["in.0"], ["s/0", "s/1"], "/Split", axis=1, num_outputs=2),
                oh.make_node("Add", ["s/0", "s/1"], ["sum:0"], "/Add"),
                oh.make_node("Shape", ["sum:0"], ["shape"], "/Shape"),
                oh.make_node("Relu", ["sum:0"], ["act"], "/Relu"),
                oh.make_node("Reshape", ["act", "shape"], ["out"], "/Reshape"),
            ],
            "g",
            [oh.make_tensor_value_info("in.0", onnx.TensorProto.FLOAT, ["batch", 8])],
            [oh.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["batch", 4])],
        ),
        opset_imports=[oh.make_opsetid("", 20)],
    )
    graph = load(model)
    shapes.infer(graph)
    return graph


def test_extract_of_an_onnx_graph_can_be_written_again() -> None:
    from fxopt.ir.onnx.export import to_model

    graph = onnx_graph()
    relu = named(graph, "/Relu")[0].target
    parts = partition(graph, refuse(relu))
    pieces = [extract(graph, region) for region in parts.regions]
    assert [[spec.name for spec in piece.inputs] for piece in pieces] == [["in.0"], ["sum:0"], ["act", "shape"]]
    assert pieces[1].inputs[0] == ValueSpec("sum:0", torch.float32, ("batch", 4))
    assert pieces[2].inputs[1].dtype == torch.int64
    for piece in pieces:
        onnx.checker.check_model(to_model(piece), full_check=True)
    sample = torch.randn(5, 8)
    results = run_partitioned(graph, parts, [piece.run for piece in pieces], [sample])
    assert torch.equal(results[0], graph.run([sample])[0])


def test_run_partitioned_takes_one_runner_per_region() -> None:
    graph = diamond()
    parts = partition(graph, refuse(aten.neg.default))
    with pytest.raises(InvalidInput, match="1 runners for 3 regions"):
        run_partitioned(graph, parts, [lambda values: values], [torch.zeros(3, 4)])
    with pytest.raises(InvalidInput, match="0 inputs"):
        run_partitioned(graph, parts, [lambda values: values] * 3, [])


def test_backends_in_a_row() -> None:
    """What the first refuses is offered to the second, and what that refuses runs in eager."""
    graph = diamond()
    log: list[str] = []

    def runner(piece: Graph, name: str) -> Callable[[Sequence[Any]], Sequence[Any]]:
        return lambda values: log.append(name) or piece.run(values)  # type: ignore[func-returns-value]

    first = partition(graph, refuse(aten.neg.default, aten.relu.default))
    runners = []
    for region in first.regions:
        piece = extract(graph, region)
        if region.accepted:
            runners.append(runner(piece, "first"))
            continue
        inner = partition(piece, refuse(aten.neg.default))
        inner_runners = [runner(extract(piece, part), "second" if part.accepted else "eager") for part in inner.regions]
        runners.append(lambda values, p=piece, i=inner, r=inner_runners: run_partitioned(p, i, r, values))
    sample = torch.randn(3, 4)
    results = run_partitioned(graph, first, runners, [sample])
    assert torch.equal(results[0], graph.run([sample])[0])
    assert sorted(log) == ["eager", "first", "first", "second"]


# ---- dominators, regions, paths


def test_dominators() -> None:
    graph = diamond()
    x, a, left, right, total = named(graph, "x", "a", "left", "right", "total")
    idom = immediate_dominators(graph)
    assert idom == {x: None, a: x, left: a, right: a, total: a}
    assert dominators(graph, total) == [a, x] and dominators(graph, x) == []
    assert dominators(graph, left, post=True) == [total]
    assert immediate_dominators(graph, post=True) == {total: None, left: total, right: total, a: total, x: a}


def test_single_entry_single_exit() -> None:
    graph = diamond()
    x, a, left, right, total = named(graph, "x", "a", "left", "right", "total")
    assert single_entry_single_exit(graph, a, total) == (left, right, total)
    assert single_entry_single_exit(graph, x, total) == (a, left, right, total)
    found = single_entry_single_exit(graph, x, left)
    assert isinstance(found, Refusal) and "a is also used by right" in str(found)
    found = single_entry_single_exit(graph, left, total)
    assert isinstance(found, Refusal) and "total also takes right" in str(found)
    found = single_entry_single_exit(graph, left, right)
    assert isinstance(found, Refusal) and "does not reach" in str(found)


def test_critical_path() -> None:
    graph = diamond()
    a, left, right, total = named(graph, "a", "left", "right", "total")
    weights = {left: 5.0, right: 7.0, a: 1.0, total: 2.0}
    path = critical_path(graph, lambda node: weights.get(node, 0.0))
    assert path.length == 10.0 and [node for node in path.nodes if node in weights] == [a, right, total]
    empty = torch_graph(lambda body, x, weight: x)
    assert critical_path(empty, lambda node: 1.0).length == 0.0


@pytest.mark.slow
def test_large_graphs() -> None:
    body = fx.Graph()
    node = x = body.placeholder("x")
    for index in range(20_000):
        node = call(body, aten.relu.default if index % 10 else aten.neg.default, node) if index % 3 else call(
            body, aten.add.Tensor, node, x)  # fmt: skip
    body.output((node,))
    graph = Graph(body, torch.nn.Module(), "torch", (SPEC,), (SPEC,))
    start = time.process_time()
    parts = partition(graph, refuse(aten.neg.default))
    pieces = [extract(graph, region) for region in parts.regions]
    assert sum(len(list(piece.calls())) for piece in pieces) == 20_000
    immediate_dominators(graph)
    critical_path(graph, lambda node: 1.0)
    tied_dimensions(graph)
    assert time.process_time() - start < 60


# ---- tied dimensions


def group_of(graph: Graph, name: str, axis: int) -> tuple[set[tuple[str, int]], str]:
    (node,) = named(graph, name)
    for group in tied_dimensions(graph):
        if (node, axis) in group.axes:
            return {(member.name, index) for member, index in group.axes}, group.fixed
    raise AssertionError(f"no group holds {name}, {axis}")


def residual_mlp() -> Graph:
    """stem; h = h + down(gelu(up(norm(h)))); head"""

    def build(body: fx.Graph, x: fx.Node, weight: Any) -> fx.Node:
        stem = call(
            body, aten.linear.default, x, weight("w0", torch.randn(6, 4)), weight("b0", torch.randn(6)), name="stem"
        )
        scale, shift = weight("scale", torch.ones(6)), weight("shift", torch.ones(6))
        norm = call(body, aten.layer_norm.default, stem, [6], scale, shift, name="norm")
        up = call(body, aten.linear.default, norm, weight("w1", torch.randn(16, 6)), name="up")
        act = call(body, aten.gelu.default, up, name="act")
        down = call(body, aten.linear.default, act, weight("w2", torch.randn(6, 16)), name="down")
        total = call(body, aten.add.Tensor, stem, down, name="total")
        return call(body, aten.linear.default, total, weight("w3", torch.randn(5, 6)), name="head")

    return torch_graph(build)


def permuted(graph: Graph, axes: set[tuple[str, int]]) -> Graph:
    """The graph with the constants of a group permuted together."""
    copied = graph.copy()
    generator = torch.Generator().manual_seed(0)
    for name, axis in axes:
        (node,) = named(graph, name)
        value = graph.constant(node)
        if value is None:
            continue
        value = copied.attribute(str(node.target))
        order = torch.randperm(value.shape[axis], generator=generator.manual_seed(0))
        *path, last = str(node.target).split(".")
        copied.root.get_submodule(".".join(path)).register_buffer(last, value.index_select(axis, order))
    return copied


def test_a_residual_mlp() -> None:
    graph = residual_mlp()
    axes, fixed = group_of(graph, "w1", 0)
    assert not fixed and {("w1", 0), ("w2", 1), ("up", 1), ("act", 1)} == axes
    stream, fixed = group_of(graph, "w0", 0)
    assert not fixed
    assert stream == {
        ("w0", 0), ("b0", 0), ("stem", 1), ("scale", 0), ("shift", 0), ("norm", 1), ("w1", 1), ("w2", 0), ("down", 1),
        ("total", 1), ("w3", 1),
    }  # fmt: skip
    assert "input" in group_of(graph, "w0", 1)[1] and "output" in group_of(graph, "w3", 0)[1]
    sample = torch.randn(3, 4)
    for group in (axes, stream):
        (expected,), (got,) = graph.run([sample]), permuted(graph, group).run([sample])
        assert torch.allclose(expected, got, atol=1e-5)


def test_an_unknown_operator_fixes_its_axes() -> None:
    def build(body: fx.Graph, x: fx.Node, weight: Any) -> fx.Node:
        up = call(body, aten.linear.default, x, weight("w1", torch.randn(6, 4)), name="up")
        odd = call(body, aten.cumsum.default, up, 1, name="odd")
        return call(body, aten.linear.default, odd, weight("w2", torch.randn(5, 6)), name="down")

    graph = torch_graph(build)
    assert "aten.cumsum" in group_of(graph, "w1", 0)[1]
    assert "aten.cumsum" in group_of(graph, "w2", 1)[1]


def conv_net() -> Graph:
    """An ONNX net: conv, batch norm, relu, depthwise conv, residual add, pooling, flatten, Gemm."""
    from fxopt.frontends.onnx import load

    generator = torch.Generator().manual_seed(1)

    def tensor(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(torch.rand(shape, generator=generator).numpy(), name)

    weights = [tensor("w0", 8, 3, 3, 3), tensor("g", 8), tensor("b", 8), tensor("m", 8), tensor("v", 8),
               tensor("wd", 8, 1, 3, 3), tensor("w1", 8, 8, 1, 1), tensor("fc", 5, 8), tensor("fb", 5)]  # fmt: skip
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [
        oh.make_node("Conv", ["x", "w0"], ["c0"], **same),
        oh.make_node("BatchNormalization", ["c0", "g", "b", "m", "v"], ["n0"]),
        oh.make_node("Relu", ["n0"], ["r0"]),
        oh.make_node("Conv", ["r0", "wd"], ["d0"], group=8, **same),
        oh.make_node("Conv", ["d0", "w1"], ["c1"]),
        oh.make_node("Add", ["c1", "r0"], ["total"]),
        oh.make_node("GlobalAveragePool", ["total"], ["pool"]),
        oh.make_node("Flatten", ["pool"], ["flat"]),
        oh.make_node("Gemm", ["flat", "fc", "fb"], ["y"], transB=1),
    ]
    body = oh.make_graph(
        nodes,
        "net",
        [oh.make_tensor_value_info("x", 1, ["n", 3, 8, 8])],
        [oh.make_tensor_value_info("y", 1, ["n", 5])],
        weights,
    )
    graph = load(oh.make_model(body, opset_imports=[oh.make_opsetid("", 20)]))
    shapes.infer(graph)
    return graph


def test_a_conv_net() -> None:
    graph = conv_net()
    stream, fixed = group_of(graph, "c_w0", 0)
    assert not fixed
    assert stream == {
        ("c_w0", 0), ("c0", 1), ("c_g", 0), ("c_b", 0), ("c_m", 0), ("c_v", 0), ("n0", 1), ("r0", 1), ("c_wd", 0),
        ("d0", 1), ("c_w1", 0), ("c_w1", 1), ("c1", 1), ("total", 1), ("pool", 1), ("flat", 1), ("c_fc", 1),
    }  # fmt: skip
    sample = torch.randn(2, 3, 8, 8)
    (expected,), (got,) = graph.run([sample]), permuted(graph, stream).run([sample])
    assert torch.allclose(expected, got, rtol=1e-4, atol=1e-4)
    assert group_of(graph, "c_w0", 2)[1] and group_of(graph, "c0", 2)[1]


def test_reshape_concat_matmul_and_embedding() -> None:
    def build(body: fx.Graph, x: fx.Node, weight: Any) -> fx.Node:
        up = call(body, aten.linear.default, x, weight("w1", torch.randn(6, 4)), name="up")
        heads = call(body, aten.view.default, up, [3, 2, 3], name="heads")
        back = call(body, aten.view.default, heads, [3, 6], name="back")
        wide = call(body, aten.unsqueeze.default, back, 0, name="wide")
        turned = call(body, aten.permute.default, wide, [2, 0, 1], name="turned")
        halves = call(body, aten.cat.default, [turned, turned], 0, name="halves")
        product = call(body, aten.matmul.default, weight("w2", torch.randn(1, 5, 1)), halves, name="product")
        return call(body, aten.sum.dim_IntList, product, [0], name="reduced")

    graph = torch_graph(build)
    assert "splits" in group_of(graph, "w1", 0)[1]
    assert group_of(graph, "turned", 0)[1]  # concatenated along it
    assert ("product", 1) in group_of(graph, "w2", 1)[0]
    axes, _ = group_of(graph, "wide", 2)
    assert ("back", 1) in axes and ("turned", 0) in axes


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("cnn", "torch"),
        ("encoder", "torch"),
        ("cnn", "onnx"),
        *[pytest.param(name, origin, marks=pytest.mark.slow) for name in SLOW for origin in ("torch", "onnx")],
    ],
)
def test_architectures(name: str, origin: str) -> None:
    """Partitioned they give the same bits; permuting a free group changes nothing but rounding."""
    from fxopt.frontends import to_onnx, torch_export
    from tests.zoo import BATCH, SEQUENCE, case

    model = case(name)
    if origin == "torch":
        graph = torch_export.load(model.model, model.inputs, model.dynamic)
    else:
        graph, _ = to_onnx.to_onnx(model.model, model.inputs, model.dynamic, verify=False)
        shapes.infer(graph, {"batch": BATCH, "seq": SEQUENCE})
    inputs = list(model.inputs.values())
    before = graph.run(inputs)
    targets = list(dict.fromkeys(node.target for node in graph.calls()))
    for step in (2, 5):
        parts = partition(graph, refuse(*targets[::step]))
        pieces = [extract(graph, region).run for region in parts.regions]
        assert all(map(torch.equal, before, run_partitioned(graph, parts, pieces, inputs)))
    groups = [group for group in tied_dimensions(graph) if not group.fixed]
    members = [{(node.name, axis) for node, axis in group.axes if node.op == "get_attr"} for group in groups]
    assert any(members) or name == "cnn"
    for group in filter(None, members):
        for expected, got in zip(before, permuted(graph, group).run(inputs), strict=True):
            assert (expected - got).abs().max() <= 1e-5 * expected.abs().max()


def test_operands_that_are_not_data_are_fixed() -> None:
    """The shape operand of Reshape and Expand, axes, and everything about an unknown rank."""
    from fxopt.frontends.onnx import load

    nodes = [
        oh.make_node("Expand", ["x", "shape"], ["wide"]),
        oh.make_node("Reshape", ["wide", "shape"], ["again"]),
        oh.make_node("ReduceMean", ["again", "axes"], ["y"], keepdims=0),
    ]
    constants = [oh.make_tensor("shape", 7, [3], [3, 4, 3]), oh.make_tensor("axes", 7, [2], [1, 2])]
    body = oh.make_graph(
        nodes, "g", [oh.make_tensor_value_info("x", 1, [3, 4, 3])], [oh.make_tensor_value_info("y", 1, [3])], constants
    )
    graph = load(oh.make_model(body, opset_imports=[oh.make_opsetid("", 20)]))
    shapes.infer(graph)
    assert group_of(graph, "c_shape", 0) == ({("c_shape", 0)}, group_of(graph, "c_shape", 0)[1])
    assert group_of(graph, "c_shape", 0)[1] and group_of(graph, "c_axes", 0)[1]
    assert ("again", 2) in group_of(graph, "wide", 2)[0]


def test_batched_products() -> None:
    def build(body: fx.Graph, x: fx.Node, weight: Any) -> list[fx.Node]:
        stack, vector = weight("stack", torch.randn(7, 5, 4)), weight("vector", torch.randn(4))
        left = call(body, aten.matmul.default, stack, vector, name="left")
        right = call(body, aten.matmul.default, weight("row", torch.randn(5)), stack, name="right")
        return [call(body, aten.mm.default, x, call(body, aten.t.default, right)), left]

    graph = torch_graph(build)
    axes, _ = group_of(graph, "stack", 0)
    assert {("left", 0), ("right", 0), ("t_default", 1)} <= axes
    assert ("row", 0) in group_of(graph, "stack", 1)[0] and ("left", 1) in group_of(graph, "stack", 1)[0]
