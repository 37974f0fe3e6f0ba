"""Convolutions whose weights have 2 to 8 bits: fewer bytes in the file, the speed of float weights.

The weights are converted when the model is loaded. No kernel takes them as they are: a 1x1 convolution could be written
as MatMulNBits, but that is slower than float weights from a few dozen positions on, which every image has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxopt.ir.error import noise_to_signal
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.ops.conv_nbits import conv_nbits
from fxopt.ir.target import Cost
from fxopt.ir.views.conv import Conv, conv, convs
from fxopt.passes.base import Candidate, Context, Estimate, Setting
from fxopt.passes.quantize_linear.common import float_conv, float_cost, replaced, unfit, value_of
from fxopt.passes.quantize_linear.patches import patch_rows
from fxopt.passes.quantize_linear.rounding import Rounding
from fxopt.passes.stats import Stats

_OPSET = 11  # the first with BitShift, which unpacks codes


@dataclass(frozen=True)
class ConvWeights:
    """The part of quantize-linear for the weights of convolutions alone."""

    name: str
    bits: int
    group: int  # inputs per scale; 0, or more than there are: all of them
    symmetric: bool
    method: str  # "gptq" or "rtn"
    act_order: bool

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        """One candidate per convolution."""
        for view in convs(graph):
            if isinstance(view, tuple):
                node, refusal = view
                yield self._candidate(node, "", 0, refusal)
                continue
            weight = view.weight(graph)
            columns = weight[:1].numel()
            group = min(self.group or columns, columns)
            name = f"conv_nbits {'x'.join(map(str, weight.shape))} {self.bits} bits"
            yield self._candidate(view.node, name, group, self._refusal(graph, ctx, view))

    def _candidate(self, node: fx.Node, group_name: str, group: int, refusal: Refusal | None) -> Candidate:
        setting = Setting.of(
            self.name, bits=self.bits, group=group, symmetric=self.symmetric, method=self.method, activations="float"
        )
        return Candidate(self.name, node.name, label(node), setting, refusal, group_name)

    def _refusal(self, graph: Graph, ctx: Context, view: Conv) -> Refusal | None:
        refusal = unfit(graph, ctx, view)
        if refusal is not None:
            return refusal
        weight = view.weight(graph)
        if graph.model is not None and graph.model.opsets.get("", 0) < _OPSET:
            return Refusal("the model has opset {}; unpacking codes needs {}", graph.model.opsets.get("", 0), _OPSET)
        if not all(isinstance(node.meta.get("val"), Tensor) for node in (view.x, view.node)):
            return Refusal("the type of its input {} or of its result is not known", label(view.x))
        if value_of(view.x).dim() != weight.dim():
            return Refusal("its input has {} axes; expected {}", value_of(view.x).dim(), weight.dim())
        unsupported = ctx.supports("conv_nbits", f"int{self.bits}")
        return Refusal(unsupported) if unsupported else None

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The input."""
        return (view_of(graph, candidate).x,)

    def moments(self, graph: Graph, candidate: Candidate) -> fx.Node | None:
        """GPTQ wants the second moments of the patches, on the compressed graph."""
        return view_of(graph, candidate).x if self.method == "gptq" else None

    def moment_rows(self, graph: Graph, candidate: Candidate) -> Callable[[Tensor], Tensor]:
        """Patches [groups, positions, in] of a value of the input."""
        return patch_rows(graph, view_of(graph, candidate))

    def work(self, graph: Graph, candidate: Candidate) -> tuple[Cost, Cost]:
        """Work of both forms, which is the same."""
        view = view_of(graph, candidate)
        cost = float_cost(view, view.weight(graph))
        return cost, cost

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """The error of rounding to nearest on the calibration data (GPTQ's is smaller)."""
        view, rounding = view_of(graph, candidate), self._rounding(candidate)
        stored = view.weight(graph)
        weight = stored.float()
        flat = weight.flatten(1)
        seen = stats[view.x]
        assert seen.sample is not None
        rounded = torch.cat([values for _, values in rounding.nearest(flat)]).reshape(weight.shape)
        reference, result = (float_conv(seen.sample.float(), view, values, None) for values in (weight, rounded))
        before, after = self.work(graph, candidate)
        only = len(view.weight_node.users) == 1
        saved = (stored.nbytes if only else 0) - rounding.stored_bytes(*flat.shape)
        return Estimate(noise_to_signal(reference, result), before, after, saved)

    def _rounding(self, candidate: Candidate) -> Rounding:
        return Rounding(self.bits, candidate.setting["group"], self.symmetric, self.act_order)

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Replace the convolution."""
        view, rounding = view_of(graph, candidate), self._rounding(candidate)
        weight = view.weight(graph)
        flat = weight.float().flatten(1)
        if self.method == "gptq":
            pairs = zip(flat.chunk(view.groups), stats.moments[view.x.name], strict=True)
            parts = [rounding.packed(rows, moments, view.node, stats) for rows, moments in pairs]
            packed, scales, zeros = (torch.cat(found) for found in zip(*parts, strict=True))
        else:
            packed, scales, zeros = rounding.packed(flat, None, view.node, stats)
        stem, source = label(view.weight_node), (label(view.node), self.name)
        arguments = (
            view.x,
            graph.add_constant(packed, f"{stem}_codes", source),
            graph.add_constant(scales, f"{stem}_scales", source),
            None if self.symmetric else graph.add_constant(zeros, f"{stem}_zeros", source),
            view.bias_node,
            list(weight.shape[1:]),
            self.bits,
            rounding.group,
            list(view.stride),
            [*view.padding[0], *view.padding[1]],
            list(view.dilation),
            view.groups,
        )
        replaced(graph, view, view.node, conv_nbits.target, arguments, self.name)


def view_of(graph: Graph, candidate: Candidate) -> Conv:
    """The convolution that the candidate is about."""
    node = graph.find(candidate.node)
    view = None if node is None else conv(graph, node)
    assert isinstance(view, Conv), f"{candidate.node} is not a convolution of the graph"
    return view
