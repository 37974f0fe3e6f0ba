"""Linears in float8 (e4m3), where the target multiplies float8 numbers.

Weights are scaled per output channel, activations per row at run time (`dynamic`) or per tensor on calibration samples
(`static`). Source: Micikevicius et al., "FP8 formats for deep learning" (2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxopt.ir.error import noise_to_signal
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.ops.linear_fp8 import LARGEST, linear_fp8, to_e4m3
from fxopt.ir.target import Target
from fxopt.ir.views.conv import convs
from fxopt.ir.views.linear import Linear, linear, linears
from fxopt.passes.base import Candidate, Context, Estimate, Setting
from fxopt.passes.quantize_linear.common import JUDGED, float_cost, replaced, unfit, value_of
from fxopt.passes.quantize_linear.on_sample import float_result
from fxopt.passes.stats import Extremes, Stats

_MULTIPLE = 16  # of both axes of a weight: other sizes are filled up before each product, which costs what is gained


def quantize_weight_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [out, in] and scales float32 [out] of a weight [out, in]: weight = codes * scales."""
    scales = weight.float().abs().amax(1) / LARGEST
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return to_e4m3(weight, scales[:, None]), scales


@dataclass(frozen=True)
class Float8:
    """The float8 part of quantize-linear."""

    name: str
    activations: str  # "dynamic", "static", or "auto": both are offered
    only: bool  # no other format was asked for: targets without float8 are told so
    unknown: tuple[str, ...]  # options that are set and that only the int8 form has

    # ---- candidates

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        """One candidate per linear and kind of activation range; on CPUs only where float8 was asked for."""
        if not self.only and ctx.target.kind != "cuda":
            return
        for view in linears(graph):
            if isinstance(view, tuple):
                if self.only:  # the int8 form says so already
                    yield self._candidate(view[0], "", "auto", view[1])
                continue
            weight = view.weight(graph)
            refusal = self._refusal(graph, ctx, view, weight)
            kinds = ("dynamic", "static") if self.activations == "auto" else (self.activations,)
            for kind in kinds if refusal is None else (self.activations,):
                yield self._candidate(view.node, f"linear_fp8 {'x'.join(map(str, weight.shape))}", kind, refusal)
        for found in convs(graph) if self.only else ():
            node, refusal = found if isinstance(found, tuple) else (found.node, None)
            missing = Refusal("convolutions have no float8 form; use format=int8 or auto")
            yield self._candidate(node, "", self.activations, refusal or missing)

    def _candidate(self, node: fx.Node, group: str, kind: str, refusal: Refusal | None) -> Candidate:
        setting = Setting.of(self.name, format="fp8", activations=kind)
        return Candidate(self.name, node.name, label(node), setting, refusal, group)

    def _refusal(self, graph: Graph, ctx: Context, view: Linear, weight: Tensor) -> Refusal | None:
        refusal = unfit(graph, ctx, view)
        if refusal is not None:
            return refusal
        unsupported = ctx.supports("linear_fp8", "float8_e4m3fn")
        if unsupported:
            return Refusal(unsupported)
        if "float8" not in ctx.target.peak:
            return Refusal(no_float8(ctx.target))
        if not isinstance(view.x.meta.get("val"), Tensor):
            return Refusal("the type of its input {} is not known", label(view.x))
        if any(size % _MULTIPLE for size in weight.shape):
            return Refusal("float8 products take multiples of {}; the weight is {}", _MULTIPLE, tuple(weight.shape))
        if self.unknown:
            return Refusal("only the int8 form has {}", ", ".join(self.unknown))
        return None

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The input."""
        return (_view(graph, candidate).x,)

    def moments(self, graph: Graph, candidate: Candidate) -> fx.Node | None:
        """None are used: codes are rounded to nearest."""
        return None

    # ---- estimate and apply

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """The error on the calibration rows, and the work of both forms."""
        view = _view(graph, candidate)
        weight, bias = view.weight(graph), view.bias(graph)
        codes, scales = self._codes(view, weight, stats)
        seen = stats[view.x]
        assert seen.sample is not None and seen.sample_half is not None
        x = seen.sample.float()
        if ("reference", candidate.node) not in stats.cache:
            stats.cache["reference", candidate.node] = float_result(graph, view, x)
        every = max(1, len(weight) // JUDGED)
        some = codes[::every], scales[::every], None if bias is None else bias[::every]
        step = self._step(candidate, seen)
        result = linear_fp8.function(x, *some, step)
        if step is not None and seen.calls > 1:  # a range that was taken from a row fits it better than new data
            for half in (0, 1):
                rows = seen.sample_half == half
                result[rows] = linear_fp8.function(x[rows], *some, _static_step(seen.halves[1 - half]))
        error = noise_to_signal(stats.cache["reference", candidate.node][:, ::every], result)
        after = linear_fp8.cost_of(value_of(view.x), codes, scales, bias, step)
        only = len(view.weight_node.users) == 1
        saved = (weight.nbytes if only else 0) - codes.nbytes - scales.nbytes
        return Estimate(error, float_cost(view, weight), after, saved)

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Replace the linear."""
        view = _view(graph, candidate)
        codes, scales = self._codes(view, view.weight(graph), stats)
        stem, source = label(view.weight_node), (label(view.node), self.name)
        arguments = (
            view.x,
            graph.add_constant(codes, f"{stem}_codes", source),
            graph.add_constant(scales, f"{stem}_scales", source),
            view.bias_node,
            self._step(candidate, stats[view.x]),
        )
        replaced(graph, view, view.node, linear_fp8.target, arguments, self.name)

    def _codes(self, view: Linear, weight: Tensor, stats: Stats) -> tuple[Tensor, Tensor]:
        key = ("codes_fp8", view.weight_node.name)
        if key not in stats.cache:
            stats.cache[key] = quantize_weight_fp8(weight)
        found: tuple[Tensor, Tensor] = stats.cache[key]
        return found

    def _step(self, candidate: Candidate, seen: Extremes) -> float | None:
        return _static_step(seen) if candidate.setting["activations"] == "static" else None


def no_float8(target: Target) -> str:
    """Why a target has no float8 form."""
    if target.kind != "cuda":
        return f"{target.name} has no float8 arithmetic"
    major, minor = divmod(int(target.arch.removeprefix("sm_").rstrip("af")), 10)
    return f"{target.name} has no fp8: compute capability {major}.{minor}, it begins with 8.9"


def _static_step(seen: Extremes) -> float:
    """The step with which the observed range just fits."""
    largest = max(-seen.minimum, seen.maximum) / LARGEST or 1.0
    return float(torch.tensor(largest, dtype=torch.float32).item())


def _view(graph: Graph, candidate: Candidate) -> Linear:
    node = graph.find(candidate.node)
    view = None if node is None else linear(graph, node)
    assert isinstance(view, Linear), f"{candidate.node} is not a linear of the graph"
    return view
