"""Attention between 8-bit linears is computed on bytes: asked for by `custom_ops`, with reasons where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt import own_attention
from fxopt.cost_model.targets import get_target
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.ops.attention_u8 import attention_u8
from fxopt.ir.ops.linear_u8s8 import quantize_u8
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.fuse_int8 import FuseInt8
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.passes.stats import collect
from tests.test_custom_ops import needs_compiler

SIZE, LENGTH = 64, 12
TARGET = get_target("x86-avx512-vnni")


def network(mask: str = "", heads: int = 2, shared: bool = False, **options: Any) -> onnx.ModelProto:
    """x -> query, key, value -> Attention -> output; `mask`: "", "keys" (boolean, expanded) or "added"."""
    random = np.random.default_rng(0)
    weights: dict[str, Any] = {}
    nodes = []
    names = ("query", "query", "value", "out") if shared else ("query", "key", "value", "out")
    for name in dict.fromkeys(names):
        weights[f"w_{name}"] = (random.normal(size=(SIZE, SIZE)) / 6).astype(np.float32)
        weights[f"b_{name}"] = random.normal(size=SIZE).astype(np.float32) / 4
    for name in dict.fromkeys(names[:3]):
        nodes.append(helper.make_node("MatMul", ["x", f"w_{name}"], [f"{name}_m"]))
        nodes.append(helper.make_node("Add", [f"{name}_m", f"b_{name}"], [name]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", LENGTH, SIZE])]
    if mask == "keys":
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, ["n", 1, 1, LENGTH]))
        weights["wide"] = np.array([1, 1, LENGTH, LENGTH], np.int64)
        nodes.append(helper.make_node("Expand", ["mask", "wide"], ["expanded"]))
    elif mask:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["n", 1, LENGTH, LENGTH]))
    operands = [*names[:3], *({"": [], "keys": ["expanded"], "added": ["mask"]}[mask])]
    given = {"q_num_heads": heads, "kv_num_heads": heads, **options}
    nodes.append(helper.make_node("Attention", operands, ["mixed"], name="attention", **given))
    nodes.append(helper.make_node("MatMul", ["mixed", "w_out"], ["out_m"]))
    nodes.append(helper.make_node("Add", ["out_m", "b_out"], ["y"]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", LENGTH, SIZE])]
    held = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    body = helper.make_graph(nodes, "attention", inputs, outputs, held)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def samples(mask: str, count: int = 6) -> list[dict[str, Any]]:
    found = []
    for seed in range(count):
        random = np.random.default_rng(seed)
        feed: dict[str, Any] = {"x": random.normal(size=(2, LENGTH, SIZE)).astype(np.float32)}
        if mask == "keys":
            feed["mask"] = np.arange(LENGTH) < np.array([LENGTH, 7])[:, None, None, None]
        elif mask:
            feed["mask"] = random.normal(size=(2, 1, LENGTH, LENGTH)).astype(np.float32)
        found.append(feed)
    return found


def fused(model: onnx.ModelProto, mask: str = "") -> tuple[Graph, Graph, Context, list[list[torch.Tensor]]]:
    """The float graph, that with its linears on codes, and the samples."""
    plain = load(model)
    infer(plain, {"n": 2})
    given = [[torch.from_numpy(value) for value in feed.values()] for feed in samples(mask)]
    graph, ctx, step = plain.copy(), Context(TARGET), QuantizeLinear(activations="static", smooth="off")
    candidates = [found for found in step.candidates(graph, Context(TARGET)) if found.refusal is None]
    stats = collect(graph, given, {node for each in candidates for node in step.observed(graph, each)})
    for candidate in candidates:
        step.apply(graph, candidate, stats)
    graph.prune()
    infer(graph, {"n": 2})
    FuseInt8().run(graph, ctx)
    infer(graph, {"n": 2})
    for node in graph.nodes:
        node.meta.pop("stands_for", None)
    return plain, graph, ctx, given


@pytest.mark.parametrize("mask", ["", "keys", "added"])
def test_on_bytes(mask: str) -> None:
    plain, graph, ctx, given = fused(network(mask), mask)
    (place,) = own_attention.places(graph, ctx)
    stats = collect(graph, given, place.linears)
    own_attention.on_bytes(graph, place, stats, {})
    graph.prune()
    targets = [node.target for node in graph.calls()]
    assert targets.count(attention_u8.target) == 1
    assert targets.count(quantize_u8.target) == 4  # x, and what the three linears give; not what attention gives
    infer(graph, {"n": 2})
    for sample in given:
        (y,), (expected,) = graph.run(sample), plain.run(sample)
        assert (y - expected).square().sum() / expected.square().sum() < 2e-3


REFUSED = {
    "it is causal": {"is_causal": 1},
    "more operands, options or results": {"softcap": 2.0},
    "4 heads in 64 channels are not a multiple of 32": {"heads": 4},
    "not the results of three linears": {"shared": True},
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_reasons(reason: str) -> None:
    options: Any = REFUSED[reason]
    _, graph, ctx, _ = fused(network(**options))
    assert own_attention.places(graph, ctx) == []
    (row,) = ctx.ledger.select(pass_name=own_attention.NAME, outcome="refused")
    assert row.node == "attention" and reason in row.reason


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("mask", ["", "keys", "added"])
def test_the_file(mask: str, tmp_path: Path) -> None:
    passes = ["quantize-linear{activations=static,smooth=off}"]
    result = fxopt.optimize(
        network(mask), calibration=samples(mask), passes=passes, threads=1, custom_ops=True, force=True
    )
    (row,) = result.ledger.select(pass_name=own_attention.NAME)
    assert (row.node, row.outcome) == ("attention", "applied")
    result.save(tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "AttentionInt8" in kinds and "Attention" not in kinds
    loaded = fxopt.load(tmp_path / "model.onnx")
    sample = [torch.from_numpy(value) for value in samples(mask)[0].values()]
    here, there = loaded(*sample), result(*sample)
    assert torch.equal(torch.as_tensor(here), torch.as_tensor(there))
    in_torch = loaded.graph.run(sample)[0]
    assert (here - in_torch).square().sum() / in_torch.square().sum() < 1e-4


@pytest.mark.slow
@needs_compiler
def test_over_budget_the_linears_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(*given: Any) -> Any:  # as if the ranges did not fit at all
        on_bytes(*given)
        node = next(node for node in given[0].calls() if node.target is attention_u8.target)
        node.args = (*node.args[:6], 100 * float(node.args[6]), node.args[7])

    on_bytes = own_attention.on_bytes
    monkeypatch.setattr(own_attention, "on_bytes", coarse)
    passes = ["quantize-linear{activations=static,smooth=off}"]
    result = fxopt.optimize(
        network(), calibration=samples(""), passes=passes, threads=1, custom_ops=True, force=True, budget=0.01
    )
    (row,) = result.ledger.select(pass_name=own_attention.NAME)
    assert row.outcome == "rolled-back" and row.reason.startswith("over budget: measured loss")
    assert {row.outcome for row in result.ledger.select(pass_name="fuse-int8")} == {"applied"}
