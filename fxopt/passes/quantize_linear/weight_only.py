"""Linears whose weights have 2 to 8 bits: fewer bytes to load, which is what a single token waits for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.ir.error import noise_to_signal
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.ops.linear_nbits import linear_nbits, rounded_activations
from fxopt.ir.target import Cost
from fxopt.ir.views.linear import Linear, linear, linears
from fxopt.passes.base import Candidate, Context, Estimate, Setting
from fxopt.passes.quantize_linear.common import float_cost, replaced, unfit, value_of
from fxopt.passes.quantize_linear.rounding import Rounding
from fxopt.passes.stats import Stats


@dataclass(frozen=True)
class WeightOnly:
    """The weight-only part of quantize-linear."""

    name: str
    bits: int
    group: int  # inputs per scale; 0: all of them
    symmetric: bool
    method: str  # "gptq" or "rtn"
    act_order: bool
    activations: str  # "int8", "float" or "auto": a candidate's setting says what it became

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        """One candidate per linear."""
        fast = ("float", "int8") if ctx.target.kind == "cuda" else ("int8", "float")
        kinds = fast if self.activations == "auto" else (self.activations,)
        for view in linears(graph):
            if isinstance(view, tuple):
                node, refusal = view
                yield self._candidate(node, "", 0, kinds[0], refusal)
                continue
            out, columns = view.features(graph)
            group = self.group or columns
            name = f"linear_nbits {out}x{columns} {self.bits} bits"
            refused = {kind: self._refusal(graph, ctx, view, group, kind) for kind in kinds}
            kind = next((kind for kind in kinds if refused[kind] is None), kinds[0])
            yield self._candidate(view.node, name, group, kind, refused[kind])

    def _candidate(self, node: fx.Node, group_name: str, group: int, kind: str, refusal: Refusal | None) -> Candidate:
        setting = Setting.of(
            self.name, bits=self.bits, group=group, symmetric=self.symmetric, method=self.method, activations=kind
        )
        return Candidate(self.name, node.name, label(node), setting, refusal, group_name)

    def _refusal(self, graph: Graph, ctx: Context, view: Linear, group: int, kind: str) -> Refusal | None:
        refusal = unfit(graph, ctx, view)
        if refusal is not None:
            return refusal
        weight = view.weight(graph)
        if weight.shape[1] < group:
            return Refusal("{} inputs are fewer than one group of {}; try group={}", weight.shape[1], group, 16)
        if not isinstance(view.x.meta.get("val"), Tensor):
            return Refusal("the type of its input {} is not known", label(view.x))
        if graph.origin == "onnx" and value_of(view.x).dtype not in (torch.float32, torch.float16):
            return Refusal("MatMulNBits takes float32 and float16; the input has type {}", value_of(view.x).dtype)
        unsupported = ctx.supports("linear_nbits", f"int{self.bits}", f"group={group},activations={kind}")
        return Refusal(unsupported) if unsupported else None

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The input."""
        return (_view(graph, candidate).x,)

    def moments(self, graph: Graph, candidate: Candidate) -> fx.Node | None:
        """GPTQ wants the second moments of the input, on the compressed graph."""
        return _view(graph, candidate).x if self.method == "gptq" else None

    def work(self, graph: Graph, candidate: Candidate) -> tuple[Cost, Cost]:
        """Work of both forms."""
        view = _view(graph, candidate)
        out, columns = view.weight(graph).shape
        rounding = self._rounding(candidate)
        after = linear_nbits.cost_of(
            value_of(view.x), *rounding.storage(out, columns), None, columns, self.bits, rounding.group,
            _activation_bits(candidate),
        )  # fmt: skip
        return float_cost(view, view.weight(graph)), after

    def _rounding(self, candidate: Candidate) -> Rounding:
        return Rounding(self.bits, candidate.setting["group"], self.symmetric, self.act_order)

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """The error of rounding to nearest on the calibration rows (GPTQ's is smaller), and the work of both forms."""
        view = _view(graph, candidate)
        weight, group = view.weight(graph).float(), candidate.setting["group"]
        before, after = self.work(graph, candidate)
        if not bool(torch.isfinite(weight).all()):
            return Estimate(float("nan"), before, after)
        seen = stats[view.x]
        assert seen.sample is not None
        x = seen.sample.float()
        activations = rounded_activations(x, group) if _activation_bits(candidate) == 8 else x
        reference, result = (x.new_empty(len(x), len(weight)) for _ in range(2))
        rounding = self._rounding(candidate)
        for rows, rounded in rounding.nearest(weight):
            reference[:, rows], result[:, rows] = x @ weight[rows].t(), activations @ rounded.t()
        error = noise_to_signal(reference, result)
        only = len(view.weight_node.users) == 1
        saved = (view.weight(graph).nbytes if only else 0) - rounding.stored_bytes(*weight.shape)
        return Estimate(error, before, after, saved)

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Replace the linear."""
        view = _view(graph, candidate)
        weight, group = view.weight(graph).float(), candidate.setting["group"]
        moments = stats.moments[view.x.name] if self.method == "gptq" else None
        packed, scales, zero_codes = self._rounding(candidate).packed(weight, moments, view.node, stats)
        stem, source = label(view.weight_node), (label(view.node), self.name)
        zeros: Any = None
        if not self.symmetric:
            zeros = graph.add_constant(zero_codes, f"{stem}_zeros", source)
        arguments = (
            view.x,
            graph.add_constant(packed, f"{stem}_codes", source),
            graph.add_constant(scales, f"{stem}_scales", source),
            zeros,
            view.bias_node,
            weight.shape[1],
            self.bits,
            group,
            _activation_bits(candidate),
        )
        replaced(graph, view, view.node, linear_nbits.target, arguments, self.name)


def _activation_bits(candidate: Candidate) -> int:
    return 8 if candidate.setting["activations"] == "int8" else 16


def _view(graph: Graph, candidate: Candidate) -> Linear:
    node = graph.find(candidate.node)
    view = None if node is None else linear(graph, node)
    assert isinstance(view, Linear), f"{candidate.node} is not a linear of the graph"
    return view
