"""Linears and convolutions in 8-bit integers.

Weights are symmetric per output channel, activations asymmetric per tensor: with the range found at run time
(`dynamic`) or on calibration samples (`static`). Source: Krishnamoorthi (2018).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.error import noise_to_signal
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.op import Op
from fxopt.ir.ops.conv_w8a8 import conv_w8a8
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.views.common import aten, is_aten, is_onnx, only_user
from fxopt.ir.views.conv import Conv, conv, convs
from fxopt.ir.views.linear import Linear, linear, linears
from fxopt.passes.base import Candidate, Context, Estimate, Setting
from fxopt.passes.quantize_linear.common import FLOATS, float_cost, replaced, value_of
from fxopt.passes.quantize_linear.grids import quantize_weight, static_range
from fxopt.passes.stats import Stats, ValueStats


@dataclass(frozen=True)
class EightBit:
    """The 8-bit part of quantize-linear."""

    name: str
    activations: str  # "dynamic", "static", or "auto": both are offered where both exist

    # ---- candidates

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        """One candidate per linear or convolution and kind of activation range."""
        for view in linears(graph):
            yield from self._offer(graph, ctx, view, ("dynamic", "static"), "linear_w8a8")
        for found in convs(graph):
            yield from self._offer(graph, ctx, found, ("static",), "conv_w8a8")

    def _offer(
        self, graph: Graph, ctx: Context, view: Any, kinds: tuple[str, ...], op_name: str
    ) -> Iterator[Candidate]:
        if isinstance(view, tuple):
            node, refusal = view
            yield self._candidate(ctx, node, "", "auto", refusal)
            return
        weight = view.weight(graph)
        group = f"{op_name} {'x'.join(map(str, weight.shape))}"
        wanted = [kind for kind in kinds if self.activations in ("auto", kind)]
        if not wanted:
            refusal = Refusal("a convolution has no {} form that pays; use activations=static", self.activations)
            yield self._candidate(ctx, view.node, group, self.activations, refusal)
        for kind in wanted:
            name = f"{op_name}_dynamic" if kind == "dynamic" else op_name
            yield self._candidate(ctx, view.node, group, kind, self._refusal(graph, ctx, view, name))

    def _candidate(self, ctx: Context, node: fx.Node, group: str, kind: str, refusal: Refusal | None) -> Candidate:
        limit = 63 if _saturates(ctx) else 127
        setting = Setting.of(self.name, activations=kind, limit=limit)
        return Candidate(self.name, node.name, label(node), setting, refusal, group)

    def _refusal(self, graph: Graph, ctx: Context, view: Linear | Conv, op_name: str) -> Refusal | None:
        excluded = ctx.excluded(label(view.node))
        if excluded is not None:
            return excluded
        weight = view.weight(graph)
        if weight.dtype not in FLOATS:
            return Refusal("the weight has type {}; expected a floating-point type", weight.dtype)
        if weight.numel() == 0:
            return Refusal("the weight is empty")
        if not bool(torch.isfinite(weight).all()):
            return Refusal("the weight holds infinite or NaN values")
        if graph.model is not None and graph.model.opsets.get("", 0) < 13:
            return Refusal("the model has opset {}; per-channel quantisation needs 13", graph.model.opsets.get("", 0))
        if graph.origin == "onnx" and weight.dtype != torch.float32:
            return Refusal("ONNX integer operators give float32; the weight has type {}", weight.dtype)
        unsupported = ctx.supports(op_name, "int8")
        return Refusal(unsupported) if unsupported else None

    # ---- estimate

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The input; for a convolution also the output, whose range is quantised too."""
        view = _view(graph, candidate)
        return (view.x,) if isinstance(view, Linear) else (view.x, _result(view))

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """The error on the calibration rows, and the work of both forms."""
        view = _view(graph, candidate)
        seen = stats[view.x]
        assert seen.sample is not None
        x = seen.sample.float()
        operator, operands = self._operands(graph, view, candidate.setting, stats)
        if ("reference", candidate.node) not in stats.cache:
            stats.cache["reference", candidate.node] = _float_result(graph, view, x)
        reference = stats.cache["reference", candidate.node]
        result = _linear_on_sample(x, operands, seen) if isinstance(view, Linear) else operator.function(x, *operands)
        weight = view.weight(graph)
        before = float_cost(view, weight)
        after = operator.cost_of(value_of(view.x), *operands)
        return Estimate(noise_to_signal(reference, result), before, after, 3 * weight.numel())

    # ---- apply

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Replace the linear or convolution (with the ReLU behind it) by the integer operator."""
        view = _view(graph, candidate)
        operator, operands = self._operands(graph, view, candidate.setting, stats)
        codes, scales, _, *rest = operands
        stem, source = label(view.weight_node), (label(view.node), self.name)
        arguments = (
            view.x,
            graph.add_constant(codes, f"{stem}_codes", source),
            graph.add_constant(scales, f"{stem}_scales", source),
            view.bias_node,
            *rest,
        )
        replaced(graph, view, _result(view), operator.target, arguments, self.name)

    def _operands(
        self, graph: Graph, view: Linear | Conv, setting: Setting, stats: Stats
    ) -> tuple[Op[..., Any], tuple[Any, ...]]:
        """The operator, and its arguments after x."""
        key = ("codes", view.weight_node.name, setting["limit"])
        if key not in stats.cache:
            stats.cache[key] = quantize_weight(view.weight(graph), setting["limit"])
        codes, scales = stats.cache[key]
        bias = view.bias(graph)
        if setting["activations"] == "dynamic":
            return linear_w8a8_dynamic, (codes, scales, bias)
        x_scale, x_zero = static_range(stats[view.x])
        if isinstance(view, Linear):
            return linear_w8a8, (codes, scales, bias, x_scale, x_zero)
        y_scale, y_zero = static_range(stats[_result(view)])
        pads = [*view.padding[0], *view.padding[1]]
        shape = (list(view.stride), pads, list(view.dilation), view.groups)
        return conv_w8a8, (codes, scales, bias, x_scale, x_zero, y_scale, y_zero, *shape)


def _saturates(ctx: Context) -> bool:
    """x86 without VNNI multiplies u8 by s8 into saturating 16-bit sums of two."""
    if ctx.target.kind != "cpu" or not ctx.target.arch.startswith("x86"):
        return False
    return not ({"avx512_vnni", "avx_vnni", "amx_int8"} & ctx.target.features)


def _view(graph: Graph, candidate: Candidate) -> Linear | Conv:
    node = graph.find(candidate.node)
    assert node is not None, f"{candidate.node} is not in the graph"
    view = linear(graph, node) or conv(graph, node)
    assert isinstance(view, (Linear, Conv)), f"{candidate.node} is neither a linear nor a convolution"
    return view


def _result(view: Linear | Conv) -> fx.Node:
    """The node whose value the integer operator replaces: the ReLU behind a convolution, if nothing else uses it."""
    user = only_user(view.node) if isinstance(view, Conv) else None
    if user is not None and (is_onnx(user, "Relu") or is_aten(user, aten.relu.default)):
        return user
    return view.node


def _linear_on_sample(x: torch.Tensor, operands: tuple[Any, ...], seen: ValueStats) -> torch.Tensor:
    """The integer linear on sampled rows, with the range that whole activations have.

    In float32: the rounding of the sum is far below the quantisation error that is estimated here.
    """
    codes, scales, bias, *fixed = operands
    x_scale, x_zero = fixed or static_range(ValueStats(minimum=seen.mean_minimum, maximum=seen.mean_maximum))
    levels = (torch.round(x / x_scale) + x_zero).clamp(0, 255) - x_zero
    return torch.nn.functional.linear(
        levels, codes.float() * scales[:, None] * x_scale, None if bias is None else bias.float()
    )


def _float_result(graph: Graph, view: Linear | Conv, x: torch.Tensor) -> torch.Tensor:
    """What the view computes from x."""
    weight, bias = view.weight(graph).float(), view.bias(graph)
    if isinstance(view, Linear):
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.float())
    result = _float_conv(x, view, weight, bias)
    return result if _result(view) is view.node else result.relu()


def _float_conv(x: torch.Tensor, view: Conv, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rank = weight.dim() - 2
    pads = [pad for axis in reversed(range(rank)) for pad in (view.padding[0][axis], view.padding[1][axis])]
    padded = torch.nn.functional.pad(x, pads)
    convolve = getattr(torch.nn.functional, f"conv{rank}d")
    result: torch.Tensor = convolve(
        padded, weight, None if bias is None else bias.float(), view.stride, 0, view.dilation, view.groups
    )
    return result
