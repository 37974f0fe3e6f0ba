"""rearrange-channels: the same outputs, more importance kept, heads kept apart, a reason for every refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.errors import InvalidInput, InvalidOption, UnknownName
from fxopt.ir.graph import Graph
from fxopt.ir.shapes import infer
from fxopt.ir.sparsity import Mark, Pattern
from fxopt.ir.views.conv import Conv, convs
from fxopt.ir.views.linear import Linear, linears
from fxopt.passes.base import parse_pass
from fxopt.passes.rearrange_channels import RearrangeChannels, rearrange
from fxopt.passes.rearrange_channels.order import Role, best_order
from fxopt.testing import assert_no_worse
from tests import zoo
from tests.passes.helpers import context, onnx_graph, refusals, torch_graph

PATTERNS = (("4x1", 0.7), ("8x1", 0.5), ("2:4", 0.5), ("4x2:4", 0.5), ("1x1", 0.5))


def uneven(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal weights of which rows and columns have different sizes, as those of trained models have."""
    weight = torch.randn(shape, generator=generator)
    for axis in (0, 1):
        scale = torch.exp(torch.randn(shape[axis], generator=generator))
        weight = weight * scale.reshape([-1 if index == axis else 1 for index in range(len(shape))])
    return weight / weight.std() / shape[1] ** 0.5


def kept(graph: Graph, pattern: Pattern, sparsity: float) -> float:
    """The share of the magnitudes of all weights that the pattern keeps, each counted by its size."""
    found = whole = 0.0
    for view in (*linears(graph), *convs(graph)):
        if not isinstance(view, (Linear, Conv)) or (isinstance(view, Conv) and view.groups > 1):
            continue
        scores = view.weight(graph).flatten(1).abs()
        if not pattern.refusal(*scores.shape):
            share = scores[pattern.mask(scores, sparsity)].double().sum() / scores.double().sum()
            found, whole = found + float(share) * scores.numel(), whole + scores.numel()
    return found / whole if whole else 0.0


def check(graph: Graph, samples: list[list[Any]], text: str, sparsity: float) -> int:
    """Rearrange a copy, and check all that must hold; returns how many groups were rearranged."""
    after, pattern = graph.copy(), Pattern.parse(text)
    ctx = context()
    step = RearrangeChannels(text, sparsity)
    count = step.run(after, ctx)
    assert step.run(after, ctx) == 0, "it finds something again"
    assert_no_worse(graph, after, samples, factor=4.0)  # sums in another order: rounding of a few outputs varies
    assert [node.name for node in graph.nodes] == [node.name for node in after.nodes]
    for node in graph.fx.find_nodes(op="get_attr"):
        was, now = graph.attribute(str(node.target)), after.attribute(str(node.target))
        if isinstance(was, Tensor):
            assert torch.equal(was.flatten().sort().values, now.flatten().sort().values), f"{node} lost elements"
            if count == 0:
                assert was is now
    before, found = kept(graph, pattern, sparsity), kept(after, pattern, sparsity)
    rows = ctx.ledger.select(outcome="applied")
    assert len(list(rows)) == count and (found > before if count else found == before)
    for row in ctx.ledger.select(outcome="applied"):
        now, was = (float(number) for number in re.findall(r"([\d.]+)%(?: of the importance| before)", row.reason))
        assert now >= was
    return count


# ---- models of both dialects


def mlp(seed: int) -> Graph:
    make = torch.Generator().manual_seed(seed)
    text = (
        "g (float[n, 12] x) => (float[n, 8] y) { a = Gemm <transB = 1> (x, w1, b1)\n b = Relu(a)\n"
        " c = MatMul(b, w2)\n d = Add(c, b2)\n e = Sigmoid(d)\n y = Gemm(e, w3) }"
    )
    sizes = [int(size) * 4 for size in torch.randint(2, 7, (2,), generator=make)]
    return onnx_graph(
        text, w1=uneven(sizes[0], 12, generator=make), b1=torch.randn(sizes[0], generator=make),
        w2=uneven(sizes[0], sizes[1], generator=make), b2=torch.randn(sizes[1], generator=make),
        w3=uneven(sizes[1], 8, generator=make),
    )  # fmt: skip


def cnn(seed: int) -> Graph:
    """Convolutions with a residual sum, batch norm, a depthwise convolution and pooling."""
    make = torch.Generator().manual_seed(seed)
    channels = 8 * int(torch.randint(1, 4, (), generator=make))
    text = (
        "g (float[n, 3, 6, 6] x) => (float[n, 5] y) { a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)\n"
        " b = BatchNormalization(a, s, t, m, v)\n c = Relu(b)\n d = Conv (c, w2)\n e = Add(d, c)\n"
        f" f = Conv <group = {channels}, pads = [1, 1, 1, 1]> (e, w3)\n h = Conv (f, w4)\n i = PRelu(h, p)\n"
        " j = GlobalAveragePool(i)\n k = Flatten(j)\n y = Gemm <transB = 1> (k, w5) }"
    )
    vectors = {name: torch.rand(channels, generator=make) + 0.5 for name in ("b1", "s", "t", "m", "v")}
    return onnx_graph(
        text, w1=uneven(channels, 3, 3, 3, generator=make), w2=uneven(channels, channels, 1, 1, generator=make),
        w3=uneven(channels, 1, 3, 3, generator=make), w4=uneven(16, channels, 1, 1, generator=make),
        p=torch.rand(16, 1, 1, generator=make), w5=uneven(5, 16, generator=make), **vectors,
    )  # fmt: skip


class Block(nn.Module):
    """A pre-norm transformer block with an embedding before and a head behind."""

    def __init__(self, seed: int, heads: int = 2, width: int = 8, hidden: int = 48) -> None:
        super().__init__()
        self.heads, dim = heads, heads * width
        self.table = nn.Embedding(11, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Linear(dim, 11)
        make = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            shape = tuple(parameter.shape)
            parameter.data = uneven(*shape, generator=make) if len(shape) > 1 else torch.randn(shape, generator=make)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        h = self.norms[0](x)
        q, k, v = (
            torch.unflatten(layer(h), -1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))
        return self.head(x)


def transformer(seed: int, **options: int) -> Graph:
    graph = torch_graph(Block(seed, **options), torch.zeros(2, 5, dtype=torch.int64))
    infer(graph)
    return graph


def onnx_attention(seed: int, heads: tuple[int, int] = (4, 2), width: int = 16) -> Graph:
    """Attention of opset 23 on projections as they are, with fewer heads of keys and values."""
    make = torch.Generator().manual_seed(seed)
    many, few = heads[0] * width, heads[1] * width
    text = (
        "g (float[n, l, 12] x) => (float[n, l, 12] y) { q = MatMul(x, wq)\n k0 = MatMul(x, wk)\n k = Add(k0, bk)\n"
        f" v = MatMul(x, wv)\n a = Attention <q_num_heads = {heads[0]}, kv_num_heads = {heads[1]}> (q, k, v)\n"
        " o = MatMul(a, wo)\n y = Add(x, o) }"
    )
    return onnx_graph(
        text, 23, wq=uneven(12, many, generator=make), wk=uneven(12, few, generator=make),
        bk=torch.randn(few, generator=make), wv=uneven(12, few, generator=make), wo=uneven(many, 12, generator=make),
    )  # fmt: skip


def sample(graph: Graph, seed: int) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    found = []
    for spec in graph.inputs:
        assert spec.shape is not None and spec.dtype is not None
        shape = [dim if isinstance(dim, int) else 3 for dim in spec.shape]
        is_float = spec.dtype.is_floating_point
        found.append(torch.randn(shape, generator=make) if is_float else torch.randint(0, 11, shape, generator=make))
    return found


MODELS: dict[str, Callable[[int], Graph]] = {
    "mlp": mlp, "cnn": cnn, "transformer": transformer, "attention": onnx_attention,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(2))
def test_outputs_stay_and_more_is_kept(name: str, seed: int) -> None:
    graph = MODELS[name](seed)
    counts = {text: check(graph, [sample(graph, seed)], text, sparsity) for text, sparsity in PATTERNS}
    assert counts["4x1"] >= 2 and counts["2:4"] and counts["4x2:4"] and counts["1x1"] == 0
    assert counts["8x1"] or name == "attention"  # a head is as wide as a block


@pytest.mark.slow
@pytest.mark.parametrize("origin", zoo.ORIGINS)
@pytest.mark.parametrize("name", zoo.BUILDERS)
def test_architectures(name: str, origin: str) -> None:
    graph, inputs = zoo.graph(name, origin), list(zoo.case(name).inputs.values())
    found = [check(graph, [inputs], text, sparsity) for text, sparsity in (("4x1", 0.7), ("2:4", 0.5))]
    assert any(found) or name == "cnn"


# ---- the search


@pytest.mark.parametrize("kept_of", [(0, 4), (2, 4), (1, 4), (1, 2)])
def test_gains_of_swaps_are_those_of_doing_them(kept_of: tuple[int, int]) -> None:
    kept_count, size = kept_of
    scores = torch.rand(16, 7)

    def worth(values: Tensor) -> float:
        groups = values.reshape(-1, size, 7)
        if kept_count:
            return float(groups.topk(kept_count, 1).values.sum())
        return float((groups.sum(1) - 2.0).clamp(min=0).sum())

    role = Role(scores.clone(), size, kept_count, 2.0)
    role.prepare()
    for i in range(16):
        gains = role.gains(i)
        for j in range(16):
            swapped = scores.clone()
            swapped[[i, j]] = swapped[[j, i]]
            assert gains[j].item() == pytest.approx(worth(swapped) - worth(scores), abs=1e-5)
    role.swap(3, 12)
    scores[[3, 12]] = scores[[12, 3]]
    assert role.gains(5)[14].item() == pytest.approx(
        worth(scores[[*range(5), 14, *range(6, 14), 5, 15]]) - worth(scores), abs=1e-5
    )


def test_a_hidden_order_is_found() -> None:
    """Rows of four kinds that share their columns, shuffled: 4x1 blocks at 75 % can keep everything, and 2:4 too."""
    make = torch.Generator().manual_seed(0)
    rows = torch.zeros(32, 16)
    for index in range(32):
        kind = index // 8
        rows[index, 4 * kind : 4 * kind + 4] = 1 + torch.rand(4, generator=make)
    shuffled = rows[torch.randperm(32, generator=make)]
    text = "g (float[n, 16] x) => (float[n, 4] y) { a = MatMul(x, w1)\n b = Relu(a)\n y = MatMul(b, w2) }"
    graph = onnx_graph(text, w1=shuffled.t().contiguous(), w2=torch.randn(32, 4, generator=make))
    found = rearrange(graph, Pattern.parse("4x1"), 0.75)
    hidden = next(each for each in found if each.refusal is None)
    assert hidden.before < 0.6 and hidden.after == pytest.approx(1.0)
    columns = torch.cat([torch.ones(16, 16), torch.zeros(16, 16)])  # neighbours are important together
    text = "g (float[n, 4] x) => (float[n, 16] y) { a = MatMul(x, w1)\n b = Relu(a)\n y = MatMul(b, w2) }"
    graph = onnx_graph(text, w1=torch.randn(4, 32, generator=make), w2=columns)
    (hidden,) = (each for each in rearrange(graph, Pattern.parse("2:4"), 0.5) if each.refusal is None)
    assert hidden.before == pytest.approx(0.5) and hidden.after == pytest.approx(1.0)


def test_an_order_is_a_permutation_whatever_the_scores() -> None:
    make = torch.Generator().manual_seed(1)
    for scores in (torch.zeros(12, 3), torch.ones(12, 3), torch.rand(12, 0), torch.rand(12, 3, generator=make)):
        roles = [Role(scores, 4, threshold=1.0, sets=scores > 0.5), Role(scores.clone(), 3, 1)]
        assert best_order(roles).sort().values.tolist() == list(range(12))


# ---- heads


@pytest.mark.parametrize("name", ["transformer", "attention"])
def test_heads_stay_where_they_are(name: str) -> None:
    graph = MODELS[name](5)
    after = graph.copy()
    assert rearrange(after, Pattern.parse("4x1"), 0.7)
    by_name = {view.weight_node.name: view for view in linears(graph) if isinstance(view, Linear)}
    q, k, v = ("c_wq", "c_wk", "c_wv") if name == "attention" else ("q_weight", "k_weight", "v_weight")
    # columns are another group: compare rows by what does not depend on their order
    keys = {key: [by_name[key].weight(each).sort(1).values for each in (graph, after)] for key in (q, k, v)}
    width = 16 if name == "attention" else 8
    orders = {}
    for key, (was, now) in keys.items():
        order = [int((was == row).all(1).nonzero()[0]) for row in now]
        heads = [place // width for place in range(len(order))]
        assert [place // width for place in order] == heads, "a row left its head"
        orders[key] = [place % width for place in order]
        assert orders[key] != [place % width for place in range(len(order))]
    repeats = len(orders[q]) // len(orders[k])
    for head in range(len(orders[k]) // width):
        own = orders[k][width * head : width * (head + 1)]
        for other in range(head * repeats, (head + 1) * repeats):
            assert orders[q][width * other : width * (other + 1)] == own


def test_queries_that_something_else_uses_keep_their_order() -> None:
    text = (
        "g (float[n, l, 12] x) => (float[n, l, 16] y, float[n, l, 16] k) { q = MatMul(x, wq)\n k = MatMul(x, wk)\n"
        " v = MatMul(x, wv)\n a = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v)\n y = MatMul(a, wo) }"
    )
    make = torch.Generator().manual_seed(0)
    weights = {name: uneven(12, 16, generator=make) for name in ("wq", "wk", "wv")}
    graph = onnx_graph(text, 23, wo=uneven(16, 16, generator=make), **weights)
    after, ctx = graph.copy(), context()
    RearrangeChannels().run(after, ctx)
    assert_no_worse(graph, after, [[torch.randn(2, 3, 12, generator=make)]], factor=4.0)
    assert torch.equal(graph.attribute("c_wq"), after.attribute("c_wq"))
    assert not torch.equal(graph.attribute("c_wv"), after.attribute("c_wv"))
    assert any(re.search("n_k|n_q|Attention", reason) for reason in refusals(ctx))


# ---- refusals


def told(graph: Graph, text: str = "4x1", **options: Any) -> str:
    ctx = context(**options)
    before = {str(node.target): graph.attribute(str(node.target)) for node in graph.fx.find_nodes(op="get_attr")}
    count = RearrangeChannels(text).run(graph, ctx)
    unchanged = all(graph.attribute(name) is value for name, value in before.items())
    assert unchanged == (count == 0)
    return "\n".join(f"{row.node}: {row.reason}" for row in ctx.ledger.select(outcome="refused"))


def two_layers(between: str, hidden: int = 8, **constants: Tensor) -> Graph:
    make = torch.Generator().manual_seed(0)
    text = f"g (float[n, 8] x) => (float[n, 8] y) {{ a = MatMul(x, w1)\n {between}\n y = MatMul(b, w2) }}"
    weights = {"w1": uneven(8, hidden, generator=make), "w2": uneven(hidden, 8, generator=make)}
    return onnx_graph(text, **weights, **constants)


def test_refusals_have_reasons() -> None:
    said = told(two_layers("b = Relu(a)"))
    assert said == "n_y: 8 channels: the order is fixed: n_y: it is an output"
    said = told(two_layers("b = Relu(a)"), "2:4")
    assert "n_a: 8 channels: the order is fixed: x: it is an input" in said
    said = told(two_layers("b = CumSum(a, axis)", axis=torch.tensor(1)))
    assert re.search(r"n_a: 8 channels: the order is fixed: n_a: .*CumSum.* does not say how its axes correspond", said)
    said = told(two_layers("b = Relu(a)", hidden=10))
    assert "n_a: 10 channels: 10 outputs do not divide by the 4 of the pattern 4x1" in said
    said = told(two_layers("b = Relu(a)"), exclude=re.compile("n_a"))
    assert "n_a: 8 channels: excluded by --exclude n_a" in said
    said = told(two_layers("b = Relu(a)"), "1x1")
    assert "n_a: 8 channels: the pattern 1x1 does not depend on the order" in said
    graph = two_layers("b = Relu(a)")
    RearrangeChannels().run(graph, context())
    graph.find("n_a").meta["sparsity"] = Mark(Pattern.parse("4x1"), 0.0)  # type: ignore[union-attr]
    assert "n_a: 8 channels: n_a was made sparse before: its pattern could break" in told(graph)
    graph = two_layers("b = Relu(a)")
    graph.find("n_y").meta["sparsity"] = Mark(Pattern.parse("2:4"), 0.5)  # type: ignore[union-attr]
    assert "n_a: 8 channels: n_y was made sparse before" in told(graph)  # its inputs would move
    equal = onnx_graph(
        "g (float[n, 8] x) => (float[n, 8] y) { a = MatMul(x, w1)\n b = Relu(a)\n y = MatMul(b, w2) }",
        w1=torch.ones(8, 8), w2=torch.full((8, 8), 2.0),
    )  # fmt: skip
    assert re.search(r"n_a: 8 channels: no better order was found: 4x1 keeps 3[01].\d% of the importance", told(equal))
    assert "do not divide by 8 of the pattern 8x1" in told(transformer(0, width=12), "8x1")


def test_what_cannot_be_permuted_fixes_the_order() -> None:
    """A constant that torch cannot hold, and indices that count channels."""
    fours = np.arange(-4, 4).astype(ml_dtypes.int4)
    graph = two_layers("s = Cast <to = 1> (c)\n b = Mul(a, s)", c=fours)
    after = graph.copy()
    assert "n_a: 8 channels: the order is fixed: c: torch has no element type for it" in told(after)
    assert_no_worse(graph, after, [[torch.randn(3, 8)]])
    make = torch.Generator().manual_seed(0)
    text = (
        "g (float[1, 3, 4, 4] x) => (float[1, 8, 2, 2] y, int64[1, 8, 2, 2] places) { a = Conv(x, w)\n"
        " y0, places = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)\n y = Conv(y0, w2) }"
    )
    weights = {"w": uneven(8, 3, 1, 1, generator=make), "w2": uneven(8, 8, 1, 1, generator=make)}
    pooled = onnx_graph(text, **weights)
    after = pooled.copy()
    assert "n_a: 8 channels: the order is fixed" in told(after) and "its indices count channels" in told(after)
    assert_no_worse(pooled, after, [[torch.randn(1, 3, 4, 4)]])


def test_weights_that_are_not_finite_are_left_alone() -> None:
    graph = two_layers("b = Relu(a)")
    graph.attribute("c_w1")[0, 0] = float("nan")
    assert "no better order" in told(graph)


# ---- options and surroundings


def test_options() -> None:
    from fxopt.catalog import find_pass

    step = parse_pass("rearrange-channels{pattern=8x2:4,sparsity=0.5}", find_pass)
    assert step == RearrangeChannels("8x2:4", 0.5) and str(step) == "rearrange-channels{pattern=8x2:4,sparsity=0.5}"
    with pytest.raises(InvalidOption, match="sparsity pattern '4x': expected N:M like 2:4"):
        RearrangeChannels("4x")
    with pytest.raises(InvalidOption, match="sparsity=1.5; expected more than 0 and less than 1"):
        RearrangeChannels(sparsity=1.5)
    with pytest.raises(UnknownName, match="'patern'; did you mean 'pattern'"):
        parse_pass("rearrange-channels{patern=4x1}", find_pass)


def test_importance_of_the_users() -> None:
    """As in Wanda, what the inputs are decides: columns that are never seen do not count."""
    make = torch.Generator().manual_seed(2)
    seen = torch.zeros(12)
    seen[::3] = torch.rand(4, generator=make) + 1
    text = "g (float[n, 12] x) => (float[n, 4] y) { a = MatMul(x, w1)\n b = Relu(a)\n y = MatMul(b, w2) }"
    graph = onnx_graph(text, w1=uneven(12, 32, generator=make), w2=torch.randn(32, 4, generator=make))

    def wanda(view: Linear | Conv) -> Tensor:
        weight = view.weight(graph)
        return weight.abs() * seen if weight.shape[1] == 12 else weight.abs()

    def share(changed: Graph) -> float:
        scores = changed.attribute("c_w1").t().abs() * seen
        return float(scores[Pattern.parse("4x1").mask(scores, 0.8)].sum() / scores.sum())

    plain, own = graph.copy(), graph.copy()
    rearrange(plain, Pattern.parse("4x1"), 0.8)
    found = rearrange(own, Pattern.parse("4x1"), 0.8, wanda)
    assert share(own) > max(share(plain), share(graph))
    assert found[0].after == pytest.approx(share(own), rel=1e-5) and found[0].before == pytest.approx(share(graph), rel=1e-5)
    assert_no_worse(graph, own, [[torch.randn(5, 12, generator=make)]], factor=4.0)
    with pytest.raises(InvalidInput, match=r"importance of 'n_a' has shape \[32\]; expected \[32, 12\]"):
        rearrange(graph.copy(), Pattern.parse("4x1"), 0.8, lambda view: torch.ones(32))
    with pytest.raises(InvalidInput, match="no negative number"):
        rearrange(graph.copy(), Pattern.parse("4x1"), 0.8, lambda view: view.weight(graph))


def test_as_a_pass_of_optimize(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "models" / "digits-cnn.onnx"
    images = torch.rand(4, 1, 8, 8)
    result = fxopt.optimize(
        path, "host", passes=["rearrange-channels{pattern=8x1}"], calibration=[images], force=True, guard_seconds=0.1
    )
    rows = [row for row in result.ledger.verdicts if row.pass_name == "rearrange-channels"]
    assert sum("8x1 at 70% keeps" in row.reason for row in rows) >= 3
    assert any("it is an output" in row.reason for row in rows) and not any("changes" in row.reason for row in rows)
    result.save(tmp_path / "out.onnx")
    expected = torch.as_tensor(fxopt.optimize(path, "host", passes=[])(images))
    assert torch.allclose(torch.as_tensor(fxopt.load(tmp_path / "out.onnx")(images)), expected, atol=1e-4)
    before, after = (fxopt.capture(each) for each in (path, tmp_path / "out.onnx"))
    assert kept(after, Pattern.parse("8x1"), 0.7) > kept(before, Pattern.parse("8x1"), 0.7)
