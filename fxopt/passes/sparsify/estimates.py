"""What zeros cost and give, from calibration rows and sizes alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fxopt.ir.error import noise_to_signal
from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Refusal
from fxopt.ir.ops.linear_sparse import stored_bytes
from fxopt.ir.ops.linear_w8a8 import eight_bit_cost
from fxopt.ir.sparsity import Pattern
from fxopt.ir.target import Cost, Zeros
from fxopt.passes.base import Setting
from fxopt.passes.quantize_linear.common import JUDGED, float_cost, value_of
from fxopt.passes.sparsify import beside
from fxopt.passes.sparsify.layer import Layer
from fxopt.passes.sparsify.methods import magnitude, wanda
from fxopt.passes.sparsify.refusals import has_already
from fxopt.passes.stats import Stats


def error_of(graph: Graph, layer: Layer, setting: Setting, stats: Stats) -> float | Refusal:
    """Noise to signal of the layer's outputs when weights are removed without changing the others."""
    pattern = Pattern.parse(setting["pattern"])
    if has_already(layer.weight(graph), pattern, setting["sparsity"]):
        return 0.0
    kept = stats[layer.x].sample
    assert kept is not None
    x = layer.rows(kept).float()
    if not bool(torch.isfinite(x).all()):
        return Refusal("its calibration data hold infinite or NaN values")
    norms = x.square().sum(0)
    if setting["method"] != "magnitude" and not bool(norms.any()):
        return Refusal("its input is 0 in every calibration sample: nothing tells which weights matter")
    weight = layer.weight(graph).float()
    if setting["method"] != "magnitude":
        weight = _some_outputs(weight, pattern)
        pruned = wanda(weight, norms, pattern, setting["sparsity"]).weight
    else:
        pruned = _some_outputs(magnitude(weight, pattern, setting["sparsity"]).weight, pattern)
        weight = _some_outputs(weight, pattern)
    return noise_to_signal(x @ weight.t(), x @ pruned.t())


def _some_outputs(weight: Tensor, pattern: Pattern) -> Tensor:
    """As many groups of outputs as an error is judged by."""
    groups = weight.reshape(-1, pattern.outputs, weight.shape[1])
    every = max(1, len(weight) // JUDGED)
    return groups[::every].reshape(-1, weight.shape[1])


def work_of(graph: Graph, layer: Layer, setting: Setting) -> tuple[Cost, Cost]:
    """The work of the dense form in the type in which it will run, and of the same with zeros."""
    weight = layer.weight(graph)
    kernel = setting.get("kernel", "")
    if kernel == "int8":  # what quantising gains is not a gain of zeros
        before = eight_bit_cost(value_of(layer.x), torch.empty_like(weight, dtype=torch.int8, device="meta"), "static")
    else:
        before = replace(float_cost(layer.view, layer.view.weight(graph)), zeros=None)
    zeros = Zeros(((setting["pattern"], setting["sparsity"]),), layer.positions(), custom_ops=True)
    after = replace(before, zeros=zeros)
    more = _beside(setting)
    if more:
        size = value_of(layer.x).dtype.itemsize
        after += beside.cost(layer, weight.shape[0], weight.shape[1], size, before.dtype, **more)
    return before, after


def _beside(setting: Setting) -> dict[str, int]:
    return {name: setting[name] for name in ("rank", "block") if setting.get(name)}


def saved_bytes(graph: Graph, layer: Layer, setting: Setting) -> int:
    """Bytes of the dense weight less those of what is stored instead."""
    weight, pattern = layer.weight(graph), Pattern.parse(setting["pattern"])
    out, columns = weight.shape
    more = beside.parameters(out, columns, **_beside(setting)) * weight.itemsize
    return weight.nbytes - stored_bytes(pattern, out, columns, setting["sparsity"], weight.itemsize) - more
