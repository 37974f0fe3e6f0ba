"""The structural hash: what it sees, what it does not see, and the differences that it names."""

from __future__ import annotations

import operator
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import fx

from fxopt.ir import structural_hash as module
from fxopt.ir.graph import Graph, Opaque, ValueSpec
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.structural_hash import constant_digest, first_difference, structural_hash

aten = torch.ops.aten


def build(
    *,
    width: int = 4,
    name: str = "h",
    target: Any = aten.relu.default,
    alpha: int = 1,
    weight: Any = None,
    swap: bool = False,
) -> Graph:
    """relu(x @ w.T) + alpha * x over float32[batch, width]."""
    body, root = fx.Graph(), torch.nn.Module()
    x = body.placeholder(name + "_in")
    root.register_buffer(name + "_w", torch.eye(width) if weight is None else weight)
    w = body.create_node("get_attr", name + "_w")
    hidden = body.create_node("call_function", aten.linear.default, (x, w), name=name)
    act = body.create_node("call_function", target, (hidden,))
    total = body.create_node("call_function", aten.add.Tensor, (x, act) if swap else (act, x), {"alpha": alpha})
    body.output((total,))
    spec = ValueSpec(name, torch.float32, ("batch", width))
    return Graph(body, root, "torch", (spec,), (spec,))


def test_names_and_records_do_not_matter() -> None:
    a, b = build(), build(name="other")
    for node in b.nodes:
        node.meta["provenance"] = ("somewhere",)
        node.meta["val"] = torch.empty(1)
    b.name = "renamed"
    assert structural_hash(a) == structural_hash(b)
    assert first_difference(a, b) == ""
    assert len(structural_hash(a)) == 64


def test_order_of_independent_nodes_and_spelling_of_constants_do_not_matter() -> None:
    def two(order: str, once: bool) -> Graph:
        body, root = fx.Graph(), torch.nn.Module()
        x = body.placeholder("x")
        root.register_buffer("k", torch.ones(3))
        root.register_buffer("k2", torch.ones(3))
        k = body.create_node("get_attr", "k")
        again = k if once else body.create_node("get_attr", "k2")
        made = {kind: body.call_function(getattr(aten, kind).default, (x,)) for kind in order.split()}
        body.create_node("get_attr", "k")  # without users
        left = body.call_function(aten.mul.Tensor, (made["relu"], k))
        right = body.call_function(aten.mul.Tensor, (made["neg"], again))
        body.output((left, right))
        return Graph(body, root, "torch", (), ())

    assert structural_hash(two("relu neg", True)) == structural_hash(two("neg relu", False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": aten.gelu.default}, "operator 2: torch.ops.aten.relu.default.*aten.gelu.default"),
        ({"alpha": 2}, r"operator 3.*'?alpha'?.*1.*2"),
        ({"swap": True}, "operator"),
        ({"weight": torch.eye(4) * 2}, r"operator 1.*float32\[4, 4\]"),
        ({"weight": torch.eye(4).half()}, r"float16\[4, 4\]"),
        ({"width": 5}, r'input 0: float32\["batch", 4\].*float32\["batch", 5\]'),
    ],
)
def test_differences(change: dict[str, Any], message: str) -> None:
    a, b = build(), build(**change)
    assert structural_hash(a) != structural_hash(b)
    found = first_difference(a, b)
    assert re.search(message, found), found
    assert first_difference(b, a)
    assert first_difference(b, b) == ""


def test_counts_origin_and_outputs() -> None:
    a, b = build(), build()
    extra = b.fx.call_function
    with b.fx.inserting_before(b.output):
        extra(aten.neg.default, (b.placeholders[0],))
    assert "3 operators" in first_difference(a, b) and "4" in first_difference(a, b)
    c = build()
    c.origin = "onnx"
    assert "origin" in first_difference(a, c)
    d = build()
    d.output.args = ((d.placeholders[0],),)
    assert first_difference(a, d)
    e = build()
    e.outputs = (ValueSpec("h", torch.float16, ("batch", 4)),)
    assert "output 0" in first_difference(a, e)


def test_a_shared_value_is_not_two_equal_values() -> None:
    def graph(shared: bool) -> Graph:
        body = fx.Graph()
        x = body.placeholder("x")
        one = body.call_function(aten.relu.default, (x,))
        two = one if shared else body.call_function(aten.relu.default, (x,))
        body.output((body.call_function(aten.add.Tensor, (one, two)),))
        return Graph(body, torch.nn.Module(), "torch", (), ())

    assert structural_hash(graph(True)) != structural_hash(graph(False))


def test_order_of_keywords_does_not_matter_but_their_types_do() -> None:
    def graph(**kwargs: Any) -> Graph:
        body = fx.Graph()
        x = body.placeholder("x")
        parts = body.create_node("call_function", OnnxOp("", "Split", 18), (x,), kwargs)
        body.output((body.call_function(operator.getitem, (parts, 1)),))
        return Graph(body, torch.nn.Module(), "onnx", (), ())

    assert structural_hash(graph(axis=1, _outputs=2)) == structural_hash(graph(_outputs=2, axis=1))
    kinds = [1, 1.0, True, "1", None, [1], (1,), [[1]], float("nan"), float("inf"), 0.0, -0.0, torch.int8, "torch.int8"]
    assert len({structural_hash(graph(axis=kind)) for kind in kinds}) == len(kinds)


def test_opaque_constants_and_nested_graphs() -> None:
    def opaque(name: str, content: bytes) -> Graph:
        body, root = fx.Graph(), torch.nn.Module()
        root.c = Opaque(onnx.helper.make_tensor(name, onnx.TensorProto.STRING, [1], [content]))
        body.output((body.create_node("get_attr", "c"),))
        return Graph(body, root, "onnx", (), ())

    assert structural_hash(opaque("a", b"x")) == structural_hash(opaque("b", b"x"))
    assert structural_hash(opaque("a", b"x")) != structural_hash(opaque("a", b"y"))

    def nested(target: Any) -> Graph:
        inner = fx.Graph()
        inner.output((inner.call_function(target, (inner.placeholder("y"),)),))
        body, root = fx.Graph(), torch.nn.Module()
        root.add_module("body", fx.GraphModule(torch.nn.Module(), inner))
        body.output((body.create_node("get_attr", "body"),))
        return Graph(body, root, "torch", (), ())

    assert structural_hash(nested(aten.relu.default)) == structural_hash(nested(aten.relu.default))
    assert structural_hash(nested(aten.relu.default)) != structural_hash(nested(aten.neg.default))


def test_every_dtype_and_layout_of_a_constant() -> None:
    base = torch.arange(6).reshape(2, 3)
    assert constant_digest(base.t().contiguous()) == constant_digest(base.t())
    assert constant_digest(base) != constant_digest(base.reshape(3, 2))
    assert constant_digest(torch.tensor([7])) == constant_digest(torch.tensor([7]).as_strided((1,), (0,)))
    dtypes = (torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128,
              torch.int8, torch.uint16, torch.float64)  # fmt: skip
    assert len({constant_digest(torch.zeros(2, 2).to(dtype)) for dtype in dtypes}) == len(dtypes)
    assert constant_digest(torch.zeros(0, 3)) != constant_digest(torch.zeros(3, 0))
    assert constant_digest(torch.tensor(0.0)) != constant_digest(torch.tensor(-0.0))
    z = torch.randn(3, dtype=torch.complex64)
    assert constant_digest(z.conj()) == constant_digest(z.conj().resolve_conj())


def test_digests_are_cached_and_follow_changes_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    digest = module._tensor_digest
    monkeypatch.setattr(module, "_tensor_digest", lambda tensor: calls.append(1) or digest(tensor))
    graph = build(weight=torch.full((4, 4), 3.0))
    first = structural_hash(graph)
    assert structural_hash(graph.copy()) == first and structural_hash(graph) == first
    assert len(calls) == 1
    graph.root.h_w.add_(1)  # not allowed, and noticed
    assert structural_hash(graph) != first
    with torch.inference_mode():
        inside = torch.zeros(2)
    assert constant_digest(inside) == constant_digest(torch.zeros(2))


def test_the_same_in_every_process(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('t', {str(Path(__file__))!r})\n"
        "t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "print(t.structural_hash(t.build()))\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True,
                          env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path.cwd()), "PATH": ""})  # fmt: skip
    assert done.stdout.strip() == structural_hash(build()), done.stderr


def test_a_deep_graph_does_not_recurse() -> None:
    body = fx.Graph()
    node = body.placeholder("x")
    for _ in range(5000):
        node = body.call_function(aten.relu.default, (node,))
    body.output((node,))
    assert structural_hash(Graph(body, torch.nn.Module(), "torch", (), ()))
