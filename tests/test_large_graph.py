"""Graph operations cost linear time: 20,000 nodes are imported, typed, verified, rewritten and exported in a minute."""

from __future__ import annotations

import cProfile
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import fxopt
from fxopt.cost_model.targets import get_target
from fxopt.frontends.onnx import load
from fxopt.ir.onnx.export import to_model
from fxopt.ir.shapes import infer
from fxopt.ir.verify import NumericCheck, synthetic_sample
from fxopt.passes.base import Context
from fxopt.passes.manager import PassManager
from fxopt.passes.pipelines import exact_pipeline


def network(nodes: int) -> onnx.ModelProto:
    """Blocks of ten operators: a linear with bias, things to fold, to merge, to remove, and a residual."""
    generator = np.random.default_rng(0)
    made: list[Any] = []
    weights: list[Any] = []
    x = "x"
    for index in range(nodes // 10):
        names = [f"v{index}_{step}" for step in range(10)]
        weights.append(numpy_helper.from_array(generator.normal(0, 0.2, (16, 16)).astype(np.float32), f"w{index}"))
        weights.append(numpy_helper.from_array(generator.normal(size=16).astype(np.float32), f"b{index}"))
        steps = [
            ("MatMul", [x, f"w{index}"]),
            ("Add", [names[0], f"b{index}"]),
            ("Relu", [names[1]]),
            ("Identity", [names[2]]),
            ("Neg", [f"b{index}"]),  # a constant
            ("Mul", [names[3], names[4]]),
            ("Tanh", [names[5]]),
            ("Tanh", [names[5]]),  # the same again
            ("Add", [names[6], names[7]]),
            ("Add", [names[8], x]),
        ]
        made += [
            helper.make_node(op_type, inputs, [name], name=f"{op_type}_{name}")
            for (op_type, inputs), name in zip(steps, names, strict=True)
        ]
        x = names[-1]
    made[-1].output[0] = "y"
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 16]) for name in "xy"]
    body = helper.make_graph(made, "large", values[:1], values[1:], weights)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def assert_linear(run: Callable[[onnx.ModelProto], None], small: int, large: int) -> float:
    """Check that `run` costs as much per node at `large` as at `small` nodes; its CPU seconds at `large`.

    A busy machine can double the CPU time of the same work (shared caches and cores), so time is compared
    over a wide range, where a quadratic step shows as a multiple, by the shortest of three runs and of this thread
    alone. Calls of functions do not depend on the machine, and are compared closely. The objects that other tests have
    left are hidden from the garbage collector, which would go through all of them for the large graph only.
    """
    graphs = {nodes: network(nodes) for nodes in (small, large)}
    run(network(small // 10))  # what is imported and cached once
    gc.collect()
    gc.freeze()
    try:
        pairs = [[thread_seconds(run, graph) for graph in graphs.values()] for _ in range(3)]
        calls = [count_calls(run, graph) for graph in graphs.values()]
    finally:
        gc.unfreeze()
    part, whole = map(min, zip(*pairs, strict=True))
    ratio = large / small
    assert calls[1] <= 1.05 * ratio * calls[0], f"{calls[0]:,} calls for {small:,} nodes, {calls[1]:,} for {large:,}"
    assert whole <= 2.5 * ratio * part, f"{part:.2f} s for {small:,} nodes, {whole:.2f} s for {large:,}"
    return whole


def thread_seconds(run: Callable[[onnx.ModelProto], None], graph: onnx.ModelProto) -> float:
    begin = time.thread_time()
    run(graph)
    return time.thread_time() - begin


def count_calls(run: Callable[[onnx.ModelProto], None], graph: onnx.ModelProto) -> int:
    """Calls of Python and of built-in functions in one run."""
    profile = cProfile.Profile()
    profile.runcall(run, graph)
    return sum(entry.callcount for entry in profile.getstats())


def exact(proto: onnx.ModelProto) -> None:
    """Import, types, exact passes with verification, and export."""
    graph = load(proto)
    infer(graph, {"n": 2})
    sample = synthetic_sample(graph.inputs, {"n": 2})
    assert sample is not None
    manager = PassManager(exact_pipeline())
    manager.run(graph, Context(get_target("x86-avx2")), NumericCheck.of(graph, sample))
    result = to_model(graph)
    assert len(result.graph.node) == 0.7 * len(proto.graph.node)


@pytest.mark.slow
def test_time_is_linear_and_below_a_minute() -> None:
    spent = assert_linear(exact, 2_500, 20_000)
    assert spent < 60, f"{spent:.1f} s"


@pytest.mark.slow
def test_a_whole_optimisation_is_linear() -> None:
    """Candidates, statistics, prices, rewriting and the file: every tenth operator is a linear, and all are changed."""
    target = replace(get_target("x86-avx2"), is_host=True, peak={"float32": 1e9, "int8": 1e12})
    samples = [torch.randn(2, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    def whole(proto: onnx.ModelProto) -> None:
        result = fxopt.optimize(proto, target, calibration=samples, force=True, budget=None, threads=1)
        applied = result.ledger.counts()["quantize-linear"]["applied"]
        assert applied == len(proto.graph.node) // 10

    assert_linear(whole, 1_000, 8_000)
