"""Running the rest of a rewritten graph gives what running all of it gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.ops.linear_w8a8 import linear_w8a8_dynamic
from fxopt.ir.partial_run import resume
from fxopt.ir.views.linear import Linear, linear
from fxopt.passes.quantize_linear import quantize_weight
from tests.conftest import mlp


def rewritten(graph: Graph, name: str) -> Graph:
    """A copy in which one linear is an integer operator."""
    copy = graph.copy()
    node = copy.find(name)
    assert node is not None
    view = linear(copy, node)
    assert isinstance(view, Linear)
    codes, scales = quantize_weight(view.weight(copy))
    constants = (copy.add_constant(codes, "codes"), copy.add_constant(scales, "scales"))
    made = copy.call(linear_w8a8_dynamic.target, (view.x, *constants, view.bias_node), before=node, made_by="test")
    copy.replace(node, made)
    return copy


@pytest.mark.parametrize(("name", "runs"), [("fc1", 3), ("fc2", 1)])
def test_only_what_depends_on_the_change_runs(name: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = load(mlp())
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    known: dict[str, Any] = {}
    graph.run([x], observer=lambda node, value: known.__setitem__(node.name, value))
    original = {node.name for node in graph.nodes}
    changed = rewritten(graph, name)
    expected = changed.run([x])
    ran = []

    def evaluator(*arguments: Any) -> Any:
        from fxopt.ir.interpreter import evaluate

        ran.append(arguments[1])
        return evaluate(*arguments)

    monkeypatch.setattr("fxopt.ir.partial_run.evaluate", evaluator)
    (result,) = resume(changed, known, original)
    assert torch.equal(result, expected[0]) and not torch.equal(result, graph.run([x])[0])
    assert len(ran) == runs


def test_an_unchanged_graph_does_not_run() -> None:
    graph = load(mlp())
    known: dict[str, Any] = {}
    expected = graph.run([torch.ones(1, 16)], observer=lambda node, value: known.__setitem__(node.name, value))
    (result,) = resume(graph.copy(), known, {node.name for node in graph.nodes})
    assert result is known[graph.result_nodes[0].name] and torch.equal(result, expected[0])
