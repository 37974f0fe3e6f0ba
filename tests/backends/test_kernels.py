"""The forms that are emitted are those that ONNX Runtime fuses into integer kernels: proved on its optimised model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fxopt.backends.onnxruntime.backend import OnnxRuntime
from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.backends.onnxruntime.session import make_session
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.export import save, to_model
from fxopt.ir.shapes import infer
from fxopt.ir.target import Target
from fxopt.passes.avoid_slow_fusions import AvoidSlowFusions
from fxopt.passes.base import Context
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.stats import collect
from tests.backends.contrib import evaluator

# Seven-bit codes: ONNX Runtime's kernels for CPUs without VNNI are exact on them too.
TARGET = Target(
    "avx2", "cpu", "x86-64", "onnxruntime", "test", "never measured", 0.3,
    {"float32": 1e11, "int8": 2e11}, 1e10, 1e-6, features=frozenset({"avx2"}),
)  # fmt: skip


def model(nodes: list[Any], weights: dict[str, Any], x: list[Any], y: list[Any]) -> Graph:
    """A graph from ONNX nodes."""
    body = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    graph = load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    infer(graph, {"n": 4})
    return graph


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def attention_inputs() -> Graph:
    """q, k and v of one x, added up: three linears that share their input."""
    nodes, weights = [], {}
    for name in "qkv":
        weights[f"w{name}"], weights[f"b{name}"] = normal(32, 32, seed=ord(name)), normal(32, seed=ord(name) + 9)
        nodes.append(helper.make_node("MatMul", ["x", f"w{name}"], [f"{name}_product"]))
        nodes.append(helper.make_node("Add", [f"{name}_product", f"b{name}"], [name], name=name))
    nodes.append(helper.make_node("Sum", ["q", "k", "v"], ["y"]))
    return model(nodes, weights, ["n", 8, 32], ["n", 8, 32])


def chain(kind: str) -> Graph:
    """Conv -> Relu (-> MaxPool) -> Conv."""
    weights = {"w1": normal(8, 4, 3, 3), "b1": normal(8), "w2": normal(8, 8, 3, 3, seed=1), "b2": normal(8, seed=2)}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["r1" if kind == "conv" else "p1", "w2", "b2"], ["y"], name="conv2", pads=[1] * 4),
    ]
    if kind == "conv":
        del nodes[2]
    side = 8 if kind == "conv" else 4
    return model(nodes, weights, ["n", 4, 8, 8], ["n", 8, side, side])


def quantized(graph: Graph, kind: str) -> tuple[Graph, torch.Tensor]:
    """The graph with everything quantised, and an input."""
    step = QuantizeLinear(activations=kind, smooth="off")
    candidates = list(step.candidates(graph, Context(TARGET, capabilities=OnnxRuntime())))
    assert candidates and all(found.refusal is None for found in candidates)
    shape = [4 if isinstance(dim, str) else int(dim or 0) for dim in graph.inputs[0].shape or ()]
    samples = [[torch.from_numpy(normal(*shape, seed=seed))] for seed in range(3)]
    stats = collect(graph, samples, {node for found in candidates for node in step.observed(graph, found)})
    changed = graph.copy()
    for found in candidates:
        step.apply(changed, found, stats)
    changed.prune()
    return changed, samples[0][0]


def kernels(graph: Graph, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime really runs."""
    save(graph, folder / "model.onnx", FORMS)
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    make_session(folder / "model.onnx", 1, folder / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_dynamic_linears_share_the_quantised_input(tmp_path: Path) -> None:
    graph, _ = quantized(attention_inputs(), "dynamic")
    found = kernels(graph, tmp_path)
    assert found["MatMulIntegerToFloat"] == 3 and found["DynamicQuantizeLinear"] == 1
    assert not {"MatMul", "MatMulInteger", "Cast", "Mul", "Add"} & set(found)


def test_a_dynamic_linear_alone_is_one_kernel(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    graph, _ = quantized(model(nodes, {"w": normal(16, 8), "b": normal(8)}, ["n", 16], ["n", 8]), "dynamic")
    assert kernels(graph, tmp_path) == {"DynamicQuantizeMatMul": 1}


def test_static_linears(tmp_path: Path) -> None:
    graph, _ = quantized(attention_inputs(), "static")
    found = kernels(graph, tmp_path)
    assert found["MatMulIntegerToFloat"] == 3 and found["QuantizeLinear"] == 1
    assert not {"MatMul", "DequantizeLinear"} & set(found)


@pytest.mark.parametrize("kind", ["conv", "pool"])
def test_convolutions_stay_integer_between_layers(kind: str, tmp_path: Path) -> None:
    graph, _ = quantized(chain(kind), "static")
    found = kernels(graph, tmp_path)
    assert found["QLinearConv"] == 2 and found["QuantizeLinear"] == 1 and found["DequantizeLinear"] == 1
    assert not {"Conv", "Relu", "Clip"} & set(found)


@pytest.mark.parametrize(("build", "kind"), [(attention_inputs, "dynamic"), (attention_inputs, "static")])
def test_onnx_runtime_agrees_with_the_definition(build: Any, kind: str) -> None:
    graph, x = quantized(build(), kind)
    executable = OnnxRuntime().compile(graph, TARGET, threads=1)
    ours, theirs = graph.run([x])[0], executable.run([x])[0]
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["conv", "pool"])
def test_convolutions_agree_within_one_step(kind: str) -> None:
    graph, x = quantized(chain(kind), "static")
    executable = OnnxRuntime().compile(graph, TARGET, threads=1)
    ours, theirs = graph.run([x])[0], executable.run([x])[0]
    step = max(float(node.args[6]) for node in graph.calls() if "conv_w8a8" in str(node.target))
    assert (ours - theirs).abs().max() <= 2.01 * step and (ours - theirs).abs().mean() < 0.1 * step


@pytest.mark.parametrize(("build", "kind"), [(attention_inputs, "dynamic"), (lambda: chain("pool"), "static")])
def test_the_reference_evaluator_of_onnx_runs_the_form(build: Any, kind: str) -> None:
    graph, x = quantized(build(), kind)
    theirs = evaluator(to_model(graph, FORMS)).run(None, {"x": x.numpy()})[0]
    ours = graph.run([x])[0]
    noise = (ours - torch.from_numpy(theirs)).square().sum() / ours.square().sum()
    assert noise < 1e-5


def test_no_weight_is_unsigned_and_no_activation_signed() -> None:
    """int8 activations, and uint8 weights, have no fast kernel on x86."""
    for build, kind in ((attention_inputs, "dynamic"), (attention_inputs, "static"), (lambda: chain("conv"), "static")):
        proto = to_model(quantized(build(), kind)[0], FORMS)
        types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
        for node in proto.graph.node:
            if node.op_type == "QuantizeLinear":
                assert types[node.input[2]] == TensorProto.UINT8
            if node.op_type == "MatMulInteger":
                assert types[node.input[1]] == TensorProto.INT8


def test_residual_additions_are_not_fused_into_the_slow_kernel(tmp_path: Path) -> None:
    weights = {"w": normal(16, 16), "g": normal(16), "b": normal(16)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "x"], ["s"], name="residual"),
        helper.make_node("LayerNormalization", ["s", "g", "b"], ["y"]),
    ]
    graph = model(nodes, weights, ["n", 8, 16], ["n", 8, 16])
    assert kernels(graph, tmp_path)["SkipLayerNormalization"] == 1
    before = OnnxRuntime().compile(graph, TARGET, threads=1).run([torch.from_numpy(normal(4, 8, 16))])[0]
    if not OnnxRuntime().prefers("SkipLayerNormalization"):
        pytest.skip("the fusion was not measured to be slow in this version of ONNX Runtime")
    assert AvoidSlowFusions().run(graph, Context(TARGET, capabilities=OnnxRuntime())) == 1
    assert AvoidSlowFusions().run(graph, Context(TARGET, capabilities=OnnxRuntime())) == 0
    infer(graph, {"n": 4})
    assert kernels(graph, tmp_path)["SkipLayerNormalization"] == 0
    after = OnnxRuntime().compile(graph, TARGET, threads=1).run([torch.from_numpy(normal(4, 8, 16))])[0]
    assert torch.allclose(before, after, atol=1e-5)
