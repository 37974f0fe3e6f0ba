"""`Graph`: names, constants, copies."""

from __future__ import annotations

import torch
from torch import fx

import fxopt
from fxopt.ir.graph import Graph, ValueSpec, label
from fxopt.ir.onnx.op import OnnxOp
from tests.conftest import mlp

RELU = OnnxOp("", "Relu", 14)


def graph() -> Graph:
    return fxopt.capture(mlp())


def test_nodes_are_found_by_either_name() -> None:
    made = graph()
    found = made.find("fc1")
    assert found is not None and label(found) == "fc1" and made.find(found.name) is found
    assert made.find("x") is made.placeholders[0] and made.find("nothing") is None


def test_a_name_goes_over_to_the_node_that_replaces_another() -> None:
    made = graph()
    old = made.find("act")
    assert old is not None
    new = made.call(RELU, old.args, before=old, made_by="test")
    made.replace(old, new)
    assert made.find("act") is new and made.find(new.name) is new
    made.erase(made.call(RELU, (new,), before=made.output, made_by="test", name="extra"))
    assert made.find("extra") is None


def test_names_of_a_copy_are_its_own() -> None:
    made = graph()
    before = made.find("fc2")
    copied = made.copy()
    found = copied.find("fc2")
    assert found is not None and found is not before and found.graph is copied.fx


def test_constants_come_before_the_first_operator_whatever_was_put_before_it() -> None:
    made = graph()
    for _ in range(3):
        first = next(made.calls())
        constant = made.add_constant(torch.ones(1), "one")
        leading = [node.op for node in made.nodes][: list(made.nodes).index(first)]
        assert set(leading) == {"placeholder", "get_attr"} and constant in list(made.nodes)[: len(leading)]
        made.call(RELU, (made.placeholders[0],), before=first, made_by="test")
    made.prune()
    made.add_constant(torch.ones(1), "one")
    made.fx.lint()


def test_constants_of_one_hint_have_names_of_their_own() -> None:
    made = graph()
    names = {str(made.add_constant(torch.full((1,), float(index)), "same name").target) for index in range(4)}
    assert len(names) == 4 and all(name.startswith("k_same_name") for name in names)
    assert sorted(float(made.attribute(name)) for name in names) == [0.0, 1.0, 2.0, 3.0]


def test_constants_under_dotted_names_are_released() -> None:
    """Weights of torch-born graphs lie in nested modules."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    root = torch.nn.Module()
    root.add_module("layer", torch.nn.Linear(2, 2))
    weight = graph.create_node("get_attr", "layer.weight", name="weight")
    result = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    graph.output((result,))
    made = Graph(graph, root, "torch", (ValueSpec("x", torch.float32, (1, 2)),), (ValueSpec("y", None, None),))
    made.release_constants()
    assert [name for name, _ in root.named_parameters()] == ["layer.weight"]
