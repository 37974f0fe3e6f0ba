"""Linears and convolutions in 8-bit integers.

Weights are symmetric per output channel, activations asymmetric per tensor: with the range found at run time
(`dynamic`) or on calibration samples (`static`). Outliers of a linear's activations may be moved into its weights
(`smooth`). Source: Krishnamoorthi (2018).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.ir.error import noise_to_signal
from fxopt.ir.graph import Graph, hint, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.op import Op
from fxopt.ir.ops.conv_w8a8 import conv_w8a8
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.target import Cost
from fxopt.ir.views.conv import Conv, conv, convs
from fxopt.ir.views.eight_bit import source
from fxopt.ir.views.linear import Linear, linear, linears
from fxopt.passes import fold_linear_scale, fold_norm_scale
from fxopt.passes.base import Candidate, Context, Estimate, Setting
from fxopt.passes.quantize_between import behind
from fxopt.passes.quantize_linear.common import (
    JUDGED,
    float_cost,
    replaced,
    result_of,
    sums_of,
    unfit,
    value_of,
    with_conversions,
)
from fxopt.passes.quantize_linear.grids import affine, quantize_weight, static_range
from fxopt.passes.quantize_linear.on_sample import (
    channel_range,
    conv_on_kept,
    float_result,
    linear_on_kept,
    lost_mean,
    scaled,
)
from fxopt.passes.quantize_linear.patches import patch_rows
from fxopt.passes.quantize_linear.rounding import eight_bit_codes
from fxopt.passes.quantize_linear.smoothing import Smoothing, chosen, siblings, smoothed
from fxopt.passes.stats import Stats

_OUTPUTS = 64  # on which strengths of smoothing are compared


@dataclass(frozen=True)
class EightBit:
    """The 8-bit part of quantize-linear."""

    name: str
    activations: str  # "dynamic", "static", or "auto": both are offered where both exist
    smooth: str  # "on", "off", or "auto": both are offered for linears
    ranges: str  # of static activations: one of `grids.RANGES`
    correct_bias: str  # "on", "off", or "auto": of convolutions
    rounding: str  # of the weights: "nearest" or "gptq"

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
        sums = sums_of(ctx, view, weight)
        wanted = [kind for kind in kinds if self.activations in ("auto", kind)]
        if not wanted:
            refusal = Refusal("a convolution has no {} form that pays; use activations=static", self.activations)
            yield self._candidate(ctx, view.node, group, self.activations, refusal)
        for kind in wanted:
            name = f"{op_name}_dynamic" if kind == "dynamic" else op_name
            refused = self._refusal(graph, ctx, view, name)
            for smooth in self._smoothings(view) if refused is None else (False,):
                values = self._settings(view, kind, smooth, sums)
                yield self._candidate(ctx, view.node, group, kind, refused, {"sums": sums, **values})

    def _smoothings(self, view: Linear | Conv) -> tuple[bool, ...]:
        if isinstance(view, Conv) or self.smooth == "off":
            return (False,)
        return (True,) if self.smooth == "on" else (False, True)

    def _settings(self, view: Linear | Conv, kind: str, smooth: bool, sums: int) -> dict[str, Any]:
        """The parts of a setting that differ from the plainest form."""
        is_conv = isinstance(view, Conv)
        ranges = self.ranges if self.ranges != "auto" else "mse" if is_conv else "minmax"
        values: dict[str, Any] = {"smooth": True} if smooth else {}
        if ranges != "minmax" and kind == "static":
            values["ranges"] = ranges
        if self.correct_bias == "on" or (self.correct_bias == "auto" and is_conv):
            values["correct_bias"] = True
        if self.rounding == "gptq" and sums == 32:
            values["rounding"] = "gptq"
        return values

    def _candidate(
        self,
        ctx: Context,
        node: fx.Node,
        group: str,
        kind: str,
        refusal: Refusal | None,
        values: dict[str, Any] | None = None,
    ) -> Candidate:
        setting = Setting.of(self.name, activations=kind, **(values or {"sums": 32}))
        return Candidate(self.name, node.name, label(node), setting, refusal, group)

    def _refusal(self, graph: Graph, ctx: Context, view: Linear | Conv, op_name: str) -> Refusal | None:
        refusal = unfit(graph, ctx, view)
        if refusal is not None:
            return refusal
        weight = view.weight(graph)
        if isinstance(view, Conv) and weight.dim() < 4:
            return Refusal("it moves along one axis; convolutions are computed in 8 bits where they have two or three")
        if graph.model is not None and graph.model.opsets.get("", 0) < 13:
            return Refusal("the model has opset {}; per-channel quantisation needs 13", graph.model.opsets.get("", 0))
        if graph.origin == "onnx" and weight.dtype != torch.float32:
            return Refusal("ONNX integer operators give float32; the weight has type {}", weight.dtype)
        if ctx.target.kind == "cuda" and "int8" not in ctx.target.peak:
            return Refusal("{} lists no rate of int8", ctx.target.name)
        unsupported = ctx.supports(op_name, "int8")
        return Refusal(unsupported) if unsupported else None

    # ---- estimate

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The input; for a convolution also the output and what may be quantised between it and the next ones."""
        view = _view(graph, candidate)
        if isinstance(view, Linear):
            return (view.x,)
        result = result_of(graph, view)
        return (view.x, source(view.x), result, *behind(graph, result))

    def clipped(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """What is observed, unless ranges are the extremes."""
        plain = candidate.setting.get("ranges", "minmax") == "minmax"
        return () if plain else self.observed(graph, candidate)

    def fixed_levels(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, fx.Node | None] | None:
        """The input and, of a convolution, the output, where ranges are calibrated."""
        if candidate.setting["activations"] != "static":
            return None
        view = _view(graph, candidate)
        return view.x, result_of(graph, view) if isinstance(view, Conv) else None

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """The error on the calibration rows, and the work of both forms."""
        view = _view(graph, candidate)
        weight = view.weight(graph)
        x = self._sample(view, stats)
        operator, operands = self._operands(graph, view, candidate.setting, stats)
        if ("reference", candidate.node) not in stats.cache:
            stats.cache["reference", candidate.node] = float_result(graph, view, x)
        reference = stats.cache["reference", candidate.node]
        after = operator.cost_of(value_of(view.x), *operands)
        before = float_cost(view, weight)
        after = replace(after, zeros=before.zeros)  # codes have them, too
        if isinstance(view, Conv):
            before = with_conversions(graph, view, result_of(graph, view), before)
            result = conv_on_kept(graph, view, x, operands)
        else:
            smoothing = self._smoothing(graph, view, candidate.setting, stats)
            after = after if smoothing is None else after + _smoothing_cost(graph, view)
            every = max(1, len(weight) // JUDGED)
            codes, scales, bias, *fixed = operands
            some = (codes[::every], scales[::every], None if bias is None else bias[::every], *fixed)
            sums = candidate.setting["sums"]
            result = linear_on_kept(x, some, weight[::every], stats[view.x], smoothing, sums)
            reference = reference[:, ::every]
        refusal = self._constant(view, candidate.setting, stats)
        return Estimate(noise_to_signal(reference, result), before, after, 3 * weight.numel(), refusal=refusal)

    def _constant(self, view: Linear | Conv, setting: Setting, stats: Stats) -> Refusal | None:
        """Why there is no range to calibrate."""
        found = stats[_ranged(view)]
        if setting["activations"] != "static" or found.minimum < found.maximum:
            return None
        return Refusal("its input is {:.3g} everywhere in every calibration sample: that is no range", found.minimum)

    def _sample(self, view: Linear | Conv, stats: Stats) -> Tensor:
        sample = stats[view.x].sample
        assert sample is not None
        return sample.float()

    # ---- apply

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Replace the linear or convolution (with the ReLU or clip behind it) by the integer operator."""
        view = _view(graph, candidate)
        operator, operands = self._operands(graph, view, candidate.setting, stats)
        codes, scales, bias, *rest = operands
        stem, source = label(view.weight_node), (label(view.node), self.name)
        s = self._factors(graph, view, candidate.setting, stats)
        if self._compensates(candidate):
            codes = self._gptq(graph, view, scales, s, stats)
            bias = self._bias(graph, view, candidate.setting, stats, s, (codes, scales, *rest[:2]))
        bias_node = view.bias_node
        if bias is not None and candidate.setting.get("correct_bias", False):
            bias_node = graph.add_constant(bias, f"{stem}_bias", source)
        arguments = (
            view.x if s is None else smoothed(graph, view.x, s, self.name),
            graph.add_constant(codes, f"{stem}_codes", source),
            graph.add_constant(scales, f"{stem}_scales", source),
            bias_node,
            *rest,
        )
        result = result_of(graph, view)
        node = replaced(graph, view, result, operator.target, arguments, self.name)
        if isinstance(view, Conv):
            for value in behind(graph, node):
                if value in stats:
                    value.meta["levels"] = self._levels(value, candidate.setting, stats)

    def moments(self, graph: Graph, candidate: Candidate) -> fx.Node | None:
        """GPTQ wants the second moments of the input, on the compressed graph."""
        return _view(graph, candidate).x if self._compensates(candidate) else None

    def moment_rows(self, graph: Graph, candidate: Candidate) -> Callable[[Tensor], Tensor] | None:
        """Of a convolution: the patches that its kernel sees."""
        view = _view(graph, candidate)
        return patch_rows(graph, view) if isinstance(view, Conv) else None

    def _compensates(self, candidate: Candidate) -> bool:
        """Codes whose neighbours share the room of a 16-bit sum are rounded to nearest: GPTQ would use it up."""
        return bool(candidate.setting.get("rounding") == "gptq")

    def _gptq(self, graph: Graph, view: Linear | Conv, scales: Tensor, s: Tensor | None, stats: Stats) -> Tensor:
        """Codes whose rounding errors make up for each other, in the shape of the weight."""
        weight, moments = scaled(view.weight(graph), s).float(), stats.moments[view.x.name]
        if s is not None:
            moments = moments / torch.outer(s, s).to(moments.dtype)
        grouped = moments if isinstance(view, Conv) else moments[None]
        codes = eight_bit_codes(weight.flatten(1), scales, grouped, view.node, stats)
        return codes.reshape(weight.shape)

    def _operands(
        self, graph: Graph, view: Linear | Conv, setting: Setting, stats: Stats
    ) -> tuple[Op[..., Any], tuple[Any, ...]]:
        """The operator, and its arguments after x."""
        s = self._factors(graph, view, setting, stats)
        key = ("codes", view.weight_node.name, setting["sums"], "" if s is None else stats.key(view.x))
        if key not in stats.cache:
            stats.cache[key] = quantize_weight(scaled(view.weight(graph), s), setting["sums"])
        codes, scales = stats.cache[key]
        if setting["activations"] == "dynamic":
            return linear_w8a8_dynamic, (codes, scales, self._bias(graph, view, setting, stats, s, (codes, scales)))
        if s is not None:
            levels = affine(*channel_range(stats[view.x], s))
        else:
            levels = self._levels(_ranged(view), setting, stats)
        bias = self._bias(graph, view, setting, stats, s, (codes, scales, *levels))
        if isinstance(view, Linear):
            return linear_w8a8, (codes, scales, bias, *levels)
        given = self._levels(result_of(graph, view), setting, stats)
        pads = [*view.padding[0], *view.padding[1]]
        shape = (list(view.stride), pads, list(view.dilation), view.groups)
        return conv_w8a8, (codes, scales, bias, *levels, *given, *shape)

    def _levels(self, node: fx.Node, setting: Setting, stats: Stats) -> tuple[float, int]:
        """Scale and zero point of a value: one pair per value and method, for neighbours share them."""
        method = setting.get("ranges", "minmax")
        key = ("levels", stats.key(node), method)
        if key not in stats.cache:
            stats.cache[key] = static_range(stats[node], method)
        found: tuple[float, int] = stats.cache[key]
        return found

    def _bias(
        self, graph: Graph, view: Linear | Conv, setting: Setting, stats: Stats, s: Tensor | None, rounded: Any
    ) -> Tensor | None:
        """The bias; where it is corrected, plus what rounding takes from the mean output."""
        bias, weight = view.bias(graph), view.weight(graph)
        if not setting.get("correct_bias", False):
            return bias
        if isinstance(view, Conv):
            lost = lost_mean(view, weight, self._sample(view, stats), rounded)
            return lost.to(weight.dtype) if bias is None else (bias.double() + lost.double()).to(bias.dtype)
        mean = stats[view.x].channel_mean
        if bias is None or mean is None:
            return bias
        mean = mean if s is None else mean / s
        codes, scales, *_ = rounded
        taken: Tensor = scaled(weight, s).float() - codes.float() * scales[:, None]
        return (bias.double() + taken.double() @ mean.double()).to(bias.dtype)

    def _factors(self, graph: Graph, view: Linear | Conv, setting: Setting, stats: Stats) -> Tensor | None:
        """s of the value that the linear takes; None when it is not smoothed."""
        found = self._smoothing(graph, view, setting, stats) if isinstance(view, Linear) else None
        return None if found is None else found.s

    def _smoothing(self, graph: Graph, view: Linear, setting: Setting, stats: Stats) -> Smoothing | None:
        if not setting.get("smooth", False):
            return None
        sums = setting["sums"]

        def error(found: Linear, smoothing: Smoothing) -> float:
            x, weight = self._sample(found, stats), found.weight(graph)
            weight = weight[:: max(1, len(weight) // _OUTPUTS)]
            operands = (*quantize_weight(scaled(weight, smoothing.s), sums), None)
            result = linear_on_kept(x, operands, weight, stats[found.x], smoothing, sums)
            return noise_to_signal(x @ weight.float().t(), result)

        return chosen(graph, view, stats, error)


def _smoothing_cost(graph: Graph, view: Linear) -> Cost:
    """Of the product x / s, shared by all linears that take x; nothing where it can be folded into a norm."""
    shared = siblings(graph, view.x)
    takers = [found.node for found in shared]
    if fold_norm_scale.can_absorb(graph, view.x, takers) or fold_linear_scale.can_absorb(graph, view.x):
        return Cost(0.0, 0.0, kind="elementwise", launches=0)
    x = value_of(view.x)
    count = 1
    for dim in x.shape:
        count *= hint(dim)
    share = max(1, len(shared))
    return Cost(count / share, 2 * count * x.itemsize / share, kind="elementwise", launches=1 if share == 1 else 0)


def _view(graph: Graph, candidate: Candidate) -> Linear | Conv:
    node = graph.find(candidate.node)
    assert node is not None, f"{candidate.node} is not in the graph"
    view = linear(graph, node) or conv(graph, node)
    assert isinstance(view, (Linear, Conv)), f"{candidate.node} is neither a linear nor a convolution"
    return view


def _ranged(view: Linear | Conv) -> fx.Node:
    """The value whose range the input is given: max pooling and the like keep the levels of what they select from."""
    return view.x if isinstance(view, Linear) else source(view.x)
