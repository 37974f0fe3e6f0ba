"""quantize-linear on the weights of convolutions alone: GPTQ over patches, its storage, its form in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.onnxruntime.session import make_session
from fxopt.errors import InvalidOption
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.ops.conv_nbits import conv_nbits
from fxopt.ir.packing import unpack
from fxopt.ir.shapes import infer
from fxopt.ir.views.conv import Conv, convs
from fxopt.passes.base import Context
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.quantize_linear.gptq import nearest
from fxopt.passes.quantize_linear.grids import group_grid, quantize_weight
from fxopt.passes.quantize_linear.patches import patches
from fxopt.passes.quantize_linear.rounding import Rounding, eight_bit_codes
from fxopt.passes.sequential import SequentialRun
from fxopt.passes.stats import Stats, collect
from fxopt.testing import PLAIN_CPU, assert_refuses, candidates
from tests.conftest import mlp
from tests.passes.helpers import torch_graph
from tests.passes.test_quantize_linear import AVX2

SHAPES = {  # weight, groups, attributes
    "square": ((8, 6, 3, 3), 1, {"pads": [1, 1, 1, 1]}),
    "grouped": ((8, 3, 3, 3), 2, {"pads": [0, 1, 2, 1], "strides": [2, 1]}),
    "depthwise": ((6, 1, 3, 3), 6, {"dilations": [2, 1]}),
    "product": ((10, 6, 1, 1), 1, {}),
}


def conv_model(kind: str = "square", opset: int = 20, dtype: Any = np.float32, weight: Any = None) -> onnx.ModelProto:
    """x [n, 6, 9, 8] -> Conv -> Relu -> y."""
    shape, groups, attributes = SHAPES[kind]
    generator = np.random.default_rng(1)
    weights = {
        "w": generator.normal(size=shape).astype(dtype) if weight is None else weight,
        "b": generator.normal(size=shape[0]).astype(dtype),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", group=groups, **attributes),
        helper.make_node("Relu", ["c"], ["y"], "relu"),
    ]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    body = helper.make_graph(
        nodes, "convolution",
        [helper.make_tensor_value_info("x", element, ["n", 6, 9, 8])],
        [helper.make_tensor_value_info("y", element, [None] * 4)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def images(count: int = 4, dtype: torch.dtype = torch.float32, channels: int = 6) -> list[list[torch.Tensor]]:
    """Images of few directions: neighbouring channels and pixels are alike."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(2, channels, generator=torch.Generator().manual_seed(99))
        plain = torch.einsum("nkhw,kc->nchw", torch.randn(3, 2, 9, 8, generator=generator), mix)
        smooth = plain + plain.roll(1, 2) + plain.roll(1, 3)
        found.append([(smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).to(dtype)])
    return found


def prepared(model: onnx.ModelProto | Graph) -> Graph:
    graph = model if isinstance(model, Graph) else load(model)
    infer(graph, {"n": 3})
    return graph


def applied(graph: Graph, step: QuantizeLinear, samples: list[list[torch.Tensor]]) -> tuple[Graph, Any, Stats]:
    """A copy after the pass, with its candidate and statistics."""
    after = graph.copy()
    (candidate,) = step.candidates(after, Context(PLAIN_CPU, capabilities=OnnxRuntime()))
    assert candidate.refusal is None, candidate.refusal
    stats = collect(after, samples, step.observed(after, candidate))
    node = step.moments(after, candidate)
    if node is not None:
        walk = SequentialRun(after, samples)
        stats.moments = {node.name: walk.moments(node, step.moment_rows(after, candidate))}
    step.apply(after, candidate, stats)
    after.prune()
    infer(after, {"n": 3})
    return after, candidate, stats


def noise(graph: Graph, after: Graph, samples: list[list[torch.Tensor]]) -> float:
    before, result = (torch.cat([run.run(sample)[0] for sample in samples]).double() for run in (graph, after))
    return float((result - before).square().sum() / (before - before.mean()).square().sum())


def view_in(graph: Graph) -> Conv:
    (view,) = convs(graph)
    assert isinstance(view, Conv)
    return view


@pytest.mark.parametrize("kind", SHAPES)
def test_a_convolution_is_a_linear_over_its_patches(kind: str) -> None:
    graph = prepared(conv_model(kind))
    view, (x,) = view_in(graph), images()[0]
    weight = view.weight(graph)
    rows = patches(x.double(), view, tuple(weight.shape[2:]))
    assert rows.shape[0] == view.groups and rows.shape[2] == weight[0].numel()
    products = rows @ weight.double().flatten(1).reshape(view.groups, -1, rows.shape[2]).mT  # [groups, n, out / groups]
    flat = products.permute(1, 0, 2).reshape(len(x), -1, weight.shape[0]).mT
    bias = view.bias(graph)
    assert bias is not None
    found = (flat + bias[:, None]).relu()
    assert torch.allclose(found, graph.run([x])[0].double().flatten(2), atol=1e-4)


def test_moments_are_those_of_the_patches() -> None:
    graph, samples = prepared(conv_model("grouped")), images()
    view = view_in(graph)
    rows = torch.cat([patches(x.double(), view, (3, 3)) for [x] in samples], 1)
    step = QuantizeLinear(bits=4)
    (candidate,) = candidates(step, graph)
    found = SequentialRun(graph, samples).moments(view.x, step.moment_rows(graph, candidate))
    assert found.shape == (2, 27, 27)
    torch.testing.assert_close(found, 2 / rows.shape[1] * rows.mT @ rows)


STEPS = [
    QuantizeLinear(bits=bits, group=group, symmetric=symmetric, method=method, activations=activations)
    for bits, activations in ((2, "auto"), (3, "auto"), (4, "auto"), (8, "float"))
    for group, symmetric, method in ((16, True, "gptq"), (20, False, "gptq"), (0, True, "rtn"), (32, False, "rtn"))
]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_onnxruntime_folds_the_weight_and_gives_what_is_defined(
    kind: str, step: QuantizeLinear, tmp_path: Path
) -> None:
    """Groups of 16 and 20 divide neither 54 inputs nor 27, 9 or 6."""
    graph, samples = prepared(conv_model(kind)), images()
    after, candidate, stats = applied(graph, step, samples)
    assert str(next(iter(after.calls())).target) == "fxopt.conv_nbits.default"
    executable = OnnxRuntime().compile(after, PLAIN_CPU, threads=1)
    for [x] in samples:
        assert torch.allclose(executable.run([x])[0], after.run([x])[0], atol=1e-4)
    executable.save(tmp_path / "model.onnx")
    executable.close()
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
    make_session(tmp_path / "model.onnx", 1, tmp_path / "run.onnx")
    run = Counter(node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node)
    assert not set(run) & {"BitShift", "Mod", "Cast", "Mul", "Sub", "Slice", "Reshape"}, run
    assert 0 < noise(graph, after, samples) < {2: 1.0, 3: 0.3, 4: 0.05, 8: 1e-3}[step.bits or 8]
    estimate = step.estimate(graph, candidate, stats)
    assert estimate.saved_bytes == graph.size_bytes() - after.size_bytes()
    assert estimate.before == estimate.after and estimate.error < 1


@pytest.mark.parametrize("arguments", list(conv_nbits.sample_arguments()), ids=lambda item: str(list(item[0].shape)))
def test_the_definition_is_a_convolution_in_float64(arguments: tuple[Any, ...]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, packed, scales, zeros, bias, inner, bits, group, stride, pads, dilation, groups = arguments
    codes = unpack(packed, bits, int(np.prod(inner))).numpy().astype(np.float64)
    centre = float(1 << (bits - 1)) if zeros is None else np.repeat(zeros.numpy(), group, 1)[:, : codes.shape[1]]
    weight = (codes - centre) * np.repeat(scales.double().numpy(), group, 1)[:, : codes.shape[1]]
    rank = len(inner) - 1
    ordered = [pad for axis in reversed(range(rank)) for pad in (pads[axis], pads[axis + rank])]
    convolve = getattr(torch.nn.functional, f"conv{rank}d")
    wide = torch.from_numpy(weight.reshape(-1, *inner))
    shift = None if bias is None else bias.double()
    expected = convolve(torch.nn.functional.pad(x.double(), ordered), wide, shift, stride, 0, dilation, groups)
    found = conv_nbits(*arguments)
    assert found.dtype == x.dtype and torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)
    with FakeTensorMode() as mode:
        fake = conv_nbits(*(mode.from_tensor(item) if isinstance(item, torch.Tensor) else item for item in arguments))
    assert (fake.shape, fake.dtype) == (found.shape, found.dtype)
    cost = conv_nbits.cost_of(*arguments)
    assert cost.multiply_adds == found[:, 0].numel() * packed.shape[0] * int(np.prod(inner))


@given(
    st.integers(1, 12), st.integers(1, 70), st.sampled_from([16, 32, 48, 256]), st.sampled_from([2, 3, 4, 8]),
    st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_diagonal_moments_round_to_nearest(
    out: int, columns: int, group: int, bits: int, symmetric: bool, act_order: bool, seed: int
) -> None:
    """Nothing can be compensated: GPTQ is rounding to nearest, code by code, whatever the groups."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    moments = torch.diag(torch.rand(columns, generator=generator, dtype=torch.float64) + 0.01)
    rounding = Rounding(bits, group, symmetric, act_order)
    node = torch.fx.Graph().placeholder("x")
    for found, wanted in zip(
        rounding.packed(weight, moments, node, Stats()), rounding.packed(weight, None, node, Stats()), strict=True
    ):
        assert torch.equal(found, wanted)
    grid = group_grid(weight, bits, group, symmetric)
    assert torch.equal(unpack(rounding.packed(weight, None, node, Stats())[0], bits, columns), nearest(weight, grid))


@pytest.mark.parametrize("kind", ["square", "grouped", "product"])
@pytest.mark.parametrize("group", [16, 0])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_nearer_than_rounding(kind: str, group: int, act_order: bool) -> None:
    """On images whose channels and pixels are alike, those that calibrated nothing too."""
    graph, every = prepared(conv_model(kind)), images(12)
    errors = []
    for method in ("rtn", "gptq"):
        step = QuantizeLinear(bits=3, group=group, method=method, act_order=act_order)
        after, _, _ = applied(graph, step, every[:6])
        errors.append(noise(graph, after, every[6:]))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("kind", SHAPES)
def test_eight_bit_codes_of_diagonal_moments_are_the_nearest(kind: str) -> None:
    shape, groups, _ = SHAPES[kind]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    codes, scales = quantize_weight(weight)
    columns = weight[0].numel()
    spread = torch.rand(groups, columns, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 0.01
    node = torch.fx.Graph().placeholder("x")
    found = eight_bit_codes(weight.flatten(1), scales, torch.diag_embed(spread), node, Stats())
    assert torch.equal(found.reshape(shape), codes)


@pytest.mark.parametrize("kind", ["square", "grouped", "product"])
def test_gptq_rounds_eight_bit_convolutions_better(kind: str) -> None:
    """The error of the weights alone, on images that calibrated nothing; the scales and all else are the same."""
    graph, every = prepared(conv_model(kind)), images(12)
    weights, rest = [], []
    for rounding in ("nearest", "gptq"):
        step = QuantizeLinear(activations="static", rounding=rounding, correct_bias="off")
        after, _, _ = applied(graph, step, every[:6])
        node = next(iter(after.calls()))
        _, codes, *others = node.args
        stored = [after.constant(value) if isinstance(value, torch.fx.Node) else value for value in (codes, *others)]
        rest.append(stored[1:])
        assert stored[0] is not None and stored[0].dtype == torch.int8 and int(stored[0].abs().max()) <= 127
        weights.append(stored[0].double() * stored[1].double().reshape(-1, 1, 1, 1))
    for old, new in zip(*rest, strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new
    view = view_in(graph)
    rows = torch.cat([patches(x.double(), view, weights[0].shape[2:]) for [x] in every[6:]], 1)
    errors = []
    for weight in weights:
        lost = (weight - view.weight(graph).double()).flatten(1).reshape(view.groups, -1, rows.shape[2])
        errors.append(float((rows @ lost.mT).square().sum()))
    assert errors[1] < 0.6 * errors[0]


def test_sixteen_bit_sums_keep_the_nearest_codes() -> None:
    """Where x86 lacks VNNI, two neighbours of one sign fill the sum: a code that moved would saturate it."""
    graph = prepared(conv_model())
    step = QuantizeLinear(activations="static", rounding="gptq")
    (plain,) = step.candidates(graph, Context(AVX2))
    (wide,) = step.candidates(graph, Context(PLAIN_CPU))
    assert step.moments(graph, plain) is None and "rounding" not in str(plain.setting)
    assert step.moments(graph, wide) is view_in(graph).x and "rounding=gptq" in str(wide.setting)
    with pytest.raises(InvalidOption, match="rounding='best'; expected one of"):
        QuantizeLinear(rounding="best")


@pytest.mark.parametrize("smooth", ["on", "off"])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_gptq_rounds_eight_bit_linears_better(activations: str, smooth: str) -> None:
    """On correlated inputs; smoothed inputs have smoothed moments."""
    mix = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    batches = [{"x": torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)) @ mix} for seed in range(8)]
    errors = []
    for rounding in ("nearest", "gptq"):
        step = QuantizeLinear(activations=activations, smooth=smooth, rounding=rounding)
        result = fxopt.optimize(mlp(64, 64), PLAIN_CPU, calibration=batches, budget=None, force=True, passes=[step])
        assert result.report.error is not None
        errors.append(result.report.error.noise_to_signal)
    assert errors[1] < 0.95 * errors[0]


def test_groups_of_channels_have_moments_of_their_own() -> None:
    """A group whose inputs are independent is rounded to nearest, the other one is not."""
    graph = prepared(
        conv_model("grouped", weight=np.random.default_rng(3).normal(size=(8, 3, 3, 3)).astype(np.float32))
    )
    view = view_in(graph)
    step = QuantizeLinear(bits=4, group=0)
    (candidate,) = candidates(step, graph)
    mixed = torch.randn(400, 27, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1)
    stats = Stats(moments={view.x.name: torch.stack([torch.eye(27, dtype=torch.float64), mixed.t() @ mixed])})
    codes = []
    for method in ("gptq", "rtn"):
        after = graph.copy()
        QuantizeLinear(bits=4, group=0, method=method).apply(after, candidate, stats)
        packed = next(after.calls()).args[1]
        stored = after.constant(packed)
        assert stored is not None
        codes.append(stored)
    assert torch.equal(codes[0][:4], codes[1][:4]) and not torch.equal(codes[0][4:], codes[1][4:])


def test_size_is_what_chooses_it(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = {f"w{index}": (generator.normal(size=(32, 32, 3, 3)) * 0.06).astype(np.float32) for index in range(3)}
    nodes = [
        helper.make_node("Conv", ["x" if index == 0 else f"c{index - 1}", f"w{index}"],
                         ["y" if index == 2 else f"c{index}"], f"conv{index}", pads=[1] * 4)
        for index in range(3)
    ]  # fmt: skip
    body = helper.make_graph(
        nodes, "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 32, 9, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 32, 9, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    batches = [{"x": sample[0][:2]} for sample in images(6, channels=32)]
    step = QuantizeLinear(bits=4)
    fast = fxopt.optimize(model, calibration=batches, threads=1, passes=[step], budget=0.1)
    assert {row.outcome for row in fast.ledger.select(node="conv")} == {"refused"}
    assert "does not pay: predicted" in next(iter(fast.ledger.select(node="^conv1$"))).reason
    small = fxopt.optimize(
        model, calibration=batches, threads=1, passes=[step], budget=0.1, objective="size", guard_seconds=0.5
    )
    assert {row.outcome for row in small.ledger.select(node="conv")} == {"applied"}
    small.save(tmp_path / "small.onnx")
    onnx.save(model, tmp_path / "float.onnx")
    assert (tmp_path / "small.onnx").stat().st_size < 0.2 * (tmp_path / "float.onnx").stat().st_size
    assert small.report.error is not None and small.report.error.noise_to_signal < 0.1
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": batches[0]["x"].numpy()})
    assert torch.allclose(torch.from_numpy(found), small.graph.run([batches[0]["x"]])[0], atol=1e-4)


def test_half_precision_and_torch_graphs() -> None:
    graph, samples = prepared(conv_model(dtype=np.float16)), images(dtype=torch.float16)
    step = QuantizeLinear(bits=4, group=16)
    after, _, _ = applied(graph, step, samples)
    assert after.run(samples[0])[0].dtype == torch.float16
    executable = OnnxRuntime().compile(after, PLAIN_CPU, threads=1)
    assert torch.allclose(executable.run(samples[0])[0], after.run(samples[0])[0], atol=0.05)
    executable.close()
    module = torch.nn.Sequential(torch.nn.Conv2d(6, 8, 3, padding=1), torch.nn.ReLU())
    graph = torch_graph(module.eval(), images()[0][0])
    after, _, _ = applied(graph, step, images())
    assert 0 < noise(graph, after, images()) < 0.05


INFINITE = np.full((8, 6, 3, 3), np.inf, np.float32)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (conv_model(dtype=np.float64), "type torch.float64"),
        (conv_model(weight=INFINITE), "infinite or NaN"),
        (conv_model(opset=9), "opset 9; unpacking codes needs 11"),
    ],
)
def test_refuses_with_a_reason(model: onnx.ModelProto, reason: str) -> None:
    if "opset" in reason:
        model.ir_version = 4
        model.graph.input.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in model.graph.initializer
        )
    assert_refuses(QuantizeLinear(bits=4), prepared(model), reason)


def test_dequantize_linear_would_be_run_at_every_call(tmp_path: Path) -> None:
    """Why the form has none: ONNX Runtime keeps it, though its inputs are constants."""
    weights = {"q": np.ones((8, 6, 3, 3), np.int8), "s": np.ones(8, np.float32)}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    body = helper.make_graph(
        nodes, "kept",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6, 9, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * 4)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    make_session(tmp_path / "m.onnx", 1, tmp_path / "run.onnx")
    assert "DequantizeLinear" in {node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node}
