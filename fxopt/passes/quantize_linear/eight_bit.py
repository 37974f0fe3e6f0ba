"""Linears and convolutions in 8-bit integers.

Weights are symmetric per output channel, activations asymmetric per tensor: with the range found at run time
(`dynamic`) or on calibration samples (`static`). Outliers of a linear's activations may be moved into its weights
(`smooth`). Source: Krishnamoorthi (2018).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from fxopt.ir.views.common import argument, scalar_constant
from fxopt.ir.views.conv import Conv, conv, convs
from fxopt.ir.views.eight_bit import saturated, source
from fxopt.ir.views.linear import Linear, linear, linears
from fxopt.passes import fold_linear_scale, fold_norm_scale
from fxopt.passes.base import Candidate, Context, Estimate, Setting
from fxopt.passes.quantize_between import behind
from fxopt.passes.quantize_linear.common import (
    FLOATS,
    float_conv,
    float_cost,
    is_depthwise,
    replaced,
    saturates,
    value_of,
    with_conversions,
)
from fxopt.passes.quantize_linear.grids import affine, quantize_weight, static_range
from fxopt.passes.quantize_linear.patches import patch_rows
from fxopt.passes.quantize_linear.rounding import eight_bit_codes
from fxopt.passes.quantize_linear.smoothing import Smoothing, chosen, siblings, smoothed
from fxopt.passes.stats import Extremes, Stats, ValueStats

_OUTPUTS = 64  # on which strengths of smoothing are compared
_JUDGED = 192  # outputs of a linear by which its error is estimated


@dataclass(frozen=True)
class EightBit:
    """The 8-bit part of quantize-linear."""

    name: str
    activations: str  # "dynamic", "static", or "auto": both are offered where both exist
    smooth: str  # "on", "off", or "auto": both are offered for linears
    ranges: str  # of static activations: one of `grids.RANGES`
    correct_bias: bool
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
        sums = 16 if saturates(ctx) and not is_depthwise(view, weight) else 32
        wanted = [kind for kind in kinds if self.activations in ("auto", kind)]
        if not wanted:
            refusal = Refusal("a convolution has no {} form that pays; use activations=static", self.activations)
            yield self._candidate(ctx, view.node, group, self.activations, refusal)
        for kind in wanted:
            name = f"{op_name}_dynamic" if kind == "dynamic" else op_name
            refused = self._refusal(graph, ctx, view, name)
            for smooth in self._smoothings(view) if refused is None else (False,):
                yield self._candidate(ctx, view.node, group, kind, refused, smooth, sums)

    def _smoothings(self, view: Linear | Conv) -> tuple[bool, ...]:
        if isinstance(view, Conv) or self.smooth == "off":
            return (False,)
        return (True,) if self.smooth == "on" else (False, True)

    def _candidate(
        self,
        ctx: Context,
        node: fx.Node,
        group: str,
        kind: str,
        refusal: Refusal | None,
        smooth: bool = False,
        sums: int = 32,
    ) -> Candidate:
        values: dict[str, Any] = {"activations": kind, "sums": sums}
        if smooth:
            values["smooth"] = True
        if self.ranges != "minmax" and kind == "static":
            values["ranges"] = self.ranges
        if self.correct_bias:
            values["correct_bias"] = True
        if self.rounding == "gptq" and sums == 32:
            values["rounding"] = "gptq"
        return Candidate(self.name, node.name, label(node), Setting.of(self.name, **values), refusal, group)

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
        """The input; for a convolution also the output and what may be quantised between it and the next ones."""
        view = _view(graph, candidate)
        if isinstance(view, Linear):
            return (view.x,)
        result = _result(graph, view)
        return (view.x, source(view.x), result, *behind(graph, result))

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """The error on the calibration rows, and the work of both forms."""
        view = _view(graph, candidate)
        weight = view.weight(graph)
        x = self._sample(view, stats)
        operator, operands = self._operands(graph, view, candidate.setting, stats)
        if ("reference", candidate.node) not in stats.cache:
            stats.cache["reference", candidate.node] = _float_result(graph, view, x)
        reference = stats.cache["reference", candidate.node]
        after = operator.cost_of(value_of(view.x), *operands)
        before = float_cost(view, weight)
        if isinstance(view, Conv):
            before = with_conversions(graph, view, _result(graph, view), before)
            result = operator.function(x, *operands)
        else:
            smoothing = self._smoothing(graph, view, candidate.setting, stats)
            after = after if smoothing is None else after + _smoothing_cost(graph, view)
            every = max(1, len(weight) // _JUDGED)
            codes, scales, bias, *fixed = operands
            some = (codes[::every], scales[::every], None if bias is None else bias[::every], *fixed)
            sums = candidate.setting["sums"]
            result = _on_sample(x, some, weight[::every], stats[view.x], smoothing, sums)
            reference = reference[:, ::every]
        return Estimate(noise_to_signal(reference, result), before, after, 3 * weight.numel())

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
            bias = self._bias(graph, view, candidate.setting, stats, s, (codes, scales))
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
        result = _result(graph, view)
        node = replaced(graph, view, result, operator.target, arguments, self.name)
        if isinstance(view, Conv):
            for value in behind(graph, node):
                if value in stats:
                    value.meta["levels"] = static_range(stats[value], _ranges(candidate.setting))

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
        weight, moments = _scaled(view.weight(graph), s).float(), stats.moments[view.x.name]
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
            stats.cache[key] = quantize_weight(_scaled(view.weight(graph), s), setting["sums"])
        codes, scales = stats.cache[key]
        bias = self._bias(graph, view, setting, stats, s, (codes, scales))
        if setting["activations"] == "dynamic":
            return linear_w8a8_dynamic, (codes, scales, bias)
        ranges = _ranges(setting)
        if s is not None:
            x_scale, x_zero = affine(*_channel_range(stats[view.x], s))
        else:
            x_scale, x_zero = static_range(stats[_ranged(view)], ranges)
        if isinstance(view, Linear):
            return linear_w8a8, (codes, scales, bias, x_scale, x_zero)
        y_scale, y_zero = static_range(stats[_result(graph, view)], ranges)
        pads = [*view.padding[0], *view.padding[1]]
        shape = (list(view.stride), pads, list(view.dilation), view.groups)
        return conv_w8a8, (codes, scales, bias, x_scale, x_zero, y_scale, y_zero, *shape)

    def _bias(
        self, graph: Graph, view: Linear | Conv, setting: Setting, stats: Stats, s: Tensor | None, rounded: Any
    ) -> Tensor | None:
        """The bias; with `correct_bias`, plus what rounding the weight takes from the mean output."""
        bias = view.bias(graph)
        mean = stats[view.x].channel_mean
        if bias is None or not setting.get("correct_bias", False) or mean is None or isinstance(view, Conv):
            return bias
        mean = mean if s is None else mean / s
        codes, scales = rounded
        lost: Tensor = _scaled(view.weight(graph), s).float() - codes.float() * scales[:, None]
        return (bias.double() + lost.double() @ mean.double()).to(bias.dtype)

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
            operands = (*quantize_weight(_scaled(weight, smoothing.s), sums), None)
            result = _on_sample(x, operands, weight, stats[found.x], smoothing, sums)
            return noise_to_signal(x @ weight.float().t(), result)

        return chosen(graph, view, stats, error)


def _on_sample(
    x: Tensor, operands: tuple[Any, ...], weight: Tensor, seen: ValueStats, smoothing: Smoothing | None, sums: int
) -> Tensor:
    """The integer linear on the kept rows, each with what the half of the calls without that row calibrates.

    A range, or factors, that were taken from a row fit it better than they will fit new data.
    """
    codes, scales, bias, *fixed = operands
    s = None if smoothing is None else smoothing.s
    if seen.calls < 2 or seen.sample_half is None or not (fixed or smoothing):
        return _linear_on_sample(x if s is None else x / s, operands, _run_time_range(seen, s))
    result = x.new_empty(len(x), len(weight))
    for half in (0, 1):
        rows, other = seen.sample_half == half, seen.halves[1 - half]
        if smoothing is not None and smoothing.halves is not None:
            s = smoothing.halves[1 - half]
            codes, scales = quantize_weight(_scaled(weight, s), sums)
        low, high = _extremes(other) if s is None else _channel_range(other, s)
        run_time = affine(low, high) if fixed else _run_time_range(seen, s)
        result[rows] = _linear_on_sample(x[rows] if s is None else x[rows] / s, (codes, scales, bias), run_time)
    return result


def _scaled(weight: Tensor, s: Tensor | None) -> Tensor:
    return weight if s is None else weight.float() * s


def _extremes(seen: Extremes) -> tuple[float, float]:
    """The range, zero included."""
    return min(seen.minimum, 0.0), max(seen.maximum, 0.0)


def _channel_range(seen: Extremes, s: Tensor) -> tuple[float, float]:
    """The range of x / s over all calibration samples, zero included."""
    assert seen.channel_minimum is not None and seen.channel_maximum is not None
    return min(float((seen.channel_minimum / s).min()), 0.0), max(float((seen.channel_maximum / s).max()), 0.0)


def _run_time_range(seen: ValueStats, s: Tensor | None) -> tuple[float, int]:
    """Scale and zero point of an activation as a whole, on average over the calls."""
    low, high = min(seen.mean_minimum, 0.0), max(seen.mean_maximum, 0.0)
    if s is not None:
        widest = _channel_range(seen, s)
        low = widest[0] * (low / min(seen.minimum, -1e-30)) if seen.minimum < 0 else 0.0
        high = widest[1] * (high / max(seen.maximum, 1e-30)) if seen.maximum > 0 else 0.0
    return affine(low, high)


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


def _result(graph: Graph, view: Linear | Conv) -> fx.Node:
    """The node whose value the integer operator replaces: the ReLU or clip behind a convolution is part of it."""
    return saturated(graph, view.node) if isinstance(view, Conv) else view.node


def _ranged(view: Linear | Conv) -> fx.Node:
    """The value whose range the input is given: max pooling and the like keep the levels of what they select from."""
    return view.x if isinstance(view, Linear) else source(view.x)


def _ranges(setting: Setting) -> str:
    """How ranges of static activations are found."""
    method: str = setting.get("ranges", "minmax")
    return method


def _linear_on_sample(x: Tensor, operands: tuple[Any, ...], run_time: tuple[float, int]) -> Tensor:
    """The integer linear on sampled rows; `run_time` is the range that a dynamic one finds.

    In float32: the rounding of the sum is far below the quantisation error that is estimated here.
    """
    codes, scales, bias, *fixed = operands
    x_scale, x_zero = fixed or run_time
    levels = (torch.round(x / x_scale) + x_zero).clamp(0, 255) - x_zero
    return torch.nn.functional.linear(
        levels, codes.float() * scales[:, None] * x_scale, None if bias is None else bias.float()
    )


def _float_result(graph: Graph, view: Linear | Conv, x: Tensor) -> Tensor:
    """What the view computes from x."""
    weight, bias = view.weight(graph).float(), view.bias(graph)
    if isinstance(view, Linear):
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.float())
    result = float_conv(x, view, weight, bias)
    return _saturated_like(graph, _result(graph, view), view.node, result)


def _saturated_like(graph: Graph, behind_it: fx.Node, node: fx.Node, value: Tensor) -> Tensor:
    """The value after the ReLU or clip that `saturated` found behind `node`."""
    if behind_it is node:
        return value
    top = scalar_constant(graph, argument(behind_it, 2, "max"))
    return value.clamp(min=0.0, max=top)
