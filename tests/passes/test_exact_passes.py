"""fold-constants, fold-batch-norm, merge-common-subexpressions, eliminate-dead-code: fires, does not fire, numbers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxopt.passes.eliminate_dead_code import EliminateDeadCode
from fxopt.passes.fold_batch_norm import FoldBatchNorm
from fxopt.passes.fold_constants import FoldConstants
from fxopt.passes.merge_common_subexpressions import MergeCommonSubexpressions
from tests.passes.helpers import (
    applied,
    assert_same_bits,
    both_floats,
    context,
    onnx_graph,
    operators,
    refusals,
    samples_of,
    torch_graph,
)


def floats(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- fold-constants


def test_constants_are_computed_once() -> None:
    graph = onnx_graph("g (float[3] x) => (float[3] y) { a = Exp(w) b = Add(a, w) y = Mul(x, b) }", w=floats(3))
    samples = samples_of(graph)
    after, count = applied(FoldConstants(), graph, samples)
    assert operators(after) == ["Mul"] and count >= 1
    assert_same_bits(graph, after, samples)


def test_a_fixed_shape_is_a_constant_and_a_dynamic_one_is_not() -> None:
    text = "g ({} x) => (float[m] y) {{ s = Shape(x) y = Reshape(x, s) }}"
    fixed = onnx_graph(text.format("float[2,3]").replace("float[m]", "float[2,3]"))
    assert operators(applied(FoldConstants(), fixed, samples_of(fixed))[0]) == ["Reshape"]
    dynamic = onnx_graph(text.format("float[n,3]").replace("float[m]", "float[n,3]"), sizes={"n": 4})
    assert operators(applied(FoldConstants(), dynamic, samples_of(dynamic))[0]) == ["Shape", "Reshape"]


def test_positions_cut_to_a_dynamic_length_stay() -> None:
    """The size of the sample is not the size of the model: a slice up to the sequence length must not be folded."""
    text = """g (float[seq,4] x) => (float[seq,4] y) {
        s = Shape<start = 0, end = 1>(x) p = Slice(table, zero, s, zero) y = Add(x, p) }"""
    graph = onnx_graph(text, sizes={"seq": 8}, table=floats(8, 4), zero=np.array([0], np.int64))
    after, count = applied(FoldConstants(), graph, samples_of(graph, seq=5))
    assert count == 0 and operators(after) == ["Shape", "Slice", "Add"]


def test_a_large_result_is_not_folded() -> None:
    graph = onnx_graph(
        "g (float[1024,1024] x) => (float[1024,1024] y) { w = Expand(v, s) y = Add(x, w) }",
        v=floats(1),
        s=np.array([1024, 1024], np.int64),
    )
    ctx = context()
    after, count = applied(FoldConstants(), graph, ctx=ctx)
    assert count == 0 and "Expand" in operators(after)
    assert any(re.search(r"bytes|MB|grow|larg", reason) for reason in refusals(ctx)), refusals(ctx)


def test_random_operators_stay() -> None:
    graph = onnx_graph("g (float[3] x) => (float[3] y) { r = RandomNormal<shape = [3]>() y = Add(x, r) }")
    assert FoldConstants().run(graph, context()) == 0


def test_constants_of_torch_graphs() -> None:
    graph = torch_graph(lambda x, w: x * (w.exp() + 1), torch.ones(3), w=torch.randn(3))
    after, count = applied(FoldConstants(), graph, samples_of(graph))
    assert count >= 1 and operators(after) == ["mul"]


# ---- fold-batch-norm


class Norms(nn.Module):
    """Convolution or linear, batch norm with real statistics, ReLU."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm
        with torch.no_grad():
            for value in (norm.running_mean, norm.weight, norm.bias):
                value.normal_()  # type: ignore[union-attr, operator]
            norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr, operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x)).relu()


LAYERS = {
    "conv": lambda: (nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), (2, 3, 7, 6)),
    "no bias": lambda: (nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), (1, 3, 5, 5)),
    "depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (2, 4, 6, 5)),
    "one dimension": lambda: (nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), (2, 3, 9)),
    "linear": lambda: (nn.Linear(6, 4), nn.BatchNorm1d(4), (3, 6)),
}


@pytest.mark.parametrize("name", list(LAYERS))
@both_floats
def test_batch_norms_of_torch_graphs(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, norm, shape = LAYERS[name]()
    graph = torch_graph(Norms(layer, norm).to(dtype), torch.randn(shape).to(dtype))
    after, count = applied(FoldBatchNorm(), graph, samples_of(graph), factor=4.0)  # weights are rounded once more
    assert count == 1
    assert not any("batch_norm" in operator for operator in operators(after))


BATCH_NORM = "BatchNormalization(c, scale, shift, mean, var)"
VECTORS = {
    "scale": floats(4),
    "shift": floats(4, seed=1),
    "mean": floats(4, seed=2),
    "var": np.abs(floats(4, seed=3)) + 1,
}


def test_batch_norms_of_onnx_graphs() -> None:
    graph = onnx_graph(
        f"g (float[n,3,6,5] x) => (float[n,4,4,3] y) {{ c = Conv(x, w, b) d = {BATCH_NORM} y = Relu(d) }}",
        w=floats(4, 3, 3, 3),
        b=floats(4, seed=5),
        **VECTORS,
    )
    after, count = applied(FoldBatchNorm(), graph, samples_of(graph, n=2), factor=4.0)
    assert count == 1 and operators(after) == ["Conv", "Relu"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"c = Conv(x, w) d = {BATCH_NORM} y = Add(c, d)", "is also used by"),
        (f"c = Relu(x) y = {BATCH_NORM}", "is not the result of a convolution or linear layer"),
        ("c = Conv(x, w) v = Abs(z) y = BatchNormalization(c, scale, shift, mean, v)", "computed at run time"),
    ],
)
def test_batch_norms_that_stay(body: str, reason: str) -> None:
    graph = onnx_graph(
        f"g (float[n,4,3,3] x, float[4] z) => (float[n,4,3,3] y) {{ {body} }}", w=floats(4, 4, 1, 1), **VECTORS
    )
    ctx = context()
    assert FoldBatchNorm().run(graph, ctx) == 0
    assert any(reason in text for text in refusals(ctx)), refusals(ctx)


# ---- merge-common-subexpressions


def test_equal_values_are_computed_once() -> None:
    graph = onnx_graph(
        "g (float[3] x) => (float[3] y) { a = Tanh(x) b = Tanh(x) c = Mul(a, v) d = Mul(b, w) y = Add(c, d) }",
        v=floats(3),
        w=floats(3),
    )
    samples = samples_of(graph)
    after, count = applied(MergeCommonSubexpressions(), graph, samples)
    assert operators(after) == ["Tanh", "Mul", "Add"] and count >= 2
    assert_same_bits(graph, after, samples)


@pytest.mark.parametrize(
    "body",
    [
        "a = Mul(x, v) b = Mul(x, w) y = Add(a, b)",
        "a = Softmax<axis = 0>(x) b = Softmax<axis = 1>(x) y = Add(a, b)",
        "a = RandomNormalLike(x) b = RandomNormalLike(x) y = Add(a, b)",
    ],
)
def test_different_values_are_not_merged(body: str) -> None:
    graph = onnx_graph(f"g (float[3,3] x) => (float[3,3] y) {{ {body} }}", v=floats(3), w=floats(3, seed=1))
    EliminateDeadCode().run(graph, context())
    assert MergeCommonSubexpressions().run(graph, context()) == 0


def test_equal_values_of_torch_graphs() -> None:
    graph = torch_graph(lambda x: (x.tanh() + 1) * (x.tanh() + 1), torch.ones(3))
    after, count = applied(MergeCommonSubexpressions(), graph, samples_of(graph))
    assert count == 2 and operators(after) == ["tanh", "add", "mul"]


def test_two_equal_results_keep_their_names() -> None:
    graph = onnx_graph("g (float[3] x) => (float[3] y, float[3] z) { y = Relu(x) z = Relu(x) }")
    after, _ = applied(MergeCommonSubexpressions(), graph, samples_of(graph))
    assert [spec.name for spec in after.outputs] == ["y", "z"]


# ---- eliminate-dead-code


def test_dead_operators_and_constants_go() -> None:
    graph = onnx_graph("g (float[3] x) => (float[3] y) { a = Exp(x) b = Add(a, w) y = Relu(x) }", w=floats(3))
    after, count = applied(EliminateDeadCode(), graph, samples_of(graph))
    assert count == 3 and operators(after) == ["Relu"]


def test_what_results_need_stays() -> None:
    graph = onnx_graph("g (float[3] x, float[3] unused) => (float[3] y) { y = Add(x, w) }", w=floats(3))
    after, count = applied(EliminateDeadCode(), graph, samples_of(graph))
    assert count == 0 and len(after.placeholders) == 2
