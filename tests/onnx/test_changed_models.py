"""What a rewrite does not touch is written as it was read; what it makes has stable names and says where it is from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import to_model
from fxopt.passes.base import Context
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import exact_pipeline
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.testing import rewritten
from tests.onnx.test_round_trip import corner_cases, value
from tests.passes.test_quantize_linear import AVX2


def whole() -> ModelProto:
    """The corner cases that run, with a linear to quantise, an Identity to remove, and all that a file may say."""
    model = corner_cases()
    body = model.graph
    for name in ("vendor",):
        body.node.remove(next(node for node in body.node if node.name == name))
    body.input.remove(next(item for item in body.input if item.name == "many"))
    body.node.extend([
        helper.make_node("Relu", ["out"], ["before"], name="before", doc_string="kept"),
        helper.make_node("MatMul", ["before", "weight"], ["product"], name="product"),
        helper.make_node("Identity", ["product"], ["same"], name="same"),
        helper.make_node("Relu", ["same"], ["after"], name="after", doc_string="kept too"),
    ])  # fmt: skip
    body.node[-1].metadata_props.add(key="who", value="me")
    body.initializer.append(numpy_helper.from_array(np.random.default_rng(0).normal(size=(3, 5)).astype("f"), "weight"))
    body.output.append(value("after", TensorProto.FLOAT, ["batch", 5]))
    for name, size in (("before", 3), ("product", 5), ("same", 5)):
        body.value_info.append(value(name, TensorProto.FLOAT, ["batch", size]))
        body.value_info[-1].doc_string = f"the type of {name}"
    model.training_info.add().initialization.name = "training"
    return model


def changed(model: ModelProto) -> ModelProto:
    """The exact passes, then the linear in 8 bits."""
    sample = [torch.randn(2, 3), torch.tensor(True), torch.tensor(True)]
    graph = rewritten(
        QuantizeLinear(activations="dynamic", smooth="off"), load(model, check=False), [sample], Context(AVX2)
    )
    PassManager(exact_pipeline()).run(graph, Context(AVX2))
    return to_model(graph, FORMS)


def named(model: ModelProto) -> dict[str, NodeProto]:
    return {node.name: node for node in model.graph.node if node.name}


def said(node: NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def test_untouched_nodes_are_equal_and_in_order() -> None:
    model = whole()
    before, after = named(model), named(changed(model))
    untouched = ["call", "if", "before"]
    assert [before[name] for name in untouched] == [after[name] for name in untouched]
    assert [name for name in after if name in before] == ["call", "if", "loop", "two outputs", "before", "after"]
    for name, field, text in (
        ("after", "input", "product"),  # of three nodes the Identity behind or before them is gone, and nothing else
        ("two outputs", "input", "out"),
        ("loop", "output", "out"),  # those in its body stay: they give results their names
    ):
        rewired = NodeProto.FromString(before[name].SerializeToString())
        getattr(rewired, field)[0] = text
        assert after[name] == rewired


def test_what_the_file_says_beside_its_nodes_is_kept() -> None:
    model = whole()
    made = changed(model)
    for field in (
        "ir_version", "producer_name", "domain", "model_version", "doc_string", "metadata_props", "training_info",
        "functions",
    ):  # fmt: skip
        assert getattr(made, field) == getattr(model, field), field
    assert list(made.opset_import)[: len(model.opset_import)] == list(model.opset_import)
    for field in (
        "name", "doc_string", "metadata_props", "input", "output", "quantization_annotation",
    ):  # fmt: skip
        assert getattr(made.graph, field) == getattr(model.graph, field), field
    weights = {tensor.name: tensor for tensor in made.graph.initializer}
    for tensor in model.graph.initializer:
        used = tensor.name in ("w", "steps", "large")  # dead constants go
        assert weights.get(tensor.name) == (tensor if used else None), tensor.name


def test_declared_types_that_are_still_true_are_kept_and_the_others_dropped() -> None:
    model = whole()
    made = changed(model)
    kept = [item for item in model.graph.value_info if item.name != "same"]
    assert {"outer", "before", "product"} == {item.name for item in kept}
    assert list(made.graph.value_info) == kept
    inferred = onnx.shape_inference.infer_shapes(made, strict_mode=False).graph.value_info
    assert next(item for item in inferred if item.name == "before") == kept[1]


def test_new_nodes_say_which_pass_made_them_of_what() -> None:
    model = whole()
    made = changed(model)
    new = [node for node in made.graph.node if not node.name or node.name not in named(model)]
    assert len(new) == 2
    assert all(said(node) == {"fxopt.from": "product", "fxopt.pass": "quantize-linear"} for node in new)
    assert new[-1].output[0] == "product"


def test_names_are_unique_and_the_same_each_time() -> None:
    first, second = changed(whole()), changed(whole())
    assert first == second
    names = [node.name for node in first.graph.node if node.name]
    assert len(names) == len(set(names))
    values = [name for node in first.graph.node for name in node.output if name]
    values += [entry.name for entry in (*first.graph.input, *first.graph.initializer)]
    shared = {entry.name for entry in first.graph.input} & {entry.name for entry in first.graph.initializer}
    assert len(values) - len(shared) == len(set(values))


@pytest.mark.parametrize("version", [8, 9])
def test_before_ir_version_10_nodes_have_no_metadata_but_doc_strings(version: int) -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(np.ones((3, 5), np.float32), "w")],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=version)
    step: Any = QuantizeLinear(activations="dynamic", smooth="off")
    made = to_model(rewritten(step, load(model), [[torch.randn(2, 3)]], Context(AVX2)), FORMS)
    assert made.ir_version == version and len(made.graph.node) == 2
    assert {node.doc_string for node in made.graph.node} == {"fxopt.from: product, fxopt.pass: quantize-linear"}
    assert not any(node.metadata_props for node in made.graph.node)
    onnx.checker.check_model(made)
