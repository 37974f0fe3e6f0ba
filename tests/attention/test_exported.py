"""The spellings as both of torch's exporters write them to ONNX: recognised alike, and right in ONNX Runtime."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.backends.onnxruntime.backend import version
from fxopt.cost_model.targets import get_target
from fxopt.frontends import onnx as onnx_frontend
from fxopt.frontends.convert_graph import convert_graph
from fxopt.frontends.to_onnx import to_onnx
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Ledger
from fxopt.ir.shapes import infer
from fxopt.passes.base import Context
from fxopt.passes.fuse_attention_heads import FuseAttentionHeads
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import exact_pipeline
from fxopt.testing import assert_no_worse
from tests.attention.captured import ENTRIES
from tests.attention.entries import Entry, Expected
from tests.attention.test_spelled import check

TARGET = get_target("x86-avx2")
SIZES = {"batch": 2, "queries": 6, "keys": 6, "length": 6}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(version() < (1, 32), reason="Attention is fused for ONNX Runtime 1.32 and later"),
]


def exported(entry: Entry, exporter: str) -> Graph:
    """The entry as a graph of ONNX operators, after the exact passes."""
    names = [f"x_{index}" for index in range(len(entry.sample()))]
    if exporter == "dynamo":
        dynamic = {"x": tuple(entry.dynamic.get(index, {}) for index in range(len(names)))} if entry.dynamic else None
        graph, _ = to_onnx(entry.module(), entry.sample(), dynamic, 20, verify=False)
    else:
        axes = {names[index]: dims for index, dims in entry.dynamic.items()}
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                entry.module(), entry.sample(), file, input_names=names, dynamic_axes=axes, opset_version=17,
                dynamo=False,
            )  # fmt: skip
        graph = onnx_frontend.load(onnx.load_from_string(file.getvalue()))
    infer(graph, SIZES)
    PassManager(exact_pipeline()).run(graph, Context(TARGET))
    infer(graph, SIZES)
    return graph


def given(graph: Graph, entry: Entry) -> list[torch.Tensor]:
    """The inputs that the graph takes: what is not used is no input."""
    if graph.inputs[0].name == "x":
        return list(entry.sample())
    return [entry.sample()[int(spec.name.rpartition("_")[2])] for spec in graph.inputs]


CASES = [
    (name, exporter) for name, entry in ENTRIES.items() for exporter in ("dynamo", "script") if exporter in entry.only
]


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_exported(name: str, exporter: str) -> None:
    entry = ENTRIES[name]
    graph = exported(entry, exporter)
    inputs = given(graph, entry)
    check(graph, entry, inputs)
    if inputs[0].dtype == torch.float16:
        return  # ONNX Runtime's kernels for the CPU are slow in it
    ctx = Context(TARGET, capabilities=OnnxRuntime())
    if FuseAttentionHeads().opset(graph, ctx):
        graph = convert_graph(graph, 23, Ledger())
        infer(graph, SIZES)
    before = graph.copy()
    infer(before, SIZES)
    changes = PassManager([FuseAttentionHeads()]).run(graph, ctx)
    views = [expected for expected in entry.expected if isinstance(expected, Expected)]
    wanted = [expected for expected in views if expected.fused and not expected.sink and not expected.softcap]
    assert changes == len(wanted), [verdict.reason for verdict in ctx.ledger.verdicts]
    if changes:
        assert {node.target.op_type for node in graph.calls()}.isdisjoint(
            {"Softmax", "MatMul", "Einsum"} - kept(before)
        )
        assert_no_worse(before, graph, [inputs])
    same(before, graph, inputs)


def kept(graph: Graph) -> set[str]:
    """Products with constants are no part of attention."""
    with_constant = any(
        getattr(node.target, "op_type", "") == "MatMul" and any(graph.constant(x) is not None for x in node.args)
        for node in graph.calls()
    )
    return {"MatMul"} if with_constant else set()


def same(before: Graph, after: Graph, inputs: list[torch.Tensor]) -> None:
    """What ONNX Runtime computes, before and after."""
    results: list[Any] = [OnnxRuntime().compile(graph, TARGET, threads=1).run(inputs) for graph in (before, after)]
    for was, now in zip(*results, strict=True):
        assert np.allclose(was.numpy(), now.numpy(), atol=2e-6, rtol=1e-5, equal_nan=True)
