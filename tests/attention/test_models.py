"""Attention of published architectures, in their own spelling and in torch's, from three exports: found and fused."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import fx, nn

from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.onnxruntime.backend import version
from fxopt.cost_model.targets import get_target
from fxopt.frontends import onnx as onnx_frontend
from fxopt.frontends.capture.program import export
from fxopt.frontends.convert_graph import convert_graph
from fxopt.frontends.to_onnx import onnx_graph_of
from fxopt.frontends.torch_export import graph_of
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Ledger
from fxopt.ir.shapes import infer
from fxopt.ir.views.attention import Attention, NotAttention, attentions
from fxopt.passes.base import Context
from fxopt.passes.fuse_attention_heads import FuseAttentionHeads
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import exact_pipeline
from fxopt.testing import PLAIN_CPU, assert_no_worse
from tests.attention.computed import computed
from tests.attention.models import BATCH, DECODED, MODELS, SEQUENCE
from tests.attention.test_spelled import said, wanted

SIZES = {"batch": BATCH, "seq": SEQUENCE, "dec": DECODED}
TARGET = get_target("x86-avx2")
CASES = [
    (name, implementation, origin)
    for name, model in MODELS.items()
    for implementation in ("eager", "sdpa")
    for origin in ("torch", "dynamo", "script")
    if not {implementation, origin, f"{implementation} {origin}"} & set(model.without)
]
FAST = {("bert", "eager", "torch"), ("llama", "sdpa", "torch")}


class First(nn.Module):
    """The first result of a model called with named inputs."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *x: torch.Tensor) -> Any:
        return self.model(**dict(zip(self.names, x, strict=True)), return_dict=True)[0]


def graph_for(name: str, implementation: str, origin: str) -> Graph:
    """After the exact passes."""
    model = MODELS[name]
    inputs, axes = model.sample()
    module = model.module(implementation)
    if origin == "torch":
        graph = graph_of(export(module, inputs, axes), name)
    elif origin == "dynamo":
        graph, _ = onnx_graph_of(export(module, inputs, axes), name, 20, verify=False)
    else:
        graph = by_script(First(module, list(inputs)), inputs, axes)
    infer(graph, SIZES)
    PassManager(exact_pipeline()).run(graph, Context(PLAIN_CPU))
    infer(graph, SIZES)
    return graph


def by_script(module: nn.Module, inputs: dict[str, torch.Tensor], axes: dict[str, dict[int, str]]) -> Graph:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), tuple(inputs.values()), file, input_names=list(inputs), dynamic_axes=axes, opset_version=17,
            dynamo=False,
        )  # fmt: skip
    return onnx_frontend.load(onnx.load_from_string(file.getvalue()))


@pytest.mark.parametrize(
    ("name", "implementation", "origin"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_model(name: str, implementation: str, origin: str) -> None:
    pytest.importorskip("transformers", reason="the architectures are those of transformers")
    model = MODELS[name]
    graph = graph_for(name, implementation, origin)
    inputs, _ = model.sample()
    sample = [inputs[spec.name] for spec in graph.inputs]
    expected = model.wanted(origin)
    views = list(attentions(graph))
    assert len(views) == len(expected)
    values: dict[fx.Node, Any] = {}
    graph.run(sample, observer=values.__setitem__)
    for view, each in zip(views, expected, strict=True):
        if isinstance(each, str):
            assert isinstance(view, NotAttention)
            assert str(view.reason).startswith(each)
            continue
        assert isinstance(view, Attention), view
        found, told = said(graph, view), wanted(each)
        del found["zero rows"], told["zero rows"]  # each exporter guards them in its own way
        if told["scale"] == 0.25 and view.kind != "spelled-out" and view.scale is None:
            found["scale"] = 0.25  # left to the operator
        assert found == told
        torch.testing.assert_close(computed(graph, view, values), values[view.node], atol=5e-6, rtol=1e-4)
    fused_alike(graph, sample, origin)


def fused_alike(graph: Graph, sample: list[torch.Tensor], origin: str) -> None:
    """Nothing that can be fused is left, and the results are as near to float64 as before."""
    if origin != "torch" and version() < (1, 32):
        return
    ctx = Context(TARGET, capabilities=None if origin == "torch" else OnnxRuntime())
    if FuseAttentionHeads().opset(graph, ctx):
        graph = convert_graph(graph, 23, Ledger())
        infer(graph, SIZES)
    before = graph.copy()
    infer(before, SIZES)
    spelled = to_fuse(graph, origin)
    changes = PassManager([FuseAttentionHeads()]).run(graph, ctx)
    assert changes >= len(spelled)
    assert not to_fuse(graph, origin)
    assert_no_worse(before, graph, [sample])
    if origin != "torch":
        results: Any = [OnnxRuntime().compile(each, TARGET, threads=1).run(sample) for each in (before, graph)]
        for was, now in zip(*results, strict=True):
            assert np.allclose(was.numpy(), now.numpy(), atol=2e-5, rtol=1e-4, equal_nan=True)


def to_fuse(graph: Graph, origin: str) -> list[Attention]:
    """What is spelled out; with a soft cap, ONNX Runtime is slower fused (benchmarks/attention_forms.py)."""
    found = [view for view in attentions(graph) if isinstance(view, Attention) and view.kind == "spelled-out"]
    return [view for view in found if origin == "torch" or not view.softcap]
