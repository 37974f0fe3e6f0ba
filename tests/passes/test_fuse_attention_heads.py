"""Attention in its parts becomes one operator, which ONNX Runtime computes as it computed the parts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

import fxopt
from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.onnxruntime.backend import version
from fxopt.cost_model.targets import get_target
from fxopt.frontends.onnx import load
from fxopt.ir.shapes import infer
from fxopt.ir.verify import NumericCheck
from fxopt.passes.base import Context
from fxopt.passes.fuse_attention_heads import FuseAttentionHeads
from fxopt.passes.manager import PassManager

TARGET = get_target("x86-avx2")
HEADS, LENGTH, WIDTH = 2, 6, 4
pytestmark = pytest.mark.skipif(version() < (1, 32), reason="Attention is fused for ONNX Runtime 1.32 and later")

SPLIT = """
    heads = Constant <value_ints = [0, 0, 2, 4]> ()
    q4 = Reshape (q, heads)
    k4 = Reshape (k, heads)
    v4 = Reshape (v, heads)
    qh = Transpose <perm = [0, 2, 1, 3]> (q4)
    kt = Transpose <perm = [0, 2, 3, 1]> (k4)
    vh = Transpose <perm = [0, 2, 1, 3]> (v4)
    scale = Constant <value_float = 0.5> ()
    raw = MatMul (qh, kt)
    scores = Mul (raw, scale)
"""
JOIN = """
    yh = MatMul (weights, vh)
    y4 = Transpose <perm = [0, 2, 1, 3]> (yh)
    whole = Constant <value_ints = [0, 0, 8]> ()
    y = Reshape (y4, whole)
"""
GUARD = """
    plain = Softmax <axis = -1> (masked)
    nan = IsNaN (plain)
    zero = Constant <value_float = 0.0> ()
    weights = Where (nan, zero, plain)
"""
PLAIN = """
    weights = Softmax <axis = -1> (masked)
"""
NUMBERS = """
    none = Constant <value_float = 0.0> ()
"""
MASKS = {  # the text, the mask's type, whether it is guarded
    "none": ("masked = Identity (scores)", "", False),
    "added where": ("a = Where (m, none, low)\n masked = Add (scores, a)", "bool[b, 1, 6, 6] m", True),
    "added where, one row": ("a = Where (m, none, low)\n masked = Add (scores, a)", "bool[b, 1, 1, 6] m", True),
    "hidden by where": ("masked = Where (m, low, scores)", "bool[b, 1, 6, 6] m", True),
    "kept by where": ("masked = Where (m, scores, low)", "bool[b, 2, 6, 6] m", True),
    "not guarded": ("masked = Where (m, scores, low)", "bool[6, 6] m", False),
    "added": ("masked = Add (scores, m)", "float[b, 1, 1, 6] m", False),
}


def network(mask: str, low: str = "-inf", batch: str = "b", opset: int = 20) -> onnx.ModelProto:
    """One attention; its queries, keys and values are [batch, 6, 8]."""
    text, value, guarded = MASKS[mask]
    operands = ", ".join(f"float[{batch}, 6, 8] {name}" for name in "qkv")
    extra = f", {value.replace('b,', batch + ',')}" if value else ""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]> '
        f"attend ({operands}{extra}) => (float[{batch}, 6, 8] y) "
        f"{{ {SPLIT} {NUMBERS} {text} {GUARD if guarded else PLAIN} {JOIN} }}"
        if "low" not in text
        else f'<ir_version: 10, opset_import: ["" : {opset}]> '
        f"attend ({operands}{extra}) => (float[{batch}, 6, 8] y) "
        f"<float low = {{0}}> {{ {SPLIT} {NUMBERS} {text} {GUARD if guarded else PLAIN} {JOIN} }}"
    )
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(float(low), np.float32), "low"))
    return proto


def inputs(proto: onnx.ModelProto, batch: int = 3) -> dict[str, np.ndarray]:
    """Numbers; the mask hides every key of row 1 (of the first sample), and some of the others."""
    generator = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for value in proto.graph.input:
        shape = [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim]
        if value.name != "m":
            found[value.name] = generator.normal(size=shape).astype(np.float32)
            continue
        mask = generator.random(shape) > 0.3
        mask.reshape(-1, *shape[-2:])[0, min(1, shape[-2] - 1)] = False
        is_bool = value.type.tensor_type.elem_type == onnx.TensorProto.BOOL
        found["m"] = mask if is_bool else np.where(mask, 0, np.finfo(np.float32).min).astype(np.float32)
    return found


def run(proto: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


def operators(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def optimized(proto: onnx.ModelProto, folder: Path, feed: dict[str, np.ndarray]) -> onnx.ModelProto:
    result = fxopt.optimize(
        proto, "host", passes=["fuse-attention-heads"], calibration=[feed], force=True, budget=None, threads=1
    )
    result.save(folder / "out.onnx")
    return onnx.load(folder / "out.onnx")


@pytest.mark.parametrize("low", ["-inf", "-3.4028234663852886e38", "-10000.0"])
@pytest.mark.parametrize("batch", ["b", "3"])
@pytest.mark.parametrize("mask", list(MASKS))
def test_the_numbers_are_those_of_the_parts(mask: str, batch: str, low: str, tmp_path: Path) -> None:
    proto = network(mask, low, batch)
    if mask == "not guarded" and low == "-inf":
        pytest.skip("rows without keys are NaN: see below")
    feed = inputs(proto)
    before = run(proto, feed)
    fused = optimized(proto, tmp_path, feed)
    found = operators(fused)
    assert found["Attention"] == 1 and not found["MatMul"] and not found["Softmax"]
    assert not found["Transpose"], "the heads are not separated"
    after = run(fused, feed)
    assert np.allclose(before, after, atol=2e-6)
    if batch == "b":
        other = {name: value[:2] if len(value) == 3 else value for name, value in feed.items()}
        assert np.allclose(run(proto, other), run(fused, other), atol=2e-6)


@pytest.mark.parametrize("joins", ["[-1, 8]", "[0, 0, 2, 4]"])
def test_heads_that_are_joined_in_another_way(joins: str, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        onnx.printer.to_text(network("none", batch="3")).replace(
            "value_ints: ints = [0, 0, 8]", f"value_ints: ints = {joins}"
        )
    )
    proto.graph.output[0].type.tensor_type.shape.Clear()
    for size in (18, 8) if joins == "[-1, 8]" else (3, 6, 2, 4):
        proto.graph.output[0].type.tensor_type.shape.dim.add().dim_value = size
    feed = inputs(proto)
    fused = optimized(proto, tmp_path, feed)
    assert operators(fused)["Attention"] == 1
    assert np.allclose(run(proto, feed), run(fused, feed), atol=2e-6)


def test_models_of_other_opsets(tmp_path: Path) -> None:
    for opset, fused in ((13, 1), (20, 1), (23, 1), (24, 1), (25, 0)):
        proto = network("none", opset=opset, batch="2")
        feed = inputs(proto)
        made = optimized(proto, tmp_path, feed)
        assert operators(made)["Attention"] == fused
        assert np.allclose(run(proto, feed), run(made, feed), atol=2e-6)
        assert {entry.domain: entry.version for entry in made.opset_import}[""] == (max(opset, 23) if fused else opset)


def refusals(proto: onnx.ModelProto) -> list[str]:
    """The reasons for which nothing is fused, on the softmax and on the products around it."""
    graph = load(proto)
    infer(graph, {"b": 3})
    ctx = Context(TARGET, capabilities=OnnxRuntime())
    assert FuseAttentionHeads().opset(graph, ctx) == 0
    assert FuseAttentionHeads().run(graph, ctx) == 0
    verdicts = list(ctx.ledger.select(pass_name="fuse-attention-heads"))
    assert {verdict.outcome for verdict in verdicts} == {"refused"}
    return [verdict.reason for verdict in verdicts]


def test_rows_without_keys_of_an_added_mask_keep_their_meaning(tmp_path: Path) -> None:
    text = onnx.printer.to_text(network("added"))
    text = text.replace("weights = Softmax <axis: int = -1> (masked)", GUARD.strip().replace("axis =", "axis: int ="))
    proto = onnx.parser.parse_model(text.replace("[b,1,1,6] m", "[b,1,6,6] m"))
    feed = inputs(proto)
    feed["m"][0, 0, 2] = -np.inf  # zeros; row 1 is the lowest number: the mean
    feed["m"][1, 0, 3, :4] = -np.inf
    before, fused = run(proto, feed), optimized(proto, tmp_path, feed)
    assert operators(fused)["Attention"] == 1
    assert not before[0, 2].any() and before[0, 1].any()
    assert np.allclose(before, run(fused, feed), atol=2e-6)


def test_what_is_not_fused_has_a_reason() -> None:
    assert "may leave rows without keys" in refusals(network("not guarded", opset=23))[0]
    odd = network("none", opset=23)
    for node in odd.graph.node:
        if node.op_type == "Identity":
            node.op_type = "Sigmoid"
    reasons = refusals(odd)
    assert reasons[0] == "between q @ k.T and the softmax there is masked (Sigmoid), which is not understood"
    assert reasons[1:] == [f"a product around weights: {reasons[0]}"]


def test_other_types_are_left_alone() -> None:
    assert "fast in float32, not in float16" in OnnxRuntime().supports("Attention", "float16")


def test_a_causal_constant_is_an_attribute() -> None:
    mask = np.triu(np.full((LENGTH, LENGTH), -np.inf, np.float32), 1)
    proto = network("added", opset=23)
    del proto.graph.input[3:]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(mask, "m"))
    graph = load(proto)
    infer(graph, {"b": 3})
    feed = inputs(proto)
    sample = [torch.from_numpy(value) for value in feed.values()]
    manager = PassManager([FuseAttentionHeads()])
    assert manager.run(graph, Context(TARGET, capabilities=OnnxRuntime()), NumericCheck.of(graph, sample)) == 1
    (node,) = graph.calls()
    assert node.kwargs["is_causal"] == 1 and len(node.args) == 3
    assert np.allclose(
        OnnxRuntime().compile(graph, TARGET, threads=1).run(sample)[0].numpy(), run(proto, feed), atol=2e-6
    )


def test_reasons_of_the_backend_and_of_the_user() -> None:
    assert "has a fast kernel at opsets 23 and 24; the model has 25" in reasons(network("none", opset=25))
    wide = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> attend (double[2, 6, 8] q, double[2, 8, 6] k) => (double[2, 6, 6] y) '
        "{ s = MatMul (q, k)  p = Softmax (s)  t = Transpose <perm = [0, 2, 1]> (k)  y = MatMul (p, t) }"
    )
    assert "Attention of ONNX Runtime is fast in float32, not in float64" in reasons(wide)
    capped = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> attend (float[2, 6, 8] q, float[2, 8, 6] k) => (float[2, 6, 6] y) '
        "<float low = {0.02}, float cap = {50.0}> { s = MatMul (q, k)  l = Mul (s, low)  c = Tanh (l)  m = Mul (c, cap)"
        "  p = Softmax (m)  t = Transpose <perm = [0, 2, 1]> (k)  y = MatMul (p, t) }"
    )
    assert "with a soft cap, Attention of ONNX Runtime is several times slower than its parts" in reasons(capped)
    assert "excluded by --exclude weights" in reasons(network("none", opset=23), exclude=re.compile("weights"))
    assert "excluded by --exclude yh" in reasons(network("none", opset=23), exclude=re.compile("yh"))


def reasons(proto: onnx.ModelProto, **options: Any) -> str:
    graph = load(proto)
    infer(graph, {"b": 3})
    ctx = Context(TARGET, capabilities=OnnxRuntime(), **options)
    assert FuseAttentionHeads().run(graph, ctx) == 0
    return "; ".join(verdict.reason for verdict in ctx.ledger.select(outcome="refused"))


def test_a_softmax_that_nobody_takes() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> attend (float[2, 6] x) => (float[2, 6] y) '
        "{ p = Softmax (x)  y = Relu (x) }"
    )
    graph = load(proto)
    infer(graph)
    ctx = Context(TARGET, capabilities=OnnxRuntime())
    assert FuseAttentionHeads().run(graph, ctx) == 0
    (verdict,) = ctx.ledger.verdicts
    assert (verdict.node, verdict.outcome) == ("p", "no-match")
    assert verdict.reason == "a softmax that is no attention: nothing takes its probabilities p"
