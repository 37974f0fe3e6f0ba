"""quantize-linear: it fires, it refuses with a reason, its numbers are those of the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt.cost_model.targets import get_target
from fxopt.errors import InvalidOption
from fxopt.frontends.onnx import load
from fxopt.frontends.to_onnx import to_onnx
from fxopt.ir.error import noise_to_signal
from fxopt.ir.graph import Graph
from fxopt.ir.op import all_ops
from fxopt.ir.shapes import infer
from fxopt.ir.target import Target
from fxopt.passes.base import Context
from fxopt.passes.quantize_linear import QuantizeLinear, quantize_weight
from fxopt.passes.stats import Stats, collect

VNNI = Target(
    "vnni", "cpu", "x86-64", "onnxruntime", "test", "never measured", 0.3,
    {"float32": 1e11, "int8": 4e11}, 1e10, 1e-6, features=frozenset({"avx512_vnni"}),
)  # fmt: skip
AVX2 = Target(
    "avx2", "cpu", "x86-64", "onnxruntime", "test", "never measured", 0.3,
    {"float32": 1e11, "int8": 2e11}, 1e10, 1e-6, features=frozenset({"avx2"}),
)  # fmt: skip


def mlp(opset: int = 20, weight: Any = None) -> onnx.ModelProto:
    """x [n, 16] -> MatMul + Add -> Relu -> Gemm -> y [n, 5]."""
    generator = np.random.default_rng(0)
    weights = {
        "w1": generator.normal(size=(16, 24)).astype(np.float32) if weight is None else weight,
        "b1": generator.normal(size=24).astype(np.float32),
        "w2": generator.normal(size=(5, 24)).astype(np.float32),
        "b2": generator.normal(size=5).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], name="fc1"),
        helper.make_node("Add", ["m", "b1"], ["a"], name="fc1_bias"),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="fc2", transB=1),
    ]
    body = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def cnn(groups: int = 1, relu: bool = True) -> onnx.ModelProto:
    """x [n, 4, 9, 9] -> Conv (stride 2, pads 1) (-> Relu) -> y."""
    generator = np.random.default_rng(1)
    weights = {
        "w": generator.normal(size=(8, 4 // groups, 3, 3)).astype(np.float32),
        "b": generator.normal(size=8).astype(np.float32),
    }
    nodes = [
        helper.make_node(
            "Conv",
            ["x", "w", "b"],
            ["c" if relu else "y"],
            name="conv",
            pads=[1, 0, 1, 2],
            strides=[2, 1],
            group=groups,
        )
    ]
    if relu:
        nodes.append(helper.make_node("Relu", ["c"], ["y"], name="relu"))
    body = helper.make_graph(
        nodes,
        "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 5, 9])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def samples(graph: Graph, count: int = 4) -> list[list[torch.Tensor]]:
    """Normal inputs with n = 3."""
    generator = torch.Generator().manual_seed(0)
    shape = [3 if isinstance(dim, str) else int(dim or 0) for dim in graph.inputs[0].shape or ()]
    return [[torch.randn(shape, generator=generator)] for _ in range(count)]


def prepared(model: onnx.ModelProto, step: QuantizeLinear, target: Target = VNNI) -> tuple[Graph, list[Any], Stats]:
    """The graph, its candidates and statistics."""
    graph = load(model)
    infer(graph, {"n": 3})
    candidates = list(step.candidates(graph, Context(target)))
    nodes = {node for found in candidates if found.refusal is None for node in step.observed(graph, found)}
    return graph, candidates, collect(graph, samples(graph), nodes)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_replaces_matmul_add_and_gemm(kind: str) -> None:
    step = QuantizeLinear(activations=kind, smooth="off")
    graph, candidates, stats = prepared(mlp(), step)
    assert [found.anchor for found in candidates] == ["fc1_bias", "fc2"]
    before = graph.run(samples(graph)[0])[0]
    for found in candidates:
        step.apply(graph, found, stats)
    graph.prune()
    name = "fxopt.linear_w8a8_dynamic.default" if kind == "dynamic" else "fxopt.linear_w8a8.default"
    assert [str(node.target) for node in graph.calls()] == [name, "onnx('', 'Relu', 14)", name]
    after = graph.run(samples(graph)[0])[0]
    noise = (after - before).square().sum() / (before - before.mean()).square().sum()
    assert 0 < noise < 2e-3


@pytest.mark.parametrize(("groups", "relu"), [(1, True), (4, True), (1, False)])
def test_replaces_a_convolution_with_its_relu(groups: int, relu: bool) -> None:
    step = QuantizeLinear()
    graph, candidates, stats = prepared(cnn(groups, relu), step)
    assert [(found.anchor, found.setting["activations"]) for found in candidates] == [("conv", "static")]
    before = graph.run(samples(graph)[0])[0]
    estimate = step.estimate(graph, candidates[0], stats)
    step.apply(graph, candidates[0], stats)
    assert [str(node.target) for node in graph.calls()] == ["fxopt.conv_w8a8.default"]
    after = graph.run(samples(graph)[0])[0]
    noise = ((after - before).square().sum() / (before - before.mean()).square().sum()).item()
    assert 0 < noise < 2e-3
    assert noise == pytest.approx(estimate.error, rel=1.0)


def test_the_estimate_is_near_the_measured_error() -> None:
    step = QuantizeLinear(activations="dynamic")
    graph, candidates, stats = prepared(mlp(), step)
    for found in candidates:
        changed = graph.copy()
        before = graph.run(samples(graph)[0])[0]
        step.apply(changed, found, stats)
        after = changed.run(samples(graph)[0])[0]
        noise = ((after - before).square().sum() / (before - before.mean()).square().sum()).item()
        assert noise == pytest.approx(step.estimate(graph, found, stats).error, rel=1.5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mlp(opset=11), "the model has opset 11; per-channel quantisation needs 13"),
        (mlp(weight=np.full((16, 24), np.inf, np.float32)), "the weight holds infinite or NaN values"),
    ],
)
def test_refuses_with_the_reason(model: onnx.ModelProto, message: str) -> None:
    refusals = {str(found.refusal) for found in QuantizeLinear().candidates(load(model), Context(VNNI))}
    assert message in refusals


def test_refuses_a_weight_that_is_computed_at_run_time() -> None:
    nodes = [
        helper.make_node("Exp", ["x"], ["e"]),
        helper.make_node("Gemm", ["x", "e"], ["y"], name="gemm", transB=1),
    ]
    info = helper.make_tensor_value_info
    body = helper.make_graph(nodes, "g", [info("x", TensorProto.FLOAT, [4, 4])], [info("y", TensorProto.FLOAT, [4, 4])])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = list(QuantizeLinear().candidates(load(model), Context(VNNI)))
    assert [row.anchor for row in found] == ["gemm"]
    assert "computed at run time" in str(found[0].refusal)


def test_an_input_that_is_one_number_has_no_range() -> None:
    step = QuantizeLinear(smooth="off")
    graph, candidates, _ = prepared(mlp(), step)
    first = [found for found in candidates if found.anchor == "fc1_bias" and found.refusal is None]
    nodes = {node for found in first for node in step.observed(graph, found)}
    stats = collect(graph, [[torch.zeros(3, 16)]] * 2, nodes)
    said = {found.setting["activations"]: str(step.estimate(graph, found, stats).refusal) for found in first}
    assert said["static"] == "its input is 0 everywhere in every calibration sample: that is no range"
    assert said["dynamic"] == "None"


class Channels(torch.nn.Module):
    """A convolution, and linears over its channels with positions on two axes, as in ConvNeXt and Swin."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.conv = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, 3, h, w] -> [n, h, w, 16]; `shared`: the linear takes what the convolution takes."""
        if self.shared:
            first: torch.Tensor = self.up(x).sum() + self.conv(x).sum()
            return first
        down: torch.Tensor = self.down(torch.relu(self.up(self.conv(x).permute(0, 2, 3, 1))))
        return down


@pytest.mark.parametrize(
    "step",
    [QuantizeLinear(), QuantizeLinear(smooth="on"), QuantizeLinear(bits=4, group=16), QuantizeLinear(rounding="gptq")],
)
def test_linears_over_images_are_calibrated_by_rows(step: QuantizeLinear) -> None:
    data = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(index)) for index in range(4)]
    model = Channels().eval()
    found = fxopt.optimize(
        model, "host", example_inputs=(data[0],), calibration=data, passes=[step], budget=None, objective="size",
        guard_seconds=0.1,
    )  # fmt: skip
    done = {row.node for row in found.ledger.select(outcome="applied", pass_name="quantize-linear")}
    assert {"up/Add", "down/Add"} <= {name.replace("MatMul", "Add") for name in done}
    assert noise_to_signal(model(data[3]), found(data[3])) < 0.02


def test_a_linear_that_shares_its_input_with_a_convolution_is_refused() -> None:
    x = torch.randn(1, 3, 16, 16)
    graph, _ = to_onnx(Channels(shared=True).eval(), (x,), verify=False)
    said = {str(found.refusal) for found in QuantizeLinear().candidates(graph, Context(VNNI))}
    assert "a convolution takes its input too: their features lie on different axes" in said


def test_excluded_nodes_are_refused() -> None:
    import re

    found = list(QuantizeLinear().candidates(load(mlp()), Context(VNNI, exclude=re.compile("fc1"))))
    assert {row.anchor for row in found if row.refusal is None} == {"fc2"}
    assert "excluded by --exclude fc1" in {str(row.refusal) for row in found}


def test_neutral_setting_offers_nothing() -> None:
    assert list(QuantizeLinear(bits=None).candidates(load(mlp()), Context(VNNI))) == []


@pytest.mark.parametrize(
    "options", [{"bits": 5}, {"activations": "sometimes"}, {"correct_bias": "perhaps"}, {"ranges": "some"}]
)
def test_illegal_options(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="expected"):
        QuantizeLinear(**options)


def test_pairs_of_codes_leave_room_where_the_instruction_set_saturates() -> None:
    for target, sums in ((VNNI, 32), (AVX2, 16), (get_target("wasm"), 32), (get_target("wasm-relaxed"), 7)):
        found = {each.setting["sums"] for each in QuantizeLinear().candidates(load(mlp()), Context(target))}
        assert found == {sums}


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 7),
    inner=st.integers(1, 9),
    sums=st.sampled_from([7, 16, 32]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 1000),
)
def test_weight_codes_reconstruct_within_half_a_step(out: int, inner: int, sums: int, exponent: int, seed: int) -> None:
    weight = torch.randn(out, inner, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codes, scales = quantize_weight(weight, sums)
    assert codes.dtype == torch.int8 and codes.abs().max() <= (63 if sums == 7 else 127)
    error = (codes.double() * scales.double()[:, None] - weight.double()).abs()
    assert bool((error <= scales.double()[:, None] * (0.5 + 1e-5)).all())


def test_zero_rows_have_a_legal_scale() -> None:
    codes, scales = quantize_weight(torch.zeros(3, 4))
    assert bool((codes == 0).all()) and bool((scales > 0).all())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.one_of(
        st.tuples(st.integers(1, 6), st.integers(1, 65)),
        st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3)),
    ),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
)
def test_sums_of_pairs_do_not_saturate_sixteen_bits(seed: int, shape: tuple[int, ...], spread: float) -> None:
    """vpmaddubsw adds the products of two neighbours, u8 * s8, in int16: the worst activations still fit."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))
    codes = quantize_weight(weight, 16)[0].long()
    orders = [codes.flatten(1)]
    if len(shape) > 2:
        orders += [codes.movedim(1, -1).flatten(1), codes.movedim(1, -1).flatten(0, -2)]
    for order in orders:
        padded = torch.nn.functional.pad(order, (0, order.shape[1] % 2)).unflatten(1, (-1, 2))
        assert 255 * padded.clamp(min=0).sum(-1).max() <= 2**15 - 1
        assert 255 * padded.clamp(max=0).sum(-1).min() >= -(2**15)


def test_pairs_cost_less_than_seven_bits() -> None:
    """Normal weights: the step is two thirds of that of codes in -63 ... 63."""
    weight = torch.randn(64, 384, generator=torch.Generator().manual_seed(0))
    steps = quantize_weight(weight, 16)[1] / (weight.abs().amax(1) / 63)
    assert steps.max() < 1.0 and steps.mean() < 0.7


@pytest.mark.parametrize("name", ["linear_w8a8", "linear_w8a8_dynamic", "conv_w8a8"])
def test_operators_agree_with_an_integer_computation(name: str) -> None:
    """The definition against plain int64 arithmetic on its own samples (odd, empty and strided shapes included)."""
    declared = all_ops()[name]
    for arguments in declared.sample_arguments():
        result = declared(*arguments)
        assert result.dtype == arguments[0].dtype
        assert torch.equal(
            result, declared(*(value.clone() if isinstance(value, torch.Tensor) else value for value in arguments))
        )
        if name == "linear_w8a8" and arguments[0].numel():
            x, codes, scales, bias, scale, zero = arguments
            levels = (torch.round(x / scale) + zero).clamp(0, 255).long() - zero
            whole = (levels[..., None, :] * codes.long()).sum(-1)
            expected = whole.float() * (scales * scale) + (0 if bias is None else bias)
            assert torch.allclose(result, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["linear_w8a8", "linear_w8a8_dynamic", "conv_w8a8"])
def test_fake_rules_agree_with_the_definition(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    declared = all_ops()[name]
    for arguments in declared.sample_arguments():
        result = declared(*arguments)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]
            shaped = declared(*fake)
        assert (shaped.shape, shaped.dtype) == (result.shape, result.dtype)


def biased(outputs: int = 8) -> onnx.ModelProto:
    """x [n, 4, 9, 9] -> Conv (with a bias unless outputs is 6) -> y, whose channels rounding shifts: x is far from 0."""
    weight = np.random.default_rng(5).normal(size=(outputs, 4, 3, 3)).astype(np.float32)
    names = ["x", "w", "b"] if outputs != 6 else ["x", "w"]
    body = helper.make_graph(
        [helper.make_node("Conv", names, ["y"], name="conv")],
        "cnn",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 9, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", outputs, 7, 7])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.ones(outputs, np.float32), "b")],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("outputs", [8, 6])
def test_the_bias_of_a_convolution_makes_up_for_a_shifted_mean(outputs: int) -> None:
    shifts = {}
    for switch in ("on", "off", "auto"):
        step = QuantizeLinear(correct_bias=switch, ranges="minmax")
        graph = load(biased(outputs))
        infer(graph, {"n": 3})
        candidate = next(iter(step.candidates(graph, Context(VNNI))))
        given = [[(value + 4) * 2 for value in sample] for sample in samples(graph)]
        stats = collect(graph, given, step.observed(graph, candidate))
        before = graph.run(given[0])[0]
        step.apply(graph, candidate, stats)
        shifts[switch] = (graph.run(given[0])[0] - before).mean((0, 2, 3)).abs().mean().item()
    assert shifts["auto"] == shifts["on"] < 0.3 * shifts["off"]


def test_outliers_of_a_convolution_are_clipped_by_least_squares() -> None:
    """Normal values, whose rare extremes would waste levels."""
    step = QuantizeLinear()
    graph = load(cnn())
    infer(graph, {"n": 3})
    candidate = next(iter(step.candidates(graph, Context(VNNI))))
    assert candidate.setting["ranges"] == "mse"
    nodes = step.observed(graph, candidate)
    assert step.clipped(graph, candidate) == nodes
    given = samples(graph, 40)
    stats = collect(graph, given, nodes, histograms=nodes)
    step.apply(graph, candidate, stats)
    made = next(iter(graph.calls()))
    assert made.args[4] < 0.97 * (stats[nodes[0]].maximum - stats[nodes[0]].minimum) / 255  # type: ignore[operator]
    plain = QuantizeLinear(ranges="minmax")
    assert not plain.clipped(load(cnn()), next(iter(plain.candidates(load(cnn()), Context(VNNI)))))


def test_a_convolution_along_one_axis_is_refused() -> None:
    info, weight = helper.make_tensor_value_info, np.ones((4, 4, 3), np.float32)
    body = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")],
        "one",
        [info("x", TensorProto.FLOAT, [1, 4, 9])],
        [info("y", TensorProto.FLOAT, [1, 4, 7])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = list(QuantizeLinear().candidates(load(model), Context(VNNI)))
    assert "moves along one axis" in str(found[0].refusal)


def test_few_bits_refuse_weights_that_are_not_finite() -> None:
    model = mlp(weight=np.full((16, 24), np.nan, np.float32))
    refusals = {str(found.refusal) for found in QuantizeLinear(bits=4, group=16).candidates(load(model), Context(VNNI))}
    assert "the weight holds infinite or NaN values" in refusals
