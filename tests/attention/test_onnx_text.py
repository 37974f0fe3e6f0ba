"""Spellings that other converters write to ONNX: tf2onnx, old exporters, ONNX Runtime's own fused operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import pytest
import torch
from torch import fx

from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.onnxruntime.backend import version
from fxopt.cost_model.targets import get_target
from fxopt.frontends import onnx as onnx_frontend
from fxopt.frontends.convert_graph import convert_graph
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Ledger
from fxopt.ir.shapes import infer
from fxopt.ir.views.attention import Attention, NotAttention, attentions, mask_kind
from fxopt.passes.base import Context
from fxopt.passes.fuse_attention_heads import FuseAttentionHeads
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import exact_pipeline
from fxopt.testing import assert_no_worse
from tests.attention.computed import computed
from tests.attention.entries import Expected
from tests.attention.test_spelled import said, wanted

TARGET = get_target("x86-avx2")
SIZES = {"b": 4, "n": 6, "h": 4, "g": 2}
QKV = "float[b, 6, 4, 8] q, float[b, 6, 4, 8] k, float[b, 6, 4, 8] v"
HEADS = "float[b, 4, 6, 8] q, float[b, 4, 6, 8] k, float[b, 4, 6, 8] v"
BY_POSITION = """
    qh = Transpose <perm = [0, 2, 1, 3]> (q)
    kh = Transpose <perm = [0, 2, 3, 1]> (k)
    vh = Transpose <perm = [0, 2, 1, 3]> (v)
"""
JOIN = (
    " yt = Transpose <perm = [0, 2, 1, 3]> (yh)  whole = Constant <value_ints = [0, 0, 32]> ()  y = Reshape (yt, whole)"
)
KEYS = " kt = Transpose <perm = [0, 1, 3, 2]> (k) "


def constant(name: str, value: float) -> str:
    return f" {name} = Constant <value = float {{{value}}}> ()"


TEXTS: dict[str, tuple[str, str, int, Expected | str]] = {  # inputs, body, opset, what is expected
    "tf2onnx: transposes of four axes, a mask as numbers": (
        f"{QKV}, float[b, 1, 1, 6] seen",
        BY_POSITION + constant("one", 1) + constant("low", -10000) + constant("root", 0.35355339)
        + " s = MatMul (qh, kh)  t = Mul (s, root)  u = Sub (one, seen)  w = Mul (u, low)  a = Add (t, w)"
        " p = Softmax <axis = 3> (a)  yh = MatMul (p, vh)" + JOIN,
        12, Expected("general", 0.35355339),
    ),
    "tf2onnx: a mask that is subtracted": (
        f"{QKV}, float[b, 1, 1, 6] hidden",
        BY_POSITION + constant("large", 10000)
        + " s = MatMul (qh, kh)  w = Mul (hidden, large)  a = Sub (s, w)  p = Softmax <axis = -1> (a)"
        " yh = MatMul (p, vh)" + JOIN,
        13, Expected("general"),
    ),
    "a boolean mask cast to numbers": (
        f"{QKV}, bool[b, 1, 1, 6] seen",
        BY_POSITION + constant("one", 1) + constant("low", -1000000000)
        + " f = Cast <to = 1> (seen)  u = Sub (one, f)  w = Mul (u, low)  s = MatMul (qh, kh)  a = Add (s, w)"
        " p = Softmax <axis = -1> (a)  yh = MatMul (p, vh)" + JOIN,
        17, Expected("padding"),
    ),
    "Einsum": (
        QKV,
        constant("root", 0.5) + ' s = Einsum <equation = "bqhd,bkhd->bhqk"> (q, k)  t = Mul (s, root)'
        ' p = Softmax <axis = -1> (t)  y = Einsum <equation = "bhqk,bkhd->bqhd"> (p, v)',
        17, Expected(scale=0.5),
    ),
    "FusedMatMul": (
        HEADS,
        " s = com.microsoft.FusedMatMul <alpha = 0.25, transB = 1> (q, k)  p = Softmax <axis = -1> (s)  y = MatMul (p, v)",
        17, Expected(scale=0.25),
    ),
    "one head without a batch of heads": (
        "float[b, 6, 8] q, float[b, 6, 8] k, float[b, 6, 8] v",
        " kt = Transpose <perm = [0, 2, 1]> (k)  s = MatMul (q, kt)  p = Softmax <axis = 2> (s)  y = MatMul (p, v)",
        11, Expected(),
    ),
    "a triangle of minus infinity": (
        HEADS,
        KEYS + " size = Constant <value_ints = [6, 6]> ()  full = ConstantOfShape <value = float[1] {-3.0e38}> (size)"
        " above = Constant <value = int64 {1}> ()  low = Trilu <upper = 1> (full, above)"
        " s = MatMul (q, kt)  a = Add (s, low)  p = Softmax <axis = -1> (a)  y = MatMul (p, v)",
        17, Expected("causal"),
    ),
    "a table of zeros and ones": (
        HEADS,
        KEYS + " size = Constant <value_ints = [6, 6]> ()  full = ConstantOfShape <value = float[1] {1}> (size)"
        " below = Trilu <upper = 0> (full)  seen = Cast <to = 9> (below)" + constant("low", -3e38)
        + " s = MatMul (q, kt)  a = Where (seen, s, low)  p = Softmax <axis = -1> (a)  y = MatMul (p, v)",
        17, Expected("causal"),
    ),
    "positions by Range": (
        "float[b, 4, n, 8] q, float[b, 4, n, 8] k, float[b, 4, n, 8] v",
        KEYS + " count = Shape <start = 2, end = 3> (q)  axis = Constant <value_ints = [0]> ()"
        " scalar = Squeeze (count, axis)  zero = Constant <value = int64 {0}> ()  one = Constant <value = int64 {1}> ()"
        " keys = Range (zero, scalar, one)  right = Constant <value_ints = [1]> ()  queries = Unsqueeze (keys, right)"
        " later = Greater (keys, queries)" + constant("low", -3e38)
        + " s = MatMul (q, kt)  a = Where (later, low, s)  p = Softmax <axis = -1> (a)  y = MatMul (p, v)",
        17, Expected("causal"),
    ),
    "a sink per head": (
        HEADS,
        KEYS + " sinks = Constant <value = float[1, 4, 1, 1] {0.5, 1.0, -1.0, 0.0}> ()  shape = Shape (q)"
        " three = Constant <value_ints = [0, 1, 2]> ()  lead = Gather (shape, three)  one = Constant <value_ints = [1]> ()"
        " wide = Concat <axis = 0> (lead, one)  column = Expand (sinks, wide)  s = MatMul (q, kt)"
        " a = Concat <axis = -1> (s, column)  p = Softmax <axis = -1> (a)  from = Constant <value_ints = [0]> ()"
        " to = Constant <value_ints = [-1]> ()  last = Constant <value_ints = [-1]> ()"
        " c = Slice (p, from, to, last)  y = MatMul (c, v)",
        17, Expected(sink=True, fused=False, reason="its softmax has one sink per head"),
    ),
    "the operator Attention": (
        HEADS, " y = Attention <is_causal = 1, scale = 0.5> (q, k, v)", 23, Expected("causal", 0.5, zero_rows=True, fused=False),
    ),
    "the operator Attention with a soft cap and shared heads": (
        "float[b, 4, 6, 8] q, float[b, 2, 6, 8] k, float[b, 2, 6, 8] v",
        " y = Attention <softcap = 2.0> (q, k, v)", 23, Expected(scale=None, groups=2, softcap=2.0, zero_rows=True, fused=False),
    ),
    "the operator Attention between transposes": (
        "float[b, 6, 32] q, float[b, 6, 32] k, float[b, 6, 32] v, bool[b, 1, 6, 6] seen",
        " split = Constant <value_ints = [0, 0, 4, 8]> ()"
        + "".join(
            f" {x}4 = Reshape ({x}, split) {x}t = Transpose <perm = [0, 2, 1, 3]> ({x}4)" for x in "qkv"
        )
        + " yh = Attention <scale = 0.5, softcap = 2.0> (qt, kt, vt, seen)" + JOIN,
        23, Expected("general", 0.5, softcap=2.0, zero_rows=True),
    ),
    "the operator Attention of repeated heads": (
        "float[b, 4, 6, 8] q, float[b, 2, 6, 8] k, float[b, 2, 6, 8] v",
        " two = Constant <value_ints = [2]> ()  wide = Constant <value_ints = [1, 1, 2, 1, 1]> ()"
        " four = Constant <value_ints = [0, 4, 6, 8]> ()"
        + "".join(f" {x}u = Unsqueeze ({x}, two) {x}e = Expand ({x}u, wide) {x}r = Reshape ({x}e, four)" for x in "kv")
        + " y = Attention <is_causal = 1> (q, kr, vr)",
        23, Expected("causal", None, 2, zero_rows=True),
    ),
    "the operator Attention with a constant that hides nothing": (
        HEADS, " m = Constant <value = float[1, 6] {0, 0, 0, 0, 0, 0}> ()  size = Constant <value_ints = [6, 6]> ()"
        " w = Expand (m, size)  y = Attention (q, k, v, w)", 23, Expected(scale=None, zero_rows=True),
    ),
    "MultiHeadAttention": (
        "float[b, 6, 32] q, float[b, 6, 32] k, float[b, 6, 32] v",
        " y = com.microsoft.MultiHeadAttention <num_heads = 4, unidirectional = 1> (q, k, v)", 17,
        Expected("causal", None, zero_rows=True, fused=False),
    ),
    "a cache": (
        f"{HEADS}, float[b, 4, 3, 8] past", " y = Attention (q, k, v, , past, past)", 23, "it takes past_key",
    ),
    "an updated cache": (
        f"{HEADS}, float[b, 4, 3, 8] past", " y, present, other = Attention (q, k, v, , past, past)", 23,
        "it also returns the updated cache or the scores",
    ),
    "heads that do not divide": (
        "float[b, 4, 6, 8] q, float[b, 3, 6, 8] k, float[b, 3, 6, 8] v", " y = Attention (q, k, v)", 23,
        "4 heads of q cannot share 3 of k and v evenly",
    ),
    "a number of heads that is an input's": (
        "float[b, h, 6, 8] q, float[b, g, 6, 8] k, float[b, g, 6, 8] v", " y = Attention (q, k, v)", 23,
        "its heads are known at run time",
    ),
    "packed inputs": (
        "float[b, 6, 32] q", " y = com.microsoft.MultiHeadAttention <num_heads = 4> (q)", 17,
        "query, key and value are packed in one input",
    ),
    "packed weights": (
        "float[b, 6, 32] q, float[32, 96] k, float[96] v", " y = com.microsoft.Attention <num_heads = 4> (q, k, v)", 17,
        "com.microsoft::Attention is a fused form with packed weights or a cache",
    ),
    "a mask that the input makes": (
        HEADS, KEYS + constant("zero", 0) + " big = Greater (v, zero)  f = Cast <to = 1> (big)"
        " axes = Constant <value_ints = [-1]> ()  m = ReduceMean <axes = [-1]> (f)  t = Transpose <perm = [0, 1, 3, 2]> (m)"
        " seen = Cast <to = 9> (t)" + constant("low", "-inf")  # type: ignore[arg-type]
        + " s = MatMul (q, kt)  a = Where (seen, s, low)  p = Softmax <axis = -1> (a)  y = MatMul (p, v)",
        17, Expected("general", fused=False, reason="may leave rows without keys, which are NaN and would become 0"),
    ),
    "a scale that is negative": (
        HEADS, KEYS + constant("c", -0.5) + " s = MatMul (q, kt)  t = Mul (s, c)  p = Softmax <axis = -1> (t)  y = MatMul (p, v)",
        17, Expected(scale=-0.5, fused=False, reason="the scale -0.5 of its scores is not positive"),
    ),
    "queries of another type": (
        "double[b, 4, 6, 8] q, double[b, 4, 6, 8] k, float[b, 4, 6, 8] v",
        KEYS + " s = MatMul (q, kt)  p = Softmax <axis = -1> (s)  c = Cast <to = 1> (p)  y = MatMul (c, v)",
        17, Expected(fused=False, reason="its query, key and value are float64, float64 and float32"),
    ),
    "a causal mask of another length": (
        "float[b, 4, 3, 8] q, float[b, 4, 6, 8] k, float[b, 4, 6, 8] v",
        KEYS + " m = Constant <value = float[3, 6] {0,-3.0e38,-3.0e38,-3.0e38,-3.0e38,-3.0e38,0,0,-3.0e38,-3.0e38,-3.0e38,"
        "-3.0e38,0,0,0,-3.0e38,-3.0e38,-3.0e38}> ()"
        " s = MatMul (q, kt)  a = Add (s, m)  p = Softmax <axis = -1> (a)  y = MatMul (p, v)",
        17, Expected("causal", fused=False, reason="its causal mask is of another length than its keys"),
    ),
    "a number of heads that is known at run time": (
        "float[b, h, 6, 8] q, float[b, h, 6, 8] k, float[b, h, 6, 8] v",
        KEYS + " s = MatMul (q, kt)  p = Softmax <axis = -1> (s)  y = MatMul (p, v)",
        17, Expected(fused=False, reason="the number or the width of its heads is known at run time only: scores [?, ?, 6, 6]"),
    ),
    "the size of the scores": (
        HEADS, KEYS + " s = MatMul (q, kt)  p = Softmax <axis = -1> (s)  x = MatMul (p, v)  n = Size (s)"
        " f = Cast <to = 1> (n)  y = Div (x, f)",
        17, Expected(fused=False, reason="n reads the shape of its inner value s"),
    ),
    "the shape of the scores": (
        HEADS, KEYS + " s = MatMul (q, kt)  p = Softmax <axis = -1> (s)  x = MatMul (p, v)"
        " n = Shape <start = 0, end = -1> (s)  f = Cast <to = 1> (n)  l = ReduceProd <keepdims = 0> (f)  y = Div (x, l)",
        17, Expected(),
    ),
    "queries of unknown shape": (
        "float[b, 4, 6, 8] x, float[b, 4, 6, 8] k, float[b, 4, 6, 8] v, bool[6] c",
        KEYS + " q = Compress <axis = 2> (x, c)  s = MatMul (q, kt)  p = Softmax <axis = -1> (s)  y = MatMul (p, v)",
        17, Expected(fused=False, reason="the type of its query is unknown"),
    ),
    "keys of unknown shape": (
        "float[b, 4, 6, 8] q, float[b, 4, 8, 6] k, float[b, 4, 6, 8] v, bool[6] c",
        " kt = Compress <axis = 3> (k, c)  s = MatMul (q, kt)  p = Softmax <axis = -1> (s)  y = MatMul (p, v)", 17, "the shape of its keys kt is unknown",
    ),
    "a mask of unknown shape": (
        f"{HEADS}, float[6, 6] x, bool[6] c", KEYS + " m = Compress <axis = 0> (x, c)  s = MatMul (q, kt)  a = Add (s, m)  p = Softmax <axis = -1> (a)  y = MatMul (p, v)",
        17, Expected("general", fused=False, reason="its mask is of unknown shape, not [batch, heads, length, keys]"),
    ),
    "a mask of heads in the batch": (
        "float[4, 6, 8] q, float[4, 6, 8] k, float[4, 6, 8] v, float[2, 2, 6, 6] m",
        " kt = Transpose <perm = [0, 2, 1]> (k)  s = MatMul (q, kt)  four = Constant <value_ints = [-1, 2, 6, 6]> ()"
        " r = Reshape (s, four)  a = Add (r, m)  p = Softmax <axis = -1> (a)  three = Constant <value_ints = [-1, 6, 6]> ()"
        " t = Reshape (p, three)  y = MatMul (t, v)",
        17, Expected("general", fused=False, reason="meets scores [2, 2, 6, 6], which are [4, 6, 6] in the product"),
    ),
}  # fmt: skip


def parsed(inputs: str, body: str, opset: int) -> Graph:
    rank = 3 if JOIN in body or inputs.partition("]")[0].count(",") == 2 else 4
    shape = ", ".join(f"y{axis}" for axis in range(rank))
    text = (
        f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> '
        f"attend ({inputs}) => (float[{shape}] y) {{ {body} }}"
    )
    graph = onnx_frontend.load(onnx.parser.parse_model(text))
    infer(graph, SIZES)
    PassManager(exact_pipeline()).run(graph, Context(TARGET))
    infer(graph, SIZES)
    return graph


def sample(graph: Graph) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for spec in graph.inputs:
        shape = [SIZES.get(str(size), size) for size in spec.shape or ()]
        value = torch.randn(shape, generator=generator, dtype=torch.float64)  # type: ignore[arg-type]
        if spec.name in ("seen", "hidden"):
            value = (value > 0).double()
        found.append(value.to(spec.dtype))
    return found


@pytest.mark.parametrize("name", list(TEXTS))
def test_text(name: str) -> None:
    inputs, body, opset, expected = TEXTS[name]
    graph = parsed(inputs, body, opset)
    (view,) = attentions(graph)
    if isinstance(expected, str):
        assert isinstance(view, NotAttention)
        assert str(view.reason) == expected
        return
    assert isinstance(view, Attention), view
    assert said(graph, view) == wanted(expected)
    values: dict[fx.Node, Any] = {}
    given = sample(graph)
    graph.run(given, observer=values.__setitem__)
    torch.testing.assert_close(computed(graph, view, values), values[view.node], atol=2e-6, rtol=1e-5, equal_nan=True)
    fuse(graph, expected, given)


def fuse(graph: Graph, expected: Expected, given: list[torch.Tensor]) -> None:
    """What is fused computes the same in torch and in ONNX Runtime; what is not has its reason."""
    assert graph.model is not None
    capabilities = OnnxRuntime() if version() >= (1, 32) else None
    if graph.model.opsets[""] < 23:
        graph = convert_graph(graph, 23, Ledger())
        infer(graph, SIZES)
    before, ctx = graph.copy(), Context(TARGET, capabilities=capabilities if expected.reason == "" else None)
    infer(before, SIZES)
    changes = PassManager([FuseAttentionHeads()]).run(graph, ctx)
    reasons = [verdict.reason for verdict in ctx.ledger.select(outcome="refused")]
    assert changes == expected.fused, reasons
    assert not expected.reason or any(expected.reason in reason for reason in reasons), reasons
    if not changes:
        return
    assert_no_worse(before, graph, [given])
    if capabilities is not None:
        (was,), (now,) = (capabilities.compile(each, TARGET, threads=1).run(given) for each in (before, graph))
        assert np.allclose(was.numpy(), now.numpy(), atol=2e-6, rtol=1e-5)


def test_in_the_branch_of_an_if() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]> choose (float[2, 4, 6, 8] x, bool c) => (float[2, 4, 6, 8] y) {
            y = If (c) <
                then_branch = attend () => (float[2, 4, 6, 8] a) {
                    kt = Transpose <perm = [0, 1, 3, 2]> (x)  s = MatMul (x, kt)  p = Softmax (s)  a = MatMul (p, x)
                },
                else_branch = keep () => (float[2, 4, 6, 8] b) { b = Identity (x) }
            > }"""
    )
    graph = onnx_frontend.load(proto)
    infer(graph)
    ctx = Context(TARGET, capabilities=OnnxRuntime() if version() >= (1, 32) else None)
    assert FuseAttentionHeads().opset(graph, ctx) == 23
    graph = convert_graph(graph, 23, Ledger())
    infer(graph)
    before = graph.copy()
    assert PassManager([FuseAttentionHeads()]).run(graph, ctx) == 1
    applied = list(ctx.ledger.select(outcome="applied"))
    assert {verdict.node.split("/")[1] for verdict in applied} == {"then_branch"}
    assert [verdict.reason for verdict in applied].count("exact rewrite") == 1
    for choice in (True, False):
        given = [torch.randn(2, 4, 6, 8), torch.tensor(choice)]
        assert_no_worse(before, graph, [given])
        (was,), (now,) = (OnnxRuntime().compile(each, TARGET, threads=1).run(given) for each in (before, graph))
        assert np.allclose(was.numpy(), now.numpy(), atol=2e-6)


def test_kinds_are_joined() -> None:
    _, body, opset, _ = TEXTS["a boolean mask cast to numbers"]
    graph = parsed(f"{QKV}, bool[b, 1, 6, 6] seen", body, opset)
    (view,) = attentions(graph)
    assert isinstance(view, Attention)
    assert mask_kind(graph, view) == "general"
