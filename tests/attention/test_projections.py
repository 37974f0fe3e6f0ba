"""Queries, keys and values of one input become one linear, and no adapter is lost on the way."""

from __future__ import annotations

import onnx.parser
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.frontends import onnx as onnx_frontend
from fxopt.frontends import torch_export
from fxopt.ir.graph import Graph
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.fuse_attention_heads import FuseAttentionHeads
from fxopt.passes.manager import PassManager
from fxopt.testing import PLAIN_CPU, assert_no_worse

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """Attention whose queries have another bias, number of heads, or an adapter of low rank."""

    def __init__(self, shared: int = HEADS, bias: bool = True, adapter: bool = False) -> None:
        super().__init__()
        narrow = WIDTH // HEADS * shared
        self.q = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.k, self.v = nn.Linear(WIDTH, narrow, bias=False), nn.Linear(WIDTH, narrow)
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 2, False), nn.Linear(2, WIDTH, False)) if adapter else None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x) if self.adapter is None else self.q(x) + self.adapter(x) * 0.5
        q, k, v = (y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for y in (q, self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1])
        return y.transpose(1, 2).flatten(2)


def fused(module: nn.Module, *x: Tensor, ctx: Context | None = None) -> tuple[Graph, Graph, int, Context]:
    torch.manual_seed(0)
    before = torch_export.load(module.eval(), x)
    after, ctx = before.copy(), ctx or Context(PLAIN_CPU)
    return before, after, PassManager([FuseAttentionHeads()]).run(after, ctx), ctx


def linears(graph: Graph) -> int:
    return sum("linear" in str(node.target) for node in graph.calls())


@pytest.mark.parametrize("shared", [4, 2, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_one_linear(shared: int, bias: bool) -> None:
    x = torch.randn(2, 5, WIDTH)
    before, after, changes, _ = fused(Block(shared, bias), x)
    assert (changes, linears(before), linears(after)) == (1, 3, 1)
    assert_no_worse(before, after, [(x,)])


def test_an_adapter_is_left_alone() -> None:
    x = torch.randn(2, 5, WIDTH)
    before, after, changes, ctx = fused(Block(adapter=True), x)
    assert changes == 0
    assert linears(after) == linears(before)
    (verdict,) = ctx.ledger.select(outcome="refused")
    assert verdict.reason == "its queries, keys and values stay products: add (add.Tensor) is no linear of an input"


def test_inputs_that_differ_are_no_candidate() -> None:
    class Cross(Block):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, k, v = (z.unflatten(-1, (HEADS, -1)).transpose(1, 2) for z in (self.q(x), self.k(y), self.v(x + y)))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    _, _, changes, ctx = fused(Cross(), torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH))
    assert changes == 0
    assert not list(ctx.ledger.select(outcome="refused"))


def test_a_backend_that_is_no_faster_says_so() -> None:
    _, _, changes, ctx = fused(Block(), torch.randn(2, 5, WIDTH), ctx=Context(PLAIN_CPU, capabilities=OnnxRuntime()))
    assert changes == 0
    (verdict,) = ctx.ledger.select(outcome="refused")
    assert "is no faster in ONNX Runtime than three" in verdict.reason


def test_excluded_by_name() -> None:
    import re

    _, _, changes, ctx = fused(
        Block(), torch.randn(2, 5, WIDTH), ctx=Context(PLAIN_CPU, exclude=re.compile("^linear$"))
    )
    assert changes == 0
    assert any("excluded by --exclude" in verdict.reason for verdict in ctx.ledger.verdicts)


def test_an_input_of_unknown_type_is_left_alone() -> None:
    weights = "".join(
        f" w{name} = Constant <value = float[2, 2] {{1, 2, 3, {number}}}> ()" for number, name in enumerate("qkv")
    )
    linears_of_x = "".join(f" {name} = MatMul (x, w{name})" for name in "qkv")
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> attend (float[1, 6, 2] g, bool[6] c) => (float[1, n, 2] y) '
        f"{{ {weights} x = Compress <axis = 1> (g, c) {linears_of_x}"
        " y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }"
    )
    graph = onnx_frontend.load(proto)
    infer(graph)
    ctx = Context(PLAIN_CPU)
    assert FuseAttentionHeads().run(graph, ctx) == 0
    (verdict,) = ctx.ledger.select(outcome="refused")
    assert verdict.reason == "its queries, keys and values stay products: the type of their input is unknown"
