"""Predictions: monotone, additive over a graph, and deciding as the hardware does."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from benchmarks.common import RESULTS
from fxopt.cost_model.host import detect_host
from fxopt.cost_model.roofline import efficiency, peak, predict, predict_graph, rate
from fxopt.cost_model.targets import get_target, target_names
from fxopt.ir.graph import Graph
from fxopt.ir.ops.attention_pattern import attention_pattern, stripes
from fxopt.ir.target import Cost
from tests.cost_model.helpers import linears, onnx_graph, zeros

TARGETS = {name: get_target(name) for name in target_names()}
KINDS = ("linear", "conv", "conv.narrow", "attention", "norm", "norm.skip", "elementwise", "shape", "quantize", "other")
HOSTS = ("host", "x86-avx2", "x86-avx512", "x86-avx512-vnni", "x86-avx-vnni", "aarch64")

amounts = st.floats(0, 1e13)
targets = st.builds(
    lambda name, cores: dataclasses.replace(TARGETS[name], cores=cores),
    st.sampled_from(sorted(TARGETS)),
    st.integers(1, 64),
)
works = st.builds(
    Cost,
    amounts,
    amounts,
    st.sampled_from(["float32", "int8", "float16", "int64"]),
    st.sampled_from(KINDS),
    st.integers(0, 9),
)


@settings(max_examples=300, deadline=None)
@given(works, targets, amounts, amounts, st.integers(0, 5), amounts, amounts)
def test_more_work_never_takes_less_time(
    cost: Cost, target, flops: float, moved: float, launches: int, cold: float, colder: float
) -> None:
    more = dataclasses.replace(
        cost, flops=cost.flops + flops, bytes=cost.bytes + moved, launches=cost.launches + launches
    )
    before, after = predict(cost, target, cold), predict(more, target, cold + colder)
    assert after.seconds >= before.seconds * (1 - 1e-12)
    assert 0 <= before.low <= before.seconds <= before.high


@settings(max_examples=200, deadline=None)
@given(works, st.sampled_from(HOSTS), st.integers(1, 63))
def test_more_cores_never_take_more_time(cost: Cost, name: str, cores: int) -> None:
    fewer, more = (dataclasses.replace(TARGETS[name], cores=count) for count in (cores, cores + 1))
    assert predict(cost, more).seconds <= predict(cost, fewer).seconds * (1 + 1e-12)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_product_takes_what_the_formula_says(name: str) -> None:
    target = dataclasses.replace(TARGETS[name], cores=1)
    cost = Cost(1e12, 1.0, "float32", "linear", 3)
    expected = 1e12 / (target.peak["float32"] * target.efficiency["linear"]) + 3 * target.launch_seconds
    found = predict(cost, target)
    assert found.seconds == pytest.approx(expected, rel=1e-6)
    assert found.bound == "compute"
    assert (found.low, found.high) == pytest.approx(
        (found.seconds * (1 - target.interval), found.seconds * (1 + target.interval))
    )


def test_bounds() -> None:
    target = TARGETS["a100"]
    assert predict(Cost(1e6, 1e9), target).bound == "memory"
    assert predict(Cost(1, 1), target).bound == "launch"
    assert predict(Cost(1e14, 1, "float16", "linear"), target).bound == "compute"


def test_tiny_operators_do_not_spread_over_cores() -> None:
    target = dataclasses.replace(TARGETS["x86-avx2"], cores=32)
    single = dataclasses.replace(target, cores=1)
    cost = Cost(1000, 1000)
    assert predict(cost, target) == predict(cost, single)
    big = Cost(1e10, 1e6, "float32", "linear")
    assert 20 < predict(big, single).seconds / predict(big, target).seconds < 32


def test_cold_bytes_come_from_main_memory() -> None:
    target = dataclasses.replace(TARGETS["x86-avx2"], cores=1)
    warm, cold = predict(Cost(0, 1e6), target), predict(Cost(0, 1e6), target, 1e6)
    assert cold.seconds - warm.seconds == pytest.approx(1e6 / target.bandwidth - 1e6 / target.cache_bandwidth)


# ---- rates


def test_rates_of_types_that_a_target_does_not_list() -> None:
    a100, avx2 = TARGETS["a100"], TARGETS["x86-avx2"]
    assert peak(a100, "float8_e4m3fn") == a100.peak["float16"]
    assert peak(TARGETS["h100"], "float8_e4m3fn") == TARGETS["h100"].peak["float8"]
    assert peak(a100, "uint8") == peak(a100, "s8s8") == a100.peak["int8"]
    assert peak(avx2, "bfloat16") == avx2.peak["float32"]
    assert peak(avx2, "float64") == avx2.peak["float32"] / 2
    assert peak(avx2, "int64") == avx2.peak["float32"]


def test_refined_kinds_fall_back_to_their_family() -> None:
    a100, avx2 = TARGETS["a100"], TARGETS["x86-avx2"]
    assert efficiency(a100, "norm.skip") == a100.efficiency["norm"]
    assert efficiency(avx2, "conv.narrow", "int8") == avx2.efficiency["conv.narrow.int8"]
    assert efficiency(avx2, "conv.narrow", "float32") == avx2.efficiency["conv.narrow"]


@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512", "x86-avx512-vnni", "x86-avx-vnni"])
def test_signs_of_integer_products_matter_on_x86(name: str) -> None:
    fast, unsigned, signed = (rate(Cost(1, 1, dtype, "linear"), TARGETS[name]) for dtype in ("int8", "uint8", "s8s8"))
    assert fast > unsigned > signed
    assert signed < rate(Cost(1, 1, "float32", "linear"), TARGETS[name])


# ---- graphs


def test_a_graph_is_the_sum_of_its_rows() -> None:
    target = detect_host(1)
    found = predict_graph(linears(64, [256, 512, 128]), target)
    assert found.total.seconds == pytest.approx(sum(row.prediction.seconds for row in found.rows))
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert found.macs == 64 * (256 * 512 + 512 * 128)
    assert found.weight_bytes == 4 * (256 * 512 + 512 * 128 + 512 + 128)
    assert [row.op for row in found.rows] == ["MatMul", "Add"] * 2
    assert found.rows[0].node  # the name that a user knows
    assert found.total.bound == "compute"


@pytest.mark.parametrize("name", ["x86-avx2", "a100"])
def test_twice_the_layers_take_twice_the_time(name: str) -> None:
    target = dataclasses.replace(TARGETS[name], cores=1)
    once, twice = (predict_graph(linears(64, [256] * (layers + 1)), target) for layers in (4, 8))
    assert twice.total.seconds == pytest.approx(2 * once.total.seconds)
    assert twice.macs == 2 * once.macs


def test_weights_beyond_the_cache_are_read_from_memory() -> None:
    target = dataclasses.replace(TARGETS["x86-avx2"], cores=1)
    graph = linears(1, [1024, 1024])
    small = dataclasses.replace(target, cache_bytes=2**20)
    assert predict_graph(graph, small).total.seconds > 1.5 * predict_graph(graph, target).total.seconds


def test_an_empty_graph_takes_no_time() -> None:
    graph = onnx_graph([helper.make_node("Identity", ["x"], ["y"])], {"x": [4]}, {})
    found = predict_graph(graph, TARGETS["a100"])
    assert found.total.seconds == 0 and found.rows[0].share == 0


# ---- decisions


def gain(rows: int, widths: list[int], name: str) -> float:
    """Predicted time in float over that of the dynamically quantised form."""
    target = TARGETS[name] if name != "host" else detect_host(1)
    plain, int8 = (predict_graph(linears(rows, widths, quantised), target) for quantised in (False, True))
    return plain.total.seconds / int8.total.seconds


@pytest.mark.parametrize("name", HOSTS)
def test_integers_pay_for_a_large_linear(name: str) -> None:
    assert gain(128, [384, 1536], name) > 1.5
    assert gain(1, [768, 3072], name) > 1.5


@pytest.mark.parametrize("name", [*HOSTS, "a100"])
def test_integers_do_not_pay_for_a_tiny_linear(name: str) -> None:
    assert gain(16, [64, 10], name) < 0.9


def test_integers_on_a_gpu() -> None:
    assert gain(4096, [4096, 4096], "a100") > 1.5
    assert gain(16, [64, 64], "a100") < 0.9


def residual(op: str) -> Graph:
    nodes = [helper.make_node(op, ["a", "b"], ["s"]), helper.make_node("LayerNormalization", ["s", "g"], ["y"])]
    return onnx_graph(nodes, {"a": [1, 128, 384], "b": [1, 128, 384]}, {"g": zeros(384)})


def test_the_slow_fusion_of_onnx_runtime_is_priced() -> None:
    fused, apart = (predict_graph(residual(op), TARGETS["x86-avx2"]).total.seconds for op in ("Add", "Sum"))
    assert fused > 3 * apart


@pytest.mark.parametrize("cores", [1, 2])
def test_attention_patterns_are_priced_as_they_were_measured(cores: int) -> None:
    """Against dense attention, on one core and on two; on GPUs the backend knows better."""
    target = dataclasses.replace(get_target("x86-avx512-vnni"), cores=cores)
    q = torch.empty(1, 6, 1024, 64, device="meta")
    dense = predict(Cost(4.0 * 6 * 1024**2 * 64, 0.0, "float32", "attention"), target).seconds
    for row in json.loads((RESULTS / "attention_patterns.json").read_text(encoding="utf-8"))["densities"]:
        if (row["length"], row["threads"], row["pattern"]) == (1024, cores, "stripe"):
            every = list(stripes(64, int(1024 * row["work"]))) * 6
            cost = attention_pattern.cost_of(q, q, q, every, 0.125)
            found = predict(dataclasses.replace(cost, bytes=0.0), target).seconds
            assert found / dense == pytest.approx(row["onnxruntime"], abs=0.15)
    gpu = get_target("a100")
    assert efficiency(gpu, "attention.pattern") == efficiency(gpu, "attention")
