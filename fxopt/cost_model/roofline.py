"""The time of work on a target: a roofline with efficiency factors, and the sum over a graph.

    seconds = max(flops / (peak * efficiency), bytes in cache / cache bandwidth) + other bytes / bandwidth
              + launches * launch time

A GPU loads from main memory while it computes, so there the second term is inside the maximum.

For a CPU, `peak` and both bandwidths are what one core reaches. n cores do the work of 1 + (n - 1) * parallel cores,
where it pays: starting them costs one launch time. Main memory is saturated by four cores (an assumption).

`Target.efficiency` holds the reached share of the peak per kind of operator: "linear", "conv", ... Kinds are refined by
a dot: for depthwise 8-bit convolutions the factor "conv.narrow.int8" is looked up first, then "conv.narrow",
"conv.int8", "conv". Products run at the peak of their element type, all other kinds at that of float32. "memory" is the
reached share of the bandwidths (1 where they were measured), "parallel" that of an additional core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from fxopt.cost_model import attention_patterns
from fxopt.cost_model.work import node_cost
from fxopt.ir.graph import Graph, label
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.target import Cost, Prediction, Target

# What a backend predicts of an operator by itself; None: the roofline does.
Own = Callable[[Cost, Target], Prediction | None]
PRODUCTS = ("linear", "conv", "attention")  # multiply-adds, at the rate of their element type
_MEMORY_CORES = 4
_DEFAULT_EFFICIENCY = 0.5
_PARALLEL = 0.9
# The rate of an element type that a target does not list is that of the first listed one after it.
_INSTEAD = {
    "float64": (("float32", 0.5),),
    "float16": (("float32", 1.0),),
    "bfloat16": (("float16", 1.0), ("float32", 1.0)),
    "float8": (("float16", 1.0), ("float32", 1.0)),
    "int4": (("int8", 1.0), ("float32", 1.0)),
    "int8": (("float32", 1.0),),
    "uint8": (("int8", 1.0), ("float32", 1.0)),
    "s8s8": (("int8", 1.0), ("float32", 1.0)),
}


@dataclass(frozen=True)
class NodeWork:
    """A node with its cost and the bytes of the constants it reads."""

    node: fx.Node
    cost: Cost
    weight_bytes: int


@dataclass(frozen=True)
class NodePrediction:
    """One node of a graph: its name, operator, work, predicted time and share of the whole."""

    node: str
    op: str
    cost: Cost
    prediction: Prediction
    share: float


@dataclass(frozen=True)
class GraphPrediction:
    """A whole graph, run node by node; `rows` are in execution order."""

    total: Prediction
    rows: tuple[NodePrediction, ...]
    macs: float  # multiply-adds of matrix products, convolutions and attention
    weight_bytes: int


def predict(cost: Cost, target: Target, cold_bytes: float = 0.0) -> Prediction:
    """The time of one operator.

    Args:
        cold_bytes: how many of the bytes come from main memory whatever their number, e.g. weights of a model that is
            larger than the cache.
    """
    cost = attention_patterns.priced(without_zeros(cost, target), target)
    compute = cost.flops / rate(cost, target)
    warm, cold = _memory_seconds(cost.bytes, min(cold_bytes, cost.bytes), target)
    busy = _busy(compute, warm, cold, target)
    if target.kind != "cuda" and target.cores > 1:
        all_cores = _speedup(target, target.cores)
        spread = _busy(compute / all_cores, warm / all_cores, cold / _speedup(target, _MEMORY_CORES), target)
        busy = min(busy, spread + target.launch_seconds)
    launch = cost.launches * target.launch_seconds
    seconds = busy + launch
    bound: Literal["compute", "memory", "launch"] = "launch"
    if busy > launch:
        bound = "compute" if compute >= warm + cold else "memory"
    return Prediction(seconds, seconds * max(0.0, 1 - target.interval), seconds * (1 + target.interval), bound)


def without_zeros(cost: Cost, target: Target) -> Cost:
    """The work as the target's best kernel for these zeros does it: smaller by its speed-up; the same without one."""
    zeros = cost.zeros
    if zeros is None:
        return cost
    best = 1.0
    for pattern, share in zeros.shares:
        kernel = target.sparse_kernel(pattern, cost.dtype, zeros.rows, family(cost.kind))
        if kernel is not None and (zeros.custom_ops or not kernel.custom_ops):
            best = max(best, kernel.speedup(share))
    left = 1 - zeros.part + zeros.part / best
    return replace(cost, flops=cost.flops * left, bytes=cost.bytes * left, macs=cost.multiply_adds)


def _busy(compute: float, warm: float, cold: float, target: Target) -> float:
    """A GPU computes while it loads; a CPU does so only as long as the data come from its cache (as measured)."""
    return max(compute, warm + cold) if target.kind == "cuda" else max(compute, warm) + cold


def rate(cost: Cost, target: Target) -> float:
    """Operations per second that the target reaches in work of this kind and element type (a CPU: one core)."""
    if family(cost.kind) in PRODUCTS:
        return peak(target, cost.dtype) * efficiency(target, cost.kind, cost.dtype)
    return peak(target, "float32") * efficiency(target, cost.kind, cost.dtype)  # the rate of vector units


def efficiency(target: Target, kind: str, dtype: str = "") -> float:
    """The reached share of the peak: of the kind with the element type, of the kind, then the same of its family."""
    for key in (f"{kind}.{dtype}", kind):
        if key in target.efficiency:
            return target.efficiency[key]
    for key in (f"{family(kind)}.{dtype}", family(kind)):
        if key in target.efficiency:
            return target.efficiency[key]
    return _DEFAULT_EFFICIENCY


def family(kind: str) -> str:
    """The kind without its refinement: that of "norm.skip" is "norm"."""
    return kind.partition(".")[0]


def peak(target: Target, dtype: str) -> float:
    """Operations per second in this element type, or in the one that takes its place."""
    known = "float8" if dtype.startswith("float8") else dtype
    if known in target.peak:
        return target.peak[known]
    for name, factor in _INSTEAD.get(known, (("float32", 1.0),)):
        if name in target.peak:
            return target.peak[name] * factor
    return max(target.peak.values())


def _speedup(target: Target, cores: int) -> float:
    return 1 + (min(cores, target.cores) - 1) * target.efficiency.get("parallel", _PARALLEL)


def _memory_seconds(moved: float, cold: float, target: Target) -> tuple[float, float]:
    """Seconds for what comes from the cache, and for the rest."""
    share = target.efficiency.get("memory", 1.0)
    warm = min(moved - cold, target.cache_bytes) if target.cache_bandwidth else 0.0
    return warm / (target.cache_bandwidth or 1.0) / share, (moved - warm) / target.bandwidth / share


def predict_graph(graph: Graph, target: Target, own: Own | None = None) -> GraphPrediction:
    """The time of every node and of the whole."""
    nodes = work(graph)
    predictions = predict_work(nodes, target)
    if own is not None:
        pairs = zip(nodes, predictions, strict=True)
        predictions = [own(found.cost, target) or prediction for found, prediction in pairs]
    seconds = dict.fromkeys(("compute", "memory", "launch"), 0.0)
    for prediction in predictions:
        seconds[prediction.bound] += prediction.seconds
    bound: Any = max(seconds, key=lambda name: seconds[name])
    total = Prediction(
        sum(prediction.seconds for prediction in predictions),
        sum(prediction.low for prediction in predictions),
        sum(prediction.high for prediction in predictions),
        bound,
    )
    rows = tuple(
        NodePrediction(label(found.node), op_text(found.node), found.cost, prediction, _share(prediction, total))
        for found, prediction in zip(nodes, predictions, strict=True)
    )
    macs = sum(found.cost.multiply_adds for found in nodes if family(found.cost.kind) in PRODUCTS)
    return GraphPrediction(total, rows, macs, graph.size_bytes())


def work(graph: Graph) -> list[NodeWork]:
    """The cost of every node in execution order, with the bytes of the constants it reads."""
    found = []
    for node in graph.calls():
        constants = [graph.constant(used) for used in node.all_input_nodes]
        weights = sum(constant.nbytes for constant in constants if constant is not None)
        found.append(NodeWork(node, node_cost(graph, node), weights))
    return found


def predict_work(nodes: Sequence[NodeWork], target: Target) -> list[Prediction]:
    """The times of nodes that run after each other; of weights that exceed the cache, only that share stays in it."""
    weights = sum(found.weight_bytes for found in nodes)
    cold = 1 - target.cache_bytes / weights if weights > target.cache_bytes else 0.0
    return [predict(found.cost, target, cold * found.weight_bytes) for found in nodes]


def _share(part: Prediction, total: Prediction) -> float:
    return part.seconds / total.seconds if total.seconds else 0.0


def op_text(node: fx.Node) -> str:
    """The operator as a user knows it: `Conv`, `com.microsoft.Gelu`, `aten.linear`, `fxopt.linear_w8a8`."""
    target = node.target
    if isinstance(target, OnnxOp):
        return f"{target.domain}.{target.op_type}" if target.domain else target.op_type
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return getattr(target, "__name__", str(target))
