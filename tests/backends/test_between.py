"""Between 8-bit convolutions everything is an integer kernel of ONNX Runtime, and gives what the definition gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fxopt.backends.onnxruntime.backend import OnnxRuntime
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.op import all_ops
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.pipelines import tidying_pipeline
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.stats import collect
from tests.backends.test_kernels import TARGET, kernels, normal

FLOATS = {"Conv", "Add", "Mul", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Concat"}


class Net:
    """ONNX nodes one after the other; `x` is [n, 8, 12, 12]."""

    def __init__(self, channels: int = 8) -> None:
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}
        self.channels = channels

    def add(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any) -> str:
        name = f"k{len(self.weights)}"
        self.weights[name] = value
        return name

    def conv(self, x: str, into: int, out: int, size: int = 3, group: int = 1, stride: int = 1) -> str:
        seed = len(self.nodes)
        weight = normal(out, into // group, size, size, seed=seed) * (2 / (into // group * size * size)) ** 0.5
        bias = normal(out, seed=seed + 100) * 0.1
        return self.add(
            "Conv", x, self.constant(weight), self.constant(bias),
            pads=[size // 2] * 4, group=group, strides=[stride, stride],
        )  # fmt: skip

    def graph(self, y: str, rank: int = 4) -> Graph:
        assert self.nodes[-1].output[0] == y
        self.nodes[-1].output[0] = "y"
        body = helper.make_graph(
            self.nodes, "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", self.channels, 12, 12])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in self.weights.items()],
        )  # fmt: skip
        graph = load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
        infer(graph, {"n": 2})
        return graph


def residual() -> Graph:
    """Conv Relu, then a bottleneck with a projected shortcut, then one with an identity; mean, classifier."""
    net = Net()
    x = net.add("Relu", net.conv("x", 8, 16))
    x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    short = net.conv(x, 16, 32, 1, stride=2)
    y = net.add("Relu", net.conv(x, 16, 16, 3, stride=2))
    x = net.add("Relu", net.add("Add", net.conv(y, 16, 32, 1), short))
    y = net.add("Relu", net.conv(x, 32, 32, 3, group=4))
    x = net.add("Relu", net.add("Add", x, net.conv(y, 32, 32, 1)))
    x = net.add("Flatten", net.add("ReduceMean", x, net.constant(np.array([2, 3]))))
    return net.graph(net.add("Gemm", x, net.constant(normal(10, 32)), net.constant(normal(10)), transB=1), 2)


def inverted() -> Graph:
    """Inverted residuals: 1x1 with ReLU6, depthwise with ReLU6, 1x1, and the addition without an activation."""
    net = Net()
    low, high = net.constant(np.float32(0)), net.constant(np.float32(6))
    x = net.conv("x", 8, 16)
    for _ in range(2):
        y = net.add("Clip", net.conv(x, 16, 48, 1), low, high)
        y = net.add("Clip", net.conv(y, 48, 48, 3, group=48), low, high)
        x = net.add("Add", net.conv(y, 48, 16, 1), x)
    return net.graph(net.conv(x, 16, 8, 1))


def branches() -> Graph:
    """Parallel convolutions and an average pooling, concatenated; a product of two branches."""
    net = Net()
    x = net.add("Relu", net.conv("x", 8, 16))
    parts = [net.add("Relu", net.conv(x, 16, 8, size)) for size in (1, 3)]
    parts.append(net.add("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    x = net.add("Concat", *parts, axis=1)
    x = net.add("Mul", net.conv(x, 32, 16, 1), net.add("Relu", net.conv(x, 32, 16, 1)))
    return net.graph(net.conv(x, 16, 8, 3))


def whole(graph: Graph) -> tuple[Graph, torch.Tensor, Context]:
    """The graph in 8 bits, and an input that calibrated it."""
    step = QuantizeLinear(activations="static", smooth="off")
    ctx = Context(TARGET, capabilities=OnnxRuntime())
    candidates = [found for found in step.candidates(graph, ctx) if found.refusal is None]
    samples = [[torch.from_numpy(normal(2, 8, 12, 12, seed=seed))] for seed in range(4)]
    stats = collect(graph, samples, {node for found in candidates for node in step.observed(graph, found)})
    changed = graph.copy()
    for found in candidates:
        step.apply(changed, found, stats)
    for tidy in tidying_pipeline():
        tidy.run(changed, ctx)
    changed.prune()
    return changed, samples[0][0], ctx


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        (residual, {"QLinearConv": 6, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1}),
        (inverted, {"QLinearConv": 8, "QLinearAdd": 2}),
        (branches, {"QLinearConv": 6, "QLinearConcat": 1, "QLinearAveragePool": 1, "QLinearMul": 1}),
    ],
)
def test_nothing_is_left_in_floats(build: Callable[[], Graph], wanted: dict[str, int], tmp_path: Path) -> None:
    graph, _, _ = whole(build())
    found = kernels(graph, tmp_path)
    assert {name: found[name] for name in wanted} == wanted
    assert not FLOATS & set(found)
    assert found["QuantizeLinear"] == 1 and found["DequantizeLinear"] <= 1


@pytest.mark.parametrize("build", [residual, inverted, branches])
def test_the_loss_is_that_of_eight_bits(build: Callable[[], Graph]) -> None:
    original = build()
    graph, x, _ = whole(original)
    before, after = original.run([x])[0], graph.run([x])[0]
    assert (after - before).square().sum() < 3e-3 * (before - before.mean()).square().sum()


def one_operator(name: str, arguments: tuple[Any, ...]) -> tuple[Graph, list[torch.Tensor]]:
    """A graph that is one fxopt operator, and the tensors it takes at run time."""
    tensors = [item for item in arguments if isinstance(item, torch.Tensor)]
    if isinstance(arguments[0], list):
        tensors = arguments[0]
    inputs = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, list(t.shape)) for i, t in enumerate(tensors)]
    rank = all_ops()[name].function(*arguments).dim()
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)]
    body = helper.make_graph([helper.make_node("Identity", ["x0"], ["y"])], "one", inputs, outputs)
    graph = load(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    identity = next(graph.calls())
    names = iter(graph.placeholders)
    operands = [
        next(names) if isinstance(item, torch.Tensor) else list(names) if item is tensors else item
        for item in arguments
    ]
    new = graph.call(all_ops()[name].target, tuple(operands), before=identity, made_by="test")
    graph.replace(identity, new)
    return graph, tensors


@pytest.mark.parametrize("name", ["add_a8", "mul_a8", "concat_a8", "global_average_pool_a8", "average_pool_a8"])
def test_kernels_agree_with_the_definition_to_one_level(name: str, tmp_path: Path) -> None:
    operator = all_ops()[name]
    for index, arguments in enumerate(operator.sample_arguments()):
        graph, inputs = one_operator(name, arguments)
        if all(tensor.numel() for tensor in inputs):
            assert any(kernel.startswith("QLinear") for kernel in kernels(graph, tmp_path)), index
        theirs = OnnxRuntime().compile(graph, TARGET, threads=1).run(inputs)[0]
        ours = operator.function(*arguments)
        assert theirs.shape == ours.shape
        level = arguments[-2]
        off = torch.round((theirs - ours).abs() / level)
        assert not off.numel() or off.max() <= 1, (index, off.max())
        assert not off.numel() or (off > 0).double().mean() < 0.01, index  # halves that float32 rounds the other way


@pytest.mark.parametrize(
    "op_type", ["MaxPool", "Reshape", "Transpose", "Slice", "Gather", "Flatten", "Squeeze", "Unsqueeze"]
)
def test_operators_that_move_or_select_keep_the_levels(op_type: str, tmp_path: Path) -> None:
    net = Net()
    x = net.add("Relu", net.conv("x", 8, 8))
    if op_type == "MaxPool":
        x = net.add(op_type, x, kernel_shape=[2, 2], strides=[2, 2])
    elif op_type == "Reshape":
        x = net.add(op_type, x, net.constant(np.array([0, 8, 6, 24])))
    elif op_type == "Transpose":
        x = net.add(op_type, x, perm=[0, 1, 3, 2])
    elif op_type == "Slice":
        x = net.add(op_type, x, *(net.constant(np.array([value])) for value in (2, 9, 3)))
    elif op_type == "Gather":
        x = net.add(op_type, x, net.constant(np.array([5, 1, 0])), axis=2)
    else:
        x = net.add("Unsqueeze", x, net.constant(np.array([0])))
        x = net.add("Squeeze", x, net.constant(np.array([0])))
    if op_type == "Flatten":
        x = net.add("Flatten", x, axis=1)
        y = net.add("Gemm", x, net.constant(normal(4, 8 * 144)), net.constant(normal(4)), transB=1)
    else:
        y = net.conv(x, 8, 8)
    graph, _, _ = whole(net.graph(y, 2 if op_type == "Flatten" else 4))
    found = kernels(graph, tmp_path)
    assert found["QuantizeLinear"] == 1 and found["DequantizeLinear"] <= 1, found


@pytest.mark.parametrize(("channels", "size"), [(32, 3), (33, 3), (16, 5), (8, 7)])
def test_depthwise_kernels_do_not_saturate(channels: int, size: int) -> None:
    """Codes of 127 and activations of 255: sums of two products exceed 16 bits."""
    net = Net(channels)
    y = net.conv("x", channels, channels, size, group=channels)
    graph = net.graph(y)
    conv = next(graph.calls())
    codes = torch.full((channels, 1, size, size), 127, dtype=torch.int8)
    codes[1::2] = -127
    constants = graph.add_constant(codes, "codes"), graph.add_constant(torch.full((channels,), 0.01), "scales")
    y_scale = 127 * 255 * size * size * 0.01 * 0.1 / 120
    shape = ([1, 1], [size // 2] * 4, [1, 1], channels)
    arguments = (conv.args[0], *constants, None, 0.1, 0, y_scale, 128, *shape)
    new = graph.call(all_ops()["conv_w8a8"].target, arguments, before=conv, made_by="test")
    graph.replace(conv, new)
    x = torch.full((1, channels, 12, 12), 25.5)
    ours, theirs = graph.run([x])[0], OnnxRuntime().compile(graph, TARGET, threads=1).run([x])[0]
    assert (ours - theirs).abs().max() <= 1.001 * y_scale


def test_depthwise_convolutions_are_summed_in_32_bits() -> None:
    graph = inverted()
    step = QuantizeLinear()
    sums = Counter(found.setting["sums"] for found in step.candidates(graph, Context(TARGET)))
    assert sums == {16: 6, 32: 2}


# ---- refusals


def test_an_addition_of_floats_is_refused() -> None:
    net = Net()
    y = net.add("Add", net.conv("x", 8, 8), net.add("Tanh", "x"))
    graph, _, ctx = whole(net.graph(net.add("Tanh", y)))
    found = [verdict for verdict in ctx.ledger.verdicts if verdict.pass_name == "quantize-between"]
    assert [verdict.outcome for verdict in found] == ["refused"] and "is not computed in 8 bits" in found[0].reason
    assert "add_a8" not in str(graph.fx)


def test_an_addition_whose_value_floats_take_is_refused() -> None:
    net = Net()
    y = net.add("Add", net.conv("x", 8, 8), net.conv("x", 8, 8))
    _, _, ctx = whole(net.graph(net.add("Tanh", y)))
    found = [verdict for verdict in ctx.ledger.verdicts if verdict.pass_name == "quantize-between"]
    assert [verdict.reason for verdict in found] == ["what takes its value is not computed in 8 bits"]


def test_a_graph_without_eight_bit_operators_is_left_alone() -> None:
    graph = residual()
    before = str(graph.fx)
    for tidy in tidying_pipeline():
        assert tidy.run(graph, Context(TARGET)) == 0
    assert str(graph.fx) == before
