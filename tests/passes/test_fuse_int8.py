"""8-bit linears on codes, with what follows them: the numbers of the operators they replace, but for rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from fxopt.backends.onnxruntime.forms import FORMS
from fxopt.backends.onnxruntime.fused_forms import DOMAIN
from fxopt.cost_model.targets import get_target
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.onnx.export import to_model
from fxopt.ir.op import declaration
from fxopt.ir.ops.linear_u8s8 import layer_norm_u8, linear_u8s8, quantize_u8
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.fuse_int8 import FuseInt8
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.stats import collect

TARGET = get_target("x86-avx512-vnni")
WIDTH, INNER = 16, 32
RANDOM = np.random.default_rng(0)


def block(order: str = "post", activation: str = "Gelu", smooth: bool = False) -> Graph:
    """A feed-forward block: the layer norm behind the sum ("post") or before the linears ("pre"), twice."""
    nodes: list[Any] = []
    weights: dict[str, Any] = {}

    def constant(name: str, *shape: int, scale: float = 1.0) -> str:
        weights[name] = (RANDOM.normal(size=shape) * scale).astype(np.float32)
        return name

    def linear(x: str, name: str, inner: int, outputs: int) -> str:
        product = f"{name}_product"
        nodes.append(helper.make_node("MatMul", [x, constant(f"{name}_w", inner, outputs, scale=0.3)], [product]))
        nodes.append(helper.make_node("Add", [product, constant(f"{name}_b", outputs)], [name], name=name))
        return name

    def norm(x: str, name: str) -> str:
        weights[f"{name}_g"] = np.linspace(0.5, 2, WIDTH, dtype=np.float32)
        inputs = [x, f"{name}_g", constant(f"{name}_beta", WIDTH, scale=0.1)]
        nodes.append(helper.make_node("LayerNormalization", inputs, [name], name=name, axis=-1, epsilon=1e-5))
        return name

    x = "x"
    for index in range(2):
        entry = norm(x, f"n{index}") if order == "pre" else x
        hidden = linear(entry, f"up{index}", WIDTH, INNER)
        nodes.append(helper.make_node(activation, [hidden], [f"act{index}"]))
        down = linear(f"act{index}", f"down{index}", INNER, WIDTH)
        nodes.append(helper.make_node("Sum", [down, x], [f"sum{index}"], name=f"sum{index}"))
        x = norm(f"sum{index}", f"n{index}") if order == "post" else f"sum{index}"
    body = helper.make_graph(
        nodes,
        "block",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5, WIDTH])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", 5, WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    graph = load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    infer(graph, {"n": 2})
    return quantized(graph, smooth)


def samples() -> list[list[torch.Tensor]]:
    return [[torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))] for seed in range(4)]


def quantized(graph: Graph, smooth: bool, kind: str = "static") -> Graph:
    step = QuantizeLinear(activations=kind, smooth="on" if smooth else "off")
    candidates = [found for found in step.candidates(graph, Context(TARGET)) if found.refusal is None]
    stats = collect(graph, samples(), {node for found in candidates for node in step.observed(graph, found)})
    for found in candidates:
        step.apply(graph, found, stats)
    graph.prune()
    infer(graph, {"n": 2})
    return graph


def fused(graph: Graph) -> tuple[Graph, Context]:
    changed, ctx = graph.copy(), Context(TARGET)
    assert FuseInt8().run(changed, ctx) == sum(node.target is linear_w8a8.target for node in graph.calls())
    infer(changed, {"n": 2})
    return changed, ctx


def named(graph: Graph) -> list[str]:
    return [getattr(declaration(node.target), "name", str(node.target)) for node in graph.calls()]


def epilogues(graph: Graph) -> list[Any]:
    return [node.args[5] for node in graph.calls() if node.target is linear_u8s8.target]


def noise(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().sum() / a.square().sum())


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_the_numbers_are_those_of_the_operators(order: str, smooth: bool) -> None:
    graph = block(order, smooth=smooth)
    changed, _ = fused(graph)
    for sample in samples():
        assert noise(graph.run(sample)[0], changed.run(sample)[0]) < 1e-4  # single values on the other side of a tie


def test_a_block_with_its_norm_at_the_end() -> None:
    changed, _ = fused(block("post"))
    assert epilogues(changed) == ["gelu", "layer_norm"] * 2
    assert named(changed) == ["quantize_u8", "linear_u8s8"] * 4, "nothing else is left"


def test_a_block_with_its_norm_at_the_start() -> None:
    changed, _ = fused(block("pre", activation="Relu"))
    assert set(epilogues(changed)) <= {"relu", "none", "residual"} and epilogues(changed).count("residual") == 2
    assert named(changed).count("layer_norm_u8") == 2
    assert not any("LayerNormalization" in name or "Sum" in name for name in named(changed))


def test_smoothing_is_part_of_the_rounding() -> None:
    graph = block("post", smooth=True)
    assert any("Mul" in name for name in named(graph))
    changed, _ = fused(graph)
    assert not any("Mul" in name for name in named(changed))
    factors = [changed.constant(node.args[1]) for node in changed.calls() if node.target is quantize_u8.target]
    assert any(value is not None and len(value.unique()) > 1 for value in factors)


def test_codes_and_floats_of_one_node() -> None:
    """In the file the linear rounds its result; nothing is written that nobody takes."""
    model = to_model(fused(block("post"))[0], FORMS)
    onnx.checker.check_model(model)
    own = [node for node in model.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in model.graph.node] == ["QuantizeLinear"] + ["FusedLinearInt8"] * 4
    values = [{each.name: onnx.helper.get_attribute_value(each) for each in node.attribute} for node in own]
    assert [(found["floats"], found["codes"]) for found in values] == [(0, 1), (1, 1), (0, 1), (1, 0)]
    made = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    made |= {tensor.name for tensor in model.graph.initializer}
    assert all(name in made for node in model.graph.node for name in node.input if name)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_a_file_that_is_read_again_computes_the_same(order: str) -> None:
    changed, _ = fused(block(order, smooth=True))
    again = load(to_model(changed, FORMS))
    infer(again, {"n": 2})
    for sample in samples():
        torch.testing.assert_close(again.run(sample)[0], changed.run(sample)[0])


def test_what_is_not_fused_has_a_reason() -> None:
    graph = block("post")
    for node in list(graph.calls()):
        if node.target is linear_w8a8.target:
            new = graph.call(linear_w8a8_dynamic.target, node.args[:4], before=node, made_by="test")
            graph.replace(node, new)
            break
    ctx = Context(TARGET)
    assert FuseInt8().run(graph, ctx) == 3
    (verdict,) = ctx.ledger.select(pass_name="fuse-int8", outcome="refused")
    assert verdict.reason == "the range of its input is found at run time"


def test_values_with_other_users_stay_floats() -> None:
    """A sum that is also taken elsewhere is not replaced by its norm."""
    graph = block("post")
    total = next(node for node in graph.calls() if "sum0" in node.name)
    assert isinstance(total, fx.Node)
    result = graph.output.args[0]
    graph.output.args = ((*result, total),)  # type: ignore[misc]
    graph.outputs = (*graph.outputs, graph.outputs[0])
    before = graph.run(samples()[0])
    changed = graph.copy()
    FuseInt8().run(changed, Context(TARGET))
    assert layer_norm_u8.target not in {node.target for node in changed.calls()}
    assert "residual" in epilogues(changed)
    for a, b in zip(before, changed.run(samples()[0]), strict=True):
        assert noise(a, b) < 1e-4
