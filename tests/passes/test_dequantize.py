"""Quantised models that come in: their operators are recognised, kept by exact passes, and made floats of by dequantize."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from onnx import helper, numpy_helper

from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.errors import InvalidOption
from fxopt.frontends.onnx import load
from fxopt.ir.error import noise_to_signal
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Verdict
from fxopt.ir.onnx.export import to_model
from fxopt.ir.shapes import infer
from fxopt.ir.views.conv import Conv, convs
from fxopt.ir.views.linear import Linear, linears
from fxopt.ir.views.quantized import quantized_operators
from fxopt.passes.base import Context
from fxopt.passes.dequantize import Dequantize
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import exact_pipeline, spelling_pipeline
from fxopt.passes.quantize_linear import QuantizeLinear
from fxopt.testing import PLAIN_CPU, assert_neutral
from tests.passes.helpers import context, onnx_graph, operators
from tests.quantised_files import (
    ALL,
    DYNAMIC,
    FEW_BITS,
    STATIC,
    arrays,
    float_model,
    quantised,
    samples,
    stood_for,
    with_weights,
)  # fmt: skip

FLOAT = [node.op_type for node in float_model().graph.node]
X = np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)
CODES = np.random.default_rng(4).integers(-127, 128, (32, 32)).astype(np.int8)
CONSTANTS: dict[str, Any] = {
    "w": CODES, "v": CODES[::-1].copy(), "s": np.float32(0.05), "z": np.uint8(128), "z0": np.uint8(0),
    "ws": (np.random.default_rng(5).random(32) * 0.001 + 0.001).astype(np.float32), "wz": np.zeros(32, np.int8),
}  # fmt: skip


def imported(model: onnx.ModelProto) -> Graph:
    graph = load(model)
    infer(graph, {"n": 2})
    return graph


def graph_of(text: str, opset: int = 20, **constants: Any) -> Graph:
    """A graph of `text`, with those of `CONSTANTS` that it uses."""
    body = onnx.parser.parse_graph(text)
    used = {name for node in body.node for name in node.input}
    known = {name: value for name, value in {**CONSTANTS, **constants}.items() if name in used}
    return onnx_graph(text, opset, {"n": 2}, **known)


def converted(graph: Graph, ctx: Context | None = None, **options: Any) -> Graph:
    """The graph after the pass, verified."""
    made = graph.copy()
    PassManager([Dequantize(**options)]).run(made, ctx or context())
    onnx.checker.check_model(to_model(made), full_check=True)
    return made


def run(model: onnx.ModelProto, x: Any, kernels: Path | None = None) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if kernels is not None:
        options.optimized_model_filepath = str(kernels)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


def distance(one: Any, other: Any) -> float:
    return noise_to_signal(torch.from_numpy(one), torch.from_numpy(other))


# ---- recognised


@pytest.mark.parametrize("kind", ALL)
def test_quantised_operators_are_recognised(kind: str) -> None:
    found = {label(view.node): view for view in quantized_operators(imported(quantised(kind)))}
    texts = {str(view) for view in found.values()}
    if kind in FEW_BITS:
        weights = f"{'symmetric' if kind.endswith('-symmetric') else 'asymmetric'} in blocks of 32; float activations"
        kinds = {"QDQ": f"{'int4' if kind.endswith('-symmetric') else 'uint4'} weights, {weights} (QDQ)"}
        assert texts == {kinds.get(kind.split("-")[1], f"4-bit weights, {weights} (MatMulNBits)")}
        assert len(found) == 2
        return
    assert len(found) == 5 and {view.bits for view in found.values()} == {8}
    stored = {codes.dtype.name for name, codes in arrays(quantised(kind)).items() if codes.ndim > 1}
    assert {text.split()[0] for text in texts} == stored
    for text in texts:
        assert ("per channel" if "channel" in kind else "per tensor") in text
        assert ("found at run time" if kind in DYNAMIC else "with fixed ranges") in text
    forms = {view.form for view in found.values()}
    wanted = {"QDQ": {"QDQ"}, "QOperator": {"QLinearConv", "QGemm", "QLinearMatMul"}}
    assert forms == wanted.get(kind.split("-")[0], {"ConvInteger", "MatMulInteger"})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("y = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz)", "int8 weights, symmetric per channel; 8-bit activations"
         " with ranges found at run time (DynamicQuantizeMatMul)"),
        ("q, qs, qz = DynamicQuantizeLinear(x) y = com.microsoft.MatMulIntegerToFloat(q, w, qs, ws, qz, wz)",
         "int8 weights, symmetric per channel; 8-bit activations with ranges found at run time (MatMulIntegerToFloat)"),
        ("q = QuantizeLinear(x, s, z) y = com.microsoft.MatMulIntegerToFloat(q, w, s, ws, z, wz)",
         "int8 weights, symmetric per channel; 8-bit activations with fixed ranges (MatMulIntegerToFloat)"),
        ("f = DequantizeLinear<axis=0>(w, ws) t = Transpose<perm=[1, 0]>(f) y = MatMul(x, t)",
         "int8 weights, symmetric per channel; float activations (QDQ)"),
        ("f = DequantizeLinear<axis=1>(w, ws, one) y = MatMul(x, f)",
         "int8 weights, asymmetric per channel; float activations (QDQ)"),
        ("t = Transpose<perm=[1, 0]>(w) f = DequantizeLinear<axis=1>(t, ws) y = MatMul(x, f)",
         "int8 weights, symmetric per channel; float activations (QDQ)"),
        ("y = com.microsoft.MatMulNBits<K=32, N=32, bits=4, block_size=32, accuracy_level=4>(x, packed, bs)",
         "4-bit weights, symmetric in blocks of 32; activations rounded to 8 bits at run time (MatMulNBits)"),
        ("y = com.microsoft.MatMulBnb4<K=32, N=32, block_size=32, quant_type=1>(x, packed, bs)",
         "quantised weights; activations as the operator takes them (MatMulBnb4)"),
    ],
)  # fmt: skip
def test_spellings(text: str, wanted: str) -> None:
    packed, scales = np.full((32, 1, 16), 0x42, np.uint8), np.ones((32, 1), np.float32)
    made = graph_of(
        f"g (float[n, 32] x) => (float[n, 32] y) {{ {text} }}", packed=packed, bs=scales, one=np.ones(32, np.int8)
    )
    (found,) = quantized_operators(made)
    assert str(found) == wanted


@pytest.mark.parametrize("kind", ALL)
def test_quantize_linear_says_that_they_are_quantised_already(kind: str) -> None:
    graph = imported(quantised(kind))
    views = {label(view.node): str(view) for view in quantized_operators(graph)}
    for step in (QuantizeLinear(), QuantizeLinear(bits=4)):
        offers = list(step.candidates(graph, context()))
        reasons = {
            offer.anchor: [str(other.refusal) for other in offers if other.anchor == offer.anchor] for offer in offers
        }
        for name, view in views.items():
            assert reasons[name] == [f"quantised already: {view}; the pass dequantize makes floats of it"]
    assert not list(QuantizeLinear(bits=None).candidates(graph, context()))


# ---- kept


PATTERNS = {
    "pairs of one value twice": """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        q2 = QuantizeLinear(x, s, z) d2 = DequantizeLinear(q2, s, z)
        f = DequantizeLinear<axis=1>(w, ws, wz) f2 = DequantizeLinear<axis=1>(v, ws, wz)
        a = MatMul(d, f) b = MatMul(d2, f2) qa = QuantizeLinear(a, s, z) da = DequantizeLinear(qa, s, z)
        qb = QuantizeLinear(b, s, z) db = DequantizeLinear(qb, s, z) c = Add(da, db)
        qc = QuantizeLinear(c, s, z) y = DequantizeLinear(qc, s, z)""",
    "one weight twice": """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        f = DequantizeLinear<axis=1>(w, ws, wz) f2 = DequantizeLinear<axis=1>(w, ws, wz)
        a = MatMul(d, f) qa = QuantizeLinear(a, s, z) da = DequantizeLinear(qa, s, z)
        b = MatMul(da, f2) qb = QuantizeLinear(b, s, z) y = DequantizeLinear(qb, s, z)""",
    "a transposed weight": """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        f = DequantizeLinear<axis=0>(w, ws, wz) t = Transpose<perm=[1, 0]>(f) a = MatMul(d, t)
        qa = QuantizeLinear(a, s, z) y = DequantizeLinear(qa, s, z)""",
    "a value quantised at run time twice": """q, qs, qz = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, qz)
        c = Cast<to=1>(i) m = Mul(qs, ws) a = Mul(c, m)
        q2, qs2, qz2 = DynamicQuantizeLinear(x) i2 = MatMulInteger(q2, v, qz2)
        c2 = Cast<to=1>(i2) m2 = Mul(qs2, ws) b = Mul(c2, m2) y = Add(a, b)""",
    "an identity between": """q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        f = DequantizeLinear<axis=1>(w, ws, wz) a = MatMul(d, f) r = Relu(a) i = Identity(r)
        qa = QuantizeLinear(i, s, z0) da = DequantizeLinear(qa, s, z0) y = Identity(da)""",
}


def check_kept(model: onnx.ModelProto, x: Any, folder: Path) -> None:
    """After the exact passes the same bits come out of the same kernels."""
    graph = imported(model)
    for steps in (exact_pipeline(), spelling_pipeline()):
        PassManager(steps).run(graph, Context(PLAIN_CPU, capabilities=OnnxRuntime()))
    files = folder / "before.onnx", folder / "after.onnx"
    before, after = run(model, x, files[0]), run(to_model(graph), x, files[1])
    kernels = [collections.Counter(node.op_type for node in onnx.load(file).graph.node) for file in files]
    assert kernels[0] == kernels[1]
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("kind", ALL)
def test_exact_passes_keep_numbers_and_kernels(kind: str, tmp_path: Path) -> None:
    check_kept(quantised(kind), samples(1)[0], tmp_path)


@pytest.mark.parametrize("name", PATTERNS)
def test_exact_passes_keep_what_the_runtime_fuses(name: str, tmp_path: Path) -> None:
    graph = graph_of(f"g (float[n, 32] x) => (float[n, 32] y) {{ {PATTERNS[name]} }}")
    check_kept(to_model(graph), X, tmp_path)


# ---- dequantised


@pytest.mark.parametrize("kind", ALL)
def test_weights_are_what_the_codes_stand_for(kind: str) -> None:
    """Bit for bit, against a computation of the test's own."""
    graph = converted(imported(quantised(kind)))
    assert not list(quantized_operators(graph))
    views = [view for view in (*convs(graph), *linears(graph)) if isinstance(view, (Conv, Linear))]
    weights = [view.weight(graph).numpy() for view in views]
    assert len(weights) == 5
    order = {"c1": 0, "c2": 1, "gw": 2, "mw": 3, "hw": 4}
    for name, value in stood_for(kind).items():
        assert np.array_equal(weights[order[name]], value.T if name in ("mw", "hw") else value), name


@pytest.mark.parametrize("kind", ALL)
def test_the_result_differs_from_the_float_model_by_the_rounding_of_weights(kind: str) -> None:
    """Put into the float model, the rounded weights give the same outputs; the ReLUs that were dropped are there again."""
    model = quantised(kind)
    graph = converted(imported(model))
    found, wanted = (
        collections.Counter("MatMul" if name == "Gemm" else name for name in names)
        for names in (operators(graph), FLOAT)
    )
    wanted["Add"] += kind in DYNAMIC  # a Gemm came as MatMulInteger and Add
    assert found == wanted
    rounded = with_weights({**stood_for(kind), **biases(model)})
    for x in samples():
        (y,) = run(to_model(graph), x)
        assert distance(run(rounded, x)[0], y) < 1e-10
        assert distance(run(model, x)[0], y) < 1e-3  # what rounding activations costs


def biases(model: onnx.ModelProto) -> dict[str, Any]:
    """int32 multiples of the scales of both operands, and the bias of an addition in 8 bits."""
    found = arrays(model)
    made = {}
    for bias, x, weight in (("b1", "x", "c1"), ("b2", "r" if "r_scale" in found else "c", "c2"), ("gb", "p", "gw")):
        if f"{bias}_quantized" in found:
            unit = found[f"{x}_scale"].astype(np.float64) * found[f"{weight}_scale"]
            made[bias] = found[f"{bias}_quantized"] * unit
    if "mb_quantized" in found:
        codes = found["mb_quantized"].astype(np.float64) - found["mb_zero_point"]
        made["mb"] = codes * found["mb_scale"]
    return made


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), exponent=st.integers(-30, 10), signed=st.booleans(), per=st.sampled_from(["axis", "all"]),
    integer=st.booleans(),
)  # fmt: skip
def test_a_weight_is_scale_times_code_minus_zero(
    seed: int, exponent: int, signed: bool, per: str, integer: bool
) -> None:
    generator = np.random.default_rng(seed)
    dtype = np.int8 if signed else np.uint8
    limits = np.iinfo(dtype)
    codes = generator.integers(limits.min, limits.max + 1, (7, 5)).astype(dtype)
    shape = (5,) if per == "axis" else ()
    scale = np.asarray(generator.random(shape) * 2.0**exponent + 1e-12, dtype=np.float32)
    zero = np.asarray(generator.integers(limits.min, limits.max + 1, shape), dtype=dtype)
    text = "q = QuantizeLinear(x, s, z) p = QLinearMatMul(q, s, z, w, ws, wz, s, z) y = DequantizeLinear(p, s, z)"
    if not integer:
        text = "f = DequantizeLinear<axis=1>(w, ws, wz) y = MatMul(x, f)"
    graph = converted(graph_of(f"g (float[n, 7] x) => (float[n, 5] y) {{ {text} }}", w=codes, ws=scale, wz=zero))
    (view,) = linears(graph)
    assert isinstance(view, Linear)
    wanted = (codes.astype(np.float32) - zero.astype(np.float32)) * scale
    assert np.array_equal(view.weight(graph).t().numpy(), wanted)


# ---- operators, one by one


IMAGE = "q = QuantizeLinear(x, s, z) {} y = DequantizeLinear(p, s, z)"
ELEMENTWISE = {
    "QLinearMul": ("p = com.microsoft.QLinearMul(q, s, z, q, s, z, s, z)", ["Mul"]),
    "QLinearSigmoid": ("p = com.microsoft.QLinearSigmoid(q, s, z, s, z)", ["Sigmoid"]),
    "QLinearLeakyRelu": ("p = com.microsoft.QLinearLeakyRelu<alpha=0.2>(q, s, z, s, z)", ["LeakyRelu"]),
    "QLinearSoftmax": ("p = com.microsoft.QLinearSoftmax<axis=-1, opset=13>(q, s, z, s, z)", ["Softmax"]),
    "QLinearAveragePool": (
        "p = com.microsoft.QLinearAveragePool<kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]>(q, s, z, s, z)",
        ["AveragePool"],
    ),
    "QLinearReduceMean": ("p = com.microsoft.QLinearReduceMean<axes=[2], keepdims=1>(q, s, z, s, z)", ["ReduceMean"]),
    "QLinearConcat": ("p = com.microsoft.QLinearConcat<axis=1>(s, z, q, s, z, q, s, z)", ["Concat"]),
    "QLinearWhere": (
        "b = Less(x, s) p = com.microsoft.QLinearWhere(b, q, s, z, q, s, z, s, z)", ["Less", "Where"],
    ),
    "moved codes": (
        "t = Transpose<perm=[0, 1, 3, 2]>(q) p = MaxPool<kernel_shape=[2, 2]>(t)", ["Transpose", "MaxPool"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_operators_without_weights(name: str) -> None:
    text, wanted = ELEMENTWISE[name]
    graph = graph_of(f"g (float[n, 3, 8, 8] x) => (float[n, c, h, w1] y) {{ {IMAGE.format(text)} }}")
    after = converted(graph)
    assert operators(after) == wanted
    for x in samples():
        levels = torch.round(torch.from_numpy(x) * 10) / 20  # the inputs lie on levels, so only the result is rounded
        step = graph.run([levels])[0] - after.run([levels])[0]
        assert step.abs().max() <= 0.05 * 0.501


PRODUCTS = {
    "DynamicQuantizeMatMul": ("y = com.microsoft.DynamicQuantizeMatMul(x, w, ws, wz, b)", ["MatMul", "Add"]),
    "MatMulIntegerToFloat": (
        "q, qs, qz = DynamicQuantizeLinear(x) y = com.microsoft.MatMulIntegerToFloat(q, w, qs, ws, qz, wz, b)",
        ["MatMul", "Add"],
    ),
    "MatMulIntegerToFloat, fixed": (
        "q = QuantizeLinear(x, s, z) y = com.microsoft.MatMulIntegerToFloat(q, w, s, ws, z, wz)", ["MatMul"],
    ),
    "scales one after the other": (
        "q, qs, qz = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, qz, wz) f = Cast<to=1>(i) m = Mul(f, qs)"
        " y = Mul(ws, m)", ["MatMul"],
    ),
    "QGemm with alpha": (
        "q = QuantizeLinear(x, s, z) y = com.microsoft.QGemm<alpha=0.5, transB=1>(q, s, z, w, ws, wz, c)", ["Gemm"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name: str) -> None:
    text, wanted = PRODUCTS[name]
    bias = np.random.default_rng(6).normal(size=32).astype(np.float32)
    graph = graph_of(f"g (float[n, 32] x) => (float[n, 32] y) {{ {text} }}", b=bias, c=(bias * 10_000).astype(np.int32))
    after = converted(graph)
    assert operators(after) == wanted
    assert distance(run(to_model(graph), X)[0], run(to_model(after), X)[0]) < 2e-3


def test_few_bits_with_blocks_out_of_order() -> None:
    generator = np.random.default_rng(7)
    constants = {
        "packed": generator.integers(0, 256, (8, 2, 16)).astype(np.uint8), "bs": generator.random((8, 2)).astype(np.float32),
        "order": (np.arange(64) % 2).astype(np.int32), "b": generator.normal(size=8).astype(np.float32),
    }  # fmt: skip
    text = "y = com.microsoft.MatMulNBits<K=64, N=8, bits=4, block_size=32>(x, packed, bs, , order, b)"
    graph = graph_of(f"g (float[n, 64] x) => (float[n, 8] y) {{ {text} }}", **constants)
    after = converted(graph)
    assert operators(after) == ["Gemm"]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(graph.run([x])[0], after.run([x])[0])


EMBEDDING = """g (int64[n, 4] i) => (float[n, 4, 32] y, float[n, 32, 4] z) {
    r = Gather(w, i) f = DequantizeLinear(r, s, wz) y = Tanh(f)
    t = Transpose<perm=[0, 2, 1]>(r) z = DequantizeLinear(t, s, wz) }"""


def test_a_table_of_codes_becomes_one_of_floats() -> None:
    graph = graph_of(EMBEDDING, wz=np.int8(3))
    (view,) = quantized_operators(graph)
    assert str(view) == "int8 weights, asymmetric per tensor; a table that is looked up (QDQ)"
    after = converted(graph)
    assert operators(after) == ["Gather", "Tanh", "Transpose"]
    rows = torch.arange(8).reshape(2, 4)
    for one, other in zip(graph.run([rows]), after.run([rows]), strict=True):
        assert torch.equal(one, other)
    (table,) = [after.constant(node) for node in after.fx.find_nodes(op="get_attr")]
    assert table is not None and table.shape == (32, 32) and table.dtype == torch.float32
    assert operators(converted(graph, weights=False)) == operators(graph)


def test_a_table_that_is_dequantised_first_is_recognised() -> None:
    text = "f = DequantizeLinear<axis=0>(w, ws, wz) y = Gather(f, i)"
    graph = graph_of(f"g (int64[n, 4] i) => (float[n, 4, 32] y) {{ {text} }}")
    (view,) = quantized_operators(graph)
    assert str(view) == "int8 weights, symmetric per channel; a table that is looked up (QDQ)"
    assert operators(converted(graph)) == ["Gather"] and not list(quantized_operators(converted(graph)))


def in_a_branch(inside: bool) -> Graph:
    """The weights are constants of the branch, or of the graph around it."""
    text = PATTERNS["one weight twice"].replace("y = ", "r = ")
    body = onnx.parser.parse_graph(
        f"""g (float[n, 32] x, bool c) => (float[n, 32] y) {{ y = If(c)<
            then_branch = t () => (float[n, 32] r) {{ {text} }}, else_branch = e () => (float[n, 32] i) {{ i = Identity(x) }}
        > }}"""
    )
    holder = body.node[0].attribute[0].g if inside else body
    holder.initializer.extend(
        numpy_helper.from_array(np.asarray(CONSTANTS[name]), name) for name in ("w", "s", "z", "ws", "wz")
    )
    return imported(helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


@pytest.mark.parametrize("inside", [True, False])
def test_inside_a_branch(inside: bool) -> None:
    ctx = context()
    after = converted(in_a_branch(inside), ctx)
    (branch,) = [found.graph for found in after.subgraphs() if "then" in found.path]
    assert operators(branch).count("DequantizeLinear") == (0 if inside else 5)
    assert all("then_branch" in row.node for row in ctx.ledger.verdicts)
    reasons = {row.reason for row in ctx.ledger.select(outcome="refused")}
    outside = "its codes come from an input of the graph, not from QuantizeLinear"
    unknown = "its range is computed at run time, so what it cuts off is unknown"
    assert reasons == (set() if inside else {outside, unknown})


# ---- what ranges cut off


def clip_graph(before: str, scale: float, zero: int | None, dtype: Any = np.uint8, opset: int = 20) -> Graph:
    grid = "cs" if zero is None else "cs, cz"
    return graph_of(
        f"""g (float[n, 32] x) => (float[n, 32] y) {{
            {before} q = QuantizeLinear(a, {grid}) d = DequantizeLinear(q, {grid}) y = Tanh(d) }}""",
        opset, cs=np.float32(scale), cz=dtype(zero or 0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "scale", "zero", "dtype", "wanted"),
    [
        ("a = Neg(x)", 0.02, 0, np.uint8, ["Neg", "Relu", "Tanh"]),
        ("a = Neg(x)", 0.02, -128, np.int8, ["Neg", "Relu", "Tanh"]),
        ("a = Neg(x)", 0.02, None, np.uint8, ["Neg", "Relu", "Tanh"]),  # without a zero point
        ("a = Neg(x)", 0.0001, 0, np.uint16, ["Neg", "Relu", "Tanh"]),
        ("a = Neg(x)", 6 / 255, 0, np.uint8, ["Neg", "Clip", "Tanh"]),
        ("a = Neg(x)", 0.02, 128, np.uint8, ["Neg", "Tanh"]),
        ("a = Relu(x)", 0.02, 0, np.uint8, ["Relu", "Tanh"]),
        ("b = Sigmoid(x) a = Mul(b, b)", 1 / 255, 0, np.uint8, ["Sigmoid", "Mul", "Tanh"]),
        ("b = Sigmoid(x) a = Add(b, x)", 3 / 255, 0, np.uint8, ["Sigmoid", "Add", "Relu", "Tanh"]),
    ],
)
def test_a_relu_that_saturation_computed_comes_back(
    before: str, scale: float, zero: int | None, dtype: Any, wanted: list[str]
) -> None:
    for opset in (21 if dtype in (np.uint16,) else 10, 21):
        graph = clip_graph(before, scale, zero, dtype, opset)
        after = converted(graph)
        assert operators(after) == wanted
        small = torch.from_numpy(X) / 4
        assert (graph.run([small])[0] - after.run([small])[0]).abs().max() <= scale * 0.501


def test_every_range_may_be_kept() -> None:
    graph = clip_graph("a = Neg(x)", 0.01, 100)
    after = converted(graph, clip="all")
    assert operators(after) == ["Neg", "Clip", "Tanh"]
    wide = torch.from_numpy(X) * 3
    worst = (graph.run([wide])[0] - after.run([wide])[0]).abs().max()
    assert worst <= 0.01 * 0.51  # half a step
    assert (graph.run([wide])[0] - converted(graph).run([wide])[0]).abs().max() > 0.01


# ---- options


@pytest.mark.parametrize("kind", ALL)
def test_the_neutral_setting(kind: str) -> None:
    neutral = Dequantize(weights=False, activations=False)
    assert_neutral(neutral, imported(quantised(kind)), [[torch.from_numpy(x)] for x in samples()])
    graph = imported(quantised(kind))
    assert neutral.run(graph, context()) == 0
    assert to_model(graph) == to_model(imported(quantised(kind)))


@pytest.mark.parametrize("kind", STATIC)
def test_activations_may_stay_rounded(kind: str) -> None:
    """Weights are floats; integer operators are float ones between Q and DQ: the numbers are those of the integers."""
    model = quantised(kind)
    after = converted(imported(model), activations=False)
    kinds = operators(after)
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= set(kinds) and not any("QLinear" in name for name in kinds)
    assert len(list(quantized_operators(after))) == 0
    for x in samples():
        assert distance(run(model, x)[0], run(to_model(after), x)[0]) < 1e-3


@pytest.mark.parametrize("kind", STATIC)
def test_weights_may_stay_codes(kind: str) -> None:
    model = quantised(kind)
    after = converted(imported(model), weights=False)
    assert "QuantizeLinear" not in operators(after)
    assert {view.form for view in quantized_operators(after)} == {"QDQ"}
    assert all("float activations" in str(view) for view in quantized_operators(after))
    whole = converted(imported(model))
    for x in samples():
        inputs = [torch.from_numpy(x)]
        assert noise_to_signal(whole.run(inputs)[0], after.run(inputs)[0]) < 1e-10


def test_illegal_options() -> None:
    with pytest.raises(InvalidOption, match="clip='some'"):
        Dequantize(clip="some")


# ---- refusals


REFUSED = {
    "codes of an input": ("g (uint8[n, 32] x) => (float[n, 32] y) { y = DequantizeLinear(x, s, z) }",
        "its codes come from an input of the graph, not from QuantizeLinear"),
    "another scale": ("""g (float[n, 32] x) => (float[n, 32] y) {
        q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, half, z) }""",
        "its scale or zero point is another than that of the QuantizeLinear before it"),
    "an operator between": ("""g (float[n, 32] x) => (float[n, 32] y) {
        q = QuantizeLinear(x, s, z) t = Max(q, q) y = DequantizeLinear(t, s, z) }""",
        "its codes come from Max 'n_t', not from QuantizeLinear"),
    "channels last": ("""g (float[n, 8, 8, 3] x) => (float[n, 1, 1, 3] y) { q = QuantizeLinear(x, s, z)
        p = com.microsoft.QLinearGlobalAveragePool<channels_last=1>(q, s, z, s, z) y = DequantizeLinear(p, s, z) }""",
        "it takes channels last, which the float operator does not"),
    "another spelling": ("""g (float[n, 32] x) => (int32[n, 32] y) {
        q, qs, qz = DynamicQuantizeLinear(x) y = MatMulInteger(q, w, qz) }""",
        "it is not the usual DynamicQuantizeLinear, product, Cast and product with both scales"),
    "a table with a scale per column": ("""g (int64[n] i) => (float[n, 32] y) {
        r = Gather(w, i) y = DequantizeLinear<axis=1>(r, ws, wz) }""", "its constant codes are moved, and have 32 scales"),
    "no float form": ("""g (float[n, 32] x) => (float[n, 32] y) {
        y = com.microsoft.MatMulBnb4<K=32, N=32, block_size=32, quant_type=1>(x, packed, bs) }""",
        "MatMulBnb4 has no float form"),
    "a weight in a layout": ("""g (float[n, 32] x) => (float[n, 32] y) { y = com.microsoft.MatMulNBits
        <K=32, N=32, bits=4, block_size=32, weight_prepacked=1>(x, packed, bs) }""",
        "its weight is in the layout of one machine"),
    "few bits of an input": ("""g (float[n, 32] x, uint8[32, 1, 16] p) => (float[n, 32] y) {
        y = com.microsoft.MatMulNBits<K=32, N=32, bits=4, block_size=32>(x, p, bs) }""",
        "its weight is computed at run time"),
    "scales per row": ("""g (uint8[2, 32] x) => (float[2, 32] y) {
        y = com.microsoft.MatMulIntegerToFloat(x, w, two, ws, twoz, wz) }""", "the first operand has 2 scales; expected one"),
    "a softmax of all axes": ("""g (float[n, 3, 8, 8] x) => (float[n, 3, 8, 8] y) { q = QuantizeLinear(x, s, z)
        p = com.microsoft.QLinearSoftmax<axis=1, opset=12>(q, s, z, s, z) y = DequantizeLinear(p, s, z) }""",
        "it takes all axes from 1 on together"),
    "a mean without axes": ("""g (float[n, 3, 8, 8] x) => (float[n, 3, 8, 8] y) { q = QuantizeLinear(x, s, z)
        p = com.microsoft.QLinearReduceMean(q, s, z, s, z) y = DequantizeLinear(p, s, z) }""", "it names no axes"),
    "a bias of an input": ("""g (float[n, 3, 8, 8] x, int32[8] b) => (float[n, 8, 8, 8] y) { q = QuantizeLinear(x, s, z)
        p = QLinearConv<pads=[1, 1, 1, 1]>(q, s, z, k, s, kz, s, z, b) y = DequantizeLinear(p, s, z) }""",
        "its bias, or the scale of it, is computed at run time"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_the_reason(name: str) -> None:
    text, wanted = REFUSED[name]
    graph = graph_of(
        text, half=np.float32(0.025), packed=np.full((32, 1, 16), 0x42, np.uint8), bs=np.ones((32, 1), np.float32),
        two=np.ones(2, np.float32), twoz=np.zeros(2, np.uint8), k=np.ones((8, 3, 3, 3), np.int8), kz=np.int8(0),
    )  # fmt: skip
    ctx = context()
    converted(graph, ctx)
    assert wanted in [row.reason for row in ctx.ledger.select(outcome="refused")]


def test_what_nothing_was_done_to_is_unchanged() -> None:
    graph = graph_of(REFUSED["another spelling"][0])
    assert to_model(converted(graph)) == to_model(graph)


@pytest.mark.parametrize(
    ("options", "kind", "wanted"),
    [
        ({"activations": False}, "dynamic-s", "activations=False keeps its input, whose range is found at run time"),
        ({"weights": False}, "dynamic-s", "weights=False keeps its codes"),
        ({"weights": False}, "nbits-QOperator-symmetric", "weights=False keeps its codes"),
    ],
)
def test_options_that_keep_an_operator_say_so(options: dict[str, bool], kind: str, wanted: str) -> None:
    ctx = context()
    converted(imported(quantised(kind)), ctx, **options)
    assert wanted in {row.reason for row in ctx.ledger.select(outcome="refused")}


def test_codes_per_channel_need_an_opset() -> None:
    text = """g (float[n, 3, 8, 8] x) => (float[n, 8, 8, 8] y) { q = QuantizeLinear(x, s, z)
        p = QLinearConv<pads=[1, 1, 1, 1]>(q, s, z, k, ks, kz, s, z) y = DequantizeLinear(p, s, z) }"""
    constants = {"k": np.ones((8, 3, 3, 3), np.int8), "ks": np.ones(8, np.float32), "kz": np.zeros(8, np.int8)}
    graph = graph_of(text, 10, **constants)
    ctx = context()
    converted(graph, ctx, weights=False)
    assert "opset 10 has no DequantizeLinear with 8 scales" in {row.reason for row in ctx.ledger.verdicts}
    assert operators(converted(graph)) == ["Conv"]


@pytest.mark.parametrize(("option", "stays"), [("exclude", {"head"}), ("include", {"conv", "conv2", "gemm", "linear"})])
def test_nodes_may_be_left_out(option: str, stays: set[str]) -> None:
    ctx = context(**{option: re.compile("^(y|head)")})
    after = converted(imported(quantised("QDQ-channel-s")), ctx)
    assert {label(view.node) for view in quantized_operators(after)} == stays
    rows: list[Verdict] = list(ctx.ledger.select(outcome="refused"))
    assert rows and all("clude" in row.reason for row in rows)
