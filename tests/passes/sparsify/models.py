"""Models and runs that the tests of sparsify share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from fxopt.backends.onnxruntime import OnnxRuntime
from fxopt.frontends.onnx import load
from fxopt.ir.graph import Graph
from fxopt.ir.masks import verify_masks
from fxopt.ir.shapes import infer
from fxopt.passes.base import Candidate, Context, LossyPass
from fxopt.passes.sequential import SequentialRun
from fxopt.passes.sparsify import Sparsify
from fxopt.passes.stats import collect
from fxopt.testing import PLAIN_CPU

Samples = Sequence[list[torch.Tensor]]


def size_context(**options: Any) -> Context:
    """Bytes count."""
    return Context(PLAIN_CPU, **{"capabilities": OnnxRuntime(), "objective": "size", **options})


def model_of(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], x: Sequence[Any], dtype: Any = np.float32, opset: int = 20
) -> onnx.ModelProto:
    """x -> nodes -> y."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    body = helper.make_graph(
        nodes, "model", [helper.make_tensor_value_info("x", element, x)],
        [helper.make_tensor_value_info("y", element, [None] * len(x))],
        [numpy_helper.from_array(value.astype(dtype), name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def linears(features: int = 32, hidden: int = 48, dtype: Any = np.float32, **replaced: np.ndarray) -> onnx.ModelProto:
    """x [n, features] -> MatMul + Add fc1 -> Relu -> Gemm fc2 (stored as [out, in]) -> MatMul head -> y [n, 6]."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.normal(size=(features, hidden)) / features**0.5, "b1": random.normal(size=hidden) * 0.1,
        "w2": random.normal(size=(40, hidden)) / hidden**0.5, "b2": random.normal(size=40) * 0.1,
        "w3": random.normal(size=(40, 6)), **replaced,
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m"], "fc1"),
        helper.make_node("Add", ["m", "b1"], ["a"], "fc1_bias"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["g"], "fc2", transB=1),
        helper.make_node("MatMul", ["g", "w3"], ["y"], "head"),
    ]
    return model_of(nodes, weights, ["n", features], dtype)


def convolutions() -> onnx.ModelProto:
    """x [n, 8, 6, 5] -> 3x3 stem -> 1x1 with stride 2 and padding -> depthwise -> 1x1 head -> y."""
    random = np.random.default_rng(0)
    weights = {
        "w1": random.normal(size=(16, 8, 3, 3)) / 9, "w2": random.normal(size=(24, 16, 1, 1)) / 4,
        "b2": random.normal(size=24) * 0.1, "w3": random.normal(size=(24, 1, 3, 3)) / 3,
        "w4": random.normal(size=(8, 24, 1, 1)) / 5,
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], "stem", pads=[1] * 4),
        helper.make_node("Conv", ["c1", "w2", "b2"], ["c2"], "point", strides=[2, 1], pads=[0, 1, 1, 0]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu"),
        helper.make_node("Conv", ["r2", "w3"], ["c3"], "depth", pads=[1] * 4, group=24),
        helper.make_node("Conv", ["c3", "w4"], ["y"], "head"),
    ]
    return model_of(nodes, weights, ["n", 8, 6, 5])


def rows(count: int = 4, features: int = 32, dtype: torch.dtype = torch.float32, n: int = 24) -> list[list[torch.Tensor]]:
    """Rows of few directions: inputs are alike, and some are larger than others."""
    mix = torch.randn(8, features, generator=torch.Generator().manual_seed(99))
    scale = torch.linspace(0.2, 2, features)
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        plain = torch.randn(n, 8, generator=generator) @ mix + 0.3 * torch.randn(n, features, generator=generator)
        found.append([(plain * scale).to(dtype)])
    return found


def images(count: int = 3) -> list[list[torch.Tensor]]:
    """Smooth images of alike channels."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        plain = torch.randn(4, 2, 6, 5, generator=generator)
        mix = torch.randn(2, 8, generator=torch.Generator().manual_seed(98))
        noise = 0.1 * torch.randn(4, 8, 6, 5, generator=generator)
        found.append([torch.einsum("nkhw,kc->nchw", plain, mix) + noise])
    return found


def prepared(model: onnx.ModelProto | Graph, n: int = 24) -> Graph:
    """With types."""
    graph = model if isinstance(model, Graph) else load(model)
    infer(graph, {"n": n})
    return graph


def offered(step: LossyPass, graph: Graph, ctx: Context | None = None) -> list[Candidate]:
    """What is not refused."""
    return [item for item in step.candidates(graph, ctx or size_context()) if item.refusal is None]


def sparse(graph: Graph, step: Sparsify, samples: Samples, ctx: Context | None = None) -> tuple[Graph, list[Candidate]]:
    """A copy after the first candidate of each layer, as the engine applies them; and these candidates."""
    after = graph.copy()
    infer(after, graph.sizes)
    chosen = list({item.node: item for item in reversed(offered(step, after, ctx))}.values())[::-1]
    stats = collect(after, samples, [node for item in chosen for node in step.observed(after, item)])
    walk = SequentialRun(after, samples)
    for item in chosen:
        node = step.moments(after, item)
        if node is not None:
            stats.moments = {node.name: walk.moments(node, step.moment_rows(after, item))}
        step.apply(after, item, stats)
    after.prune()
    after.fx.lint()
    verify_masks(after)
    infer(after, graph.sizes)
    return after, chosen


def noise(graph: Graph, after: Graph, samples: Samples) -> float:
    """Noise to signal of the first output."""
    before, result = (torch.cat([run.run(sample)[0] for sample in samples]).double() for run in (graph, after))
    return float((result - before).square().sum() / (before - before.mean()).square().sum())
