"""Views: one recogniser for every spelling, and what it names computes what the node computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import onnx.parser
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from fxopt.frontends import onnx as onnx_frontend
from fxopt.frontends import torch_export
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Refusal
from fxopt.ir.shapes import infer
from fxopt.ir.views.attention import Attention, NotAttention, attentions
from fxopt.ir.views.conv import Conv, convs
from fxopt.ir.views.linear import Linear, linears
from fxopt.ir.views.norm import Norm, norms
from fxopt.ir.views.residual import ResidualBlock, residuals
from tests.attention.computed import computed
from tests.zoo import BUILDERS, ORIGINS, case, graph, program

VIEWS: dict[type, Callable[[Graph], Iterator[Any]]] = {
    Linear: linears, Conv: convs, Norm: norms, Attention: attentions, ResidualBlock: residuals
}  # fmt: skip
COUNTS = {  # linear, conv, norm, attention, residual block
    "mlp": (2, 0, 0, 0, 0),
    "cnn": (1, 2, 0, 0, 1),
    "encoder": (8, 0, 4, 2, 4),
    "bert": (14, 0, 5, 2, 4),
    "distilbert": (14, 0, 5, 2, 4),
    "gpt2": (9, 0, 5, 2, 4),
    "llama": (15, 0, 5, 2, 4),
    "qwen2": (15, 0, 5, 2, 4),
    "opt": (13, 0, 5, 2, 4),
    "vit": (13, 1, 5, 2, 4),
    "deit": (13, 1, 5, 2, 4),
}
QUICK = ("mlp", "cnn")
architectures = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BUILDERS]
)


@pytest.fixture(autouse=True)
def transformers(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name not in (None, "mlp", "cnn", "encoder"):
        pytest.importorskip("transformers")


def found(graph: Graph, kind: type) -> list[Any]:
    return [view for view in VIEWS[kind](graph) if isinstance(view, kind)]


def refused(graph: Graph, kind: type) -> list[str]:
    others = [view for view in VIEWS[kind](graph) if not isinstance(view, kind)]
    return [str(other.reason if isinstance(other, NotAttention) else other[1]) for other in others]


@architectures
def test_same_counts_from_three_exports(name: str) -> None:
    counts = {origin: tuple(len(found(graph(name, origin), kind)) for kind in VIEWS) for origin in ORIGINS}
    assert counts == dict.fromkeys(ORIGINS, COUNTS[name])
    refusals = [reason for origin in ORIGINS for kind in VIEWS for reason in refused(graph(name, origin), kind)]
    assert not refusals


@architectures
@pytest.mark.parametrize("origin", ORIGINS)
def test_a_view_computes_its_node(name: str, origin: str) -> None:
    model = graph(name, origin)
    checked = assert_views_compute(model, list(program(name).examples))
    assert checked == sum(COUNTS[name])


def assert_views_compute(model: Graph, inputs: list[torch.Tensor]) -> int:
    """Compute every view from the values of its inputs; returns how many there were."""
    values: dict[fx.Node, Any] = {}
    model.run(inputs, observer=values.__setitem__)
    checked = 0
    for kind in VIEWS:
        for view in found(model, kind):
            result = compute(model, view, values)
            torch.testing.assert_close(result, values[view.node], atol=2e-6, rtol=1e-5)
            checked += 1
    return checked


def compute(model: Graph, view: Any, values: dict[fx.Node, Any]) -> torch.Tensor:
    if isinstance(view, Linear):
        return F.linear(values[view.x], view.weight(model), view.bias(model))
    if isinstance(view, Conv):
        assert view.padding[0] == view.padding[1]
        function = {3: F.conv1d, 4: F.conv2d}[view.weight(model).dim()]
        weight, bias = view.weight(model), view.bias(model)
        return function(values[view.x], weight, bias, view.stride, view.padding[0], view.dilation, view.groups)
    if isinstance(view, Norm):
        return normalised(view, values[view.x], view.weight(model), view.bias(model))
    if isinstance(view, ResidualBlock):
        assert view.branch in view.inner
        return values[view.entry] + values[view.branch]
    return computed(model, view, values)


def normalised(view: Norm, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    axes = tuple(range(-view.axes, 0))
    wide = x.double()
    if view.kind == "layer":
        wide = wide - wide.mean(axes, keepdim=True)
    wide = wide / (wide.square().mean(axes, keepdim=True) + view.eps).sqrt()
    wide = wide * (1 if weight is None else weight) + (0 if bias is None else bias)
    return wide.to(x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_attention_written_out_in_torch(name: str) -> None:
    made = case(name)
    made.model.set_attn_implementation("eager")
    model = torch_export.load(made.model, made.inputs, made.dynamic)
    assert {view.kind for view in found(model, Attention)} == {"spelled-out"}
    assert assert_views_compute(model, list(made.inputs.values())) == sum(COUNTS[name])


@pytest.mark.slow
def test_norms_in_half_precision() -> None:
    pytest.importorskip("transformers")
    made = case("llama")
    model = torch_export.load(made.model.half(), made.inputs, made.dynamic)
    assert [len(view.inner) for view in found(model, Norm)] == [7] * 5  # casts to float32 and back are inside


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rms = nn.RMSNorm(8)
        self.plain = nn.RMSNorm(8, eps=1e-5, elementwise_affine=False)
        self.two = nn.LayerNorm((4, 8))
        self.bare = nn.LayerNorm(8, elementwise_affine=False)
        self.no_bias = nn.LayerNorm(8, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bare(self.two(self.plain(self.rms(x)))) + self.no_bias(x)


def test_norms_of_torch() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8)
    model = torch_export.load(Norms().eval(), (x,))
    views = {view.node.meta["provenance"][0]: (view.kind, view.axes) for view in found(model, Norm)}
    kinds = {"rms": ("rms", 1), "plain": ("rms", 1), "two": ("layer", 2), "bare": ("layer", 1), "no_bias": ("layer", 1)}
    assert views == kinds
    assert assert_views_compute(model, [x]) == 5


# ---- written in ONNX


def parsed(body: str, inputs: str = "float[B, 4, 8] x", outputs: str = "float[B, 4, 8] y", opset: int = 17) -> Graph:
    """A graph from ONNX's text form; `w`, `b` [8], `m` [8, 8] and a few numbers are constants."""
    row = ", ".join(f"{0.5 + index / 8}" for index in range(8))
    square = ", ".join(f"{math.sin(index)}" for index in range(64))
    constants = (
        f"float[8] w = {{{row}}}, float[8] b = {{{row}}}, float[8, 8] m = {{{square}}}, float two = {{2}}, "
        "float one = {1}, float eps = {0.001}, float half = {0.5}, float zero = {0}, float low = {-1e30}, "
        "float cap = {5}"
    )
    text = f"""<ir_version: 9, opset_import: ["": {opset}, "com.microsoft": 1]>
    main ({inputs}) => ({outputs}) <{constants}> {{ {body} }}"""
    model = onnx_frontend.load(onnx.parser.parse_model(text), check=False)
    infer(model, {"B": 2, "S": 4})
    return model


LAYER_NORM = """
    mean = ReduceMean <axes = [-1]> (x)  d = Sub (x, mean)  {square}
    variance = ReduceMean <axes = [-1]> (s)  v = Add (variance, eps)  {quotient}
    scaled = Mul (n, w)  y = Add (scaled, b)
"""


@pytest.mark.parametrize("square", ["s = Pow (d, two)", "s = Mul (d, d)"])
@pytest.mark.parametrize(
    "quotient",
    [
        "r = Sqrt (v)  n = Div (d, r)",
        "r = Sqrt (v)  i = Reciprocal (r)  n = Mul (i, d)",
        "r = Sqrt (v)  i = Div (one, r)  n = Mul (d, i)",
        "r = Pow (v, half)  n = Div (d, r)",
    ],
)
def test_layer_norm_written_out(square: str, quotient: str) -> None:
    model = parsed(LAYER_NORM.format(square=square, quotient=quotient))
    (view,) = found(model, Norm)
    assert (view.kind, view.axes, view.x.name, view.node.meta["onnx"].outputs) == ("layer", 1, "x", ("y",))
    assert view.eps == pytest.approx(0.001)
    assert len(view.inner) == len(list(model.calls())) - 1
    assert assert_views_compute(model, [torch.randn(3, 4, 8)]) == 1


def test_norm_with_an_inner_value_used_elsewhere_is_refused() -> None:
    body = LAYER_NORM.format(square="s = Mul (d, d)", quotient="r = Sqrt (v)  n = Div (d, r)") + " z = Relu (variance)"
    model = parsed(body, outputs="float[B, 4, 8] y, float[B, 4, 1] z")
    assert not found(model, Norm)
    assert "its inner value variance is also used by z" in refused(model, Norm)


def test_norm_over_another_axis_is_none() -> None:
    body = LAYER_NORM.replace("[-1]", "[1]").format(square="s = Mul (d, d)", quotient="r = Sqrt (v)  n = Div (d, r)")
    model = parsed(body)
    assert not found(model, Norm)
    assert not refused(model, Norm)


def test_norm_with_a_computed_weight_is_refused() -> None:
    model = parsed("v = Neg (w)  y = LayerNormalization <axis = -1> (x, v, b)")
    assert refused(model, Norm) == ["the weight is computed at run time (by v), not a constant"]


def test_norm_counts_axes_from_the_front() -> None:
    model = parsed("y = LayerNormalization <axis = 2, epsilon = 0.1> (x, w)")
    (view,) = found(model, Norm)
    assert (view.axes, view.bias_node, view.eps) == (1, None, pytest.approx(0.1))


def test_norm_beside_its_statistics() -> None:
    model = parsed("y, mean, deviation = LayerNormalization (x, w, b)", outputs="float[B, 4, 8] y")
    (view,) = found(model, Norm)
    assert (view.node.target.__name__, view.x.name, len(view.inner)) == ("getitem", "x", 1)
    model = parsed("y, mean = LayerNormalization (x, w, b)", outputs="float[B, 4, 8] y, float[B, 4, 1] mean")
    assert refused(model, Norm) == ["its inner value y is also used by mean"]


ATTENTION = "kt = Transpose <perm = [0, 2, 1]> (x)  s = MatMul (x, kt)  {between}  y = MatMul (p, x)"


@pytest.mark.parametrize(
    "between",
    [
        "p = Softmax <axis = -1> (s)",
        "t = Div (s, two)  p = Softmax <axis = 2> (t)",
        "t = Mul (half, s)  u = Add (mask, t)  p = Softmax (u)",
        "u = Where (keep, s, low)  p = Softmax (u)",
        "u = Where (hide, low, s)  p = Softmax (u)",
        "t = Mul (s, half)  c = Div (t, cap)  h = Tanh (c)  u = Mul (h, cap)  v = Add (u, mask)  p = Softmax (v)",
        "q = Softmax (s)  n = IsNaN (q)  p = Where (n, zero, q)",
        "c = Cast <to = 11> (s)  q = Softmax (c)  p = Cast <to = 1> (q)",
    ],
)
def test_attention_written_out(between: str) -> None:
    inputs = "float[B, 4, 8] x, float[4, 4] mask, bool[4, 4] keep, bool[4, 4] hide"
    model = parsed(ATTENTION.format(between=between), inputs)
    (view,) = found(model, Attention)
    assert [part.node.name for part in (view.q, view.k, view.v)] == ["x"] * 3
    assert len(view.inner) == len(list(model.calls())) - 2  # the last product, and the transpose of the keys
    triangle = torch.ones(4, 4).tril().bool()
    given = [torch.randn(2, 4, 8), torch.randn(4, 4), triangle, ~triangle]
    assert assert_views_compute(model, given) == 1


def test_attention_keys_that_come_transposed() -> None:
    body = "s = MatMul (x, kt)  p = Softmax (s)  y = MatMul (p, x)"
    model = parsed(body, "float[B, 4, 8] x, float[B, 8, 4] kt")
    (view,) = found(model, Attention)
    assert view.k.perm == (0, 2, 1)
    assert assert_views_compute(model, [torch.randn(2, 4, 8), torch.randn(2, 8, 4)]) == 1


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("p = Softmax <axis = 1> (s)", r"the softmax runs over axis 1, not over the last one"),
        ("t = Relu (s)  p = Softmax (t)", r"between q @ k.T and the softmax there is t (Relu)"),
        (
            "t = Tanh (s)  u = Mul (t, cap)  e = Mul (u, half)  p = Softmax (e)",
            r"the scores are scaled behind the soft cap",
        ),
        ("t = Mul (s, mask)  p = Softmax (t)", r"the scores are multiplied by mask, which is not one constant number"),
        ("r = MatMul (x, kt)  t = Add (s, r)  p = Softmax (t)", r"two products are added before the softmax"),
        ("p = Softmax (s)  e = Relu (p)", r"its probabilities p are taken by e (Relu) and by y (MatMul)"),
    ],
)
def test_attention_refusals(between: str, reason: str) -> None:
    inputs = "float[B, 4, 8] x, float[4, 4] mask, float[4, 4] other"
    outputs = "float[B, 4, 8] y" + (", float[B, 4, 4] e" if "e = Relu" in between else "")
    model = parsed(ATTENTION.format(between=between), inputs, outputs)
    assert not found(model, Attention)
    (given,) = refused(model, Attention)
    assert given.startswith(reason)


def test_attention_of_onnx() -> None:
    body = "y = Attention <q_num_heads = 4, kv_num_heads = 2, is_causal = 1> (x, k, k)"
    model = parsed(body, "float[B, 4, 8] x, float[B, 4, 4] k", opset=23)
    (view,) = found(model, Attention)
    assert (view.kind, view.heads, view.left, view.right, view.scale) == ("onnx", (4, 2), None, 0, None)


def test_attention_of_onnx_with_a_cache_is_refused() -> None:
    inputs = "float[B, 2, 4, 8] x, float[B, 2, 3, 8] past"
    model = parsed("y = Attention (x, x, x, , past, past)", inputs, "float[B, 2, 4, 8] y", opset=23)
    assert refused(model, Attention) == ["it takes past_key"]


def test_attention_of_onnx_runtime() -> None:
    model = parsed("y = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x)")
    (view,) = found(model, Attention)
    assert (view.kind, view.heads) == ("contrib", (2, 2))
    assert assert_views_compute(model, [torch.randn(2, 4, 8)]) == 1
    model = parsed("y = com.microsoft.MultiHeadAttention <num_heads = 2> (x)")
    assert refused(model, Attention) == ["query, key and value are packed in one input"]
    model = parsed("y = com.microsoft.Attention <num_heads = 2> (x, m, b)")
    assert refused(model, Attention) == ["com.microsoft::Attention is a fused form with packed weights or a cache"]


def test_attention_with_dropout_is_refused() -> None:
    made = fx.Graph()
    x = made.placeholder("x")
    made.output((made.call_function(torch.ops.aten.scaled_dot_product_attention.default, (x, x, x, None, 0.1)),))
    model = Graph(made, nn.Module(), "torch", (), ())
    assert refused(model, Attention) == ["dropout_p=0.1; attention with dropout is for training"]


def test_residual_block_knows_its_inside() -> None:
    model = parsed("n = Relu (x)  a = MatMul (n, m)  g = Sigmoid (n)  h = Mul (a, g)  y = Add (x, h)")
    (view,) = found(model, ResidualBlock)
    assert (view.entry.name, view.branch.name) == ("x", "h")
    assert [node.name for node in view.inner] == ["n", "a", "g", "h"]


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid (x)  y = Add (x, s)",  # nothing is mixed: part of an activation function
        "a = MatMul (x, m)  y = Add (a, b)",  # a bias
        "a = MatMul (x, m)  c = MatMul (x, m)  y = Add (a, c)",  # two branches
        "a = MatMul (x, m)  y = Add (a, a)",
        "a = MatMul (other, m)  y = Add (x, a)",  # the branch does not come from x
        "r = ReduceMean <axes = [1]> (x)  t = MatMul (x, m)  u = MatMul (r, m)  v = Add (u, t)  y = Add (r, v)",
    ],
)
def test_what_is_not_a_residual_block(body: str) -> None:
    model = parsed(body, "float[B, 4, 8] x, float[B, 4, 8] other")
    assert not found(model, ResidualBlock)
    assert not refused(model, ResidualBlock)


def test_residual_block_that_leaks_is_refused() -> None:
    body = "a = MatMul (x, m)  y = Add (x, a)  z = Relu (a)"
    model = parsed(body, outputs="float[B, 4, 8] y, float[B, 4, 8] z")
    assert refused(model, ResidualBlock) == ["its inner value a is also used by z"]


def test_shapes_do_not_leak() -> None:
    body = "a = MatMul (x, m)  y = Add (x, a)  shape = Shape (a)  z = Expand (one, shape)"
    model = parsed(body, outputs="float[B, 4, 8] y, float[B, 4, 8] z")
    assert len(found(model, ResidualBlock)) == 1


def test_refusals_are_refusals() -> None:
    model = parsed("v = Neg (w)  y = LayerNormalization (x, v)")
    assert all(isinstance(reason, Refusal) for node, reason in norms(model))
