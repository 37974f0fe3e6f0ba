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
from fxopt.ir.ops.linear_nbits import group_count, linear_nbits, rounded_activations
from fxopt.ir.packing import pack, packed_width
from fxopt.ir.target import Cost
from fxopt.ir.views.linear import Linear, linear, linears
from fxopt.passes.base import Candidate, Context, Estimate, Setting
from fxopt.passes.quantize_linear.common import FLOATS, float_cost, replaced, value_of
from fxopt.passes.quantize_linear.gptq import DAMPING, gptq, nearest
from fxopt.passes.quantize_linear.grids import Grid, group_grid
from fxopt.passes.stats import Stats

_SLAB = 1 << 21  # elements


@dataclass(frozen=True)
class WeightOnly:
    """The weight-only part of quantize-linear."""

    name: str
    bits: int
    group: int  # inputs per scale; 0: all of them
    symmetric: bool
    method: str  # "gptq" or "rtn"
    act_order: bool
    activations: str  # "int8" or "float"

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        """One candidate per linear."""
        for view in linears(graph):
            if isinstance(view, tuple):
                node, refusal = view
                yield self._candidate(node, "", 0, refusal)
                continue
            out, columns = view.features(graph)
            group = self.group or columns
            name = f"linear_nbits {out}x{columns} {self.bits} bits"
            yield self._candidate(view.node, name, group, self._refusal(graph, ctx, view, group))

    def _candidate(self, node: fx.Node, group_name: str, group: int, refusal: Refusal | None) -> Candidate:
        setting = Setting.of(
            self.name, bits=self.bits, group=group, symmetric=self.symmetric, method=self.method,
            activations=self.activations,
        )  # fmt: skip
        return Candidate(self.name, node.name, label(node), setting, refusal, group_name)

    def _refusal(self, graph: Graph, ctx: Context, view: Linear, group: int) -> Refusal | None:
        excluded = ctx.excluded(label(view.node))
        if excluded is not None:
            return excluded
        weight = view.weight(graph)
        if weight.dtype not in FLOATS:
            return Refusal("the weight has type {}; expected a floating-point type", weight.dtype)
        if weight.numel() == 0:
            return Refusal("the weight is empty")
        if weight.shape[1] < group:
            return Refusal("{} inputs are fewer than one group of {}; try group={}", weight.shape[1], group, 16)
        if not isinstance(view.x.meta.get("val"), Tensor):
            return Refusal("the type of its input {} is not known", label(view.x))
        if graph.origin == "onnx" and value_of(view.x).dtype not in (torch.float32, torch.float16):
            return Refusal("MatMulNBits takes float32 and float16; the input has type {}", value_of(view.x).dtype)
        kind = "int8" if self.activations == "int8" else "float"
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
        packed, scales, zeros = self._storage(graph, view, candidate)
        columns, group = view.weight(graph).shape[1], candidate.setting["group"]
        after = linear_nbits.cost_of(
            value_of(view.x), packed, scales, zeros, None, columns, self.bits, group, self._activation_bits
        )
        return float_cost(view, view.weight(graph)), after

    def _storage(self, graph: Graph, view: Linear, candidate: Candidate) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zeros without their data."""
        out, columns = view.weight(graph).shape
        groups = group_count(columns, candidate.setting["group"])
        packed = torch.empty(out, packed_width(columns, self.bits), dtype=torch.uint8, device="meta")
        scales = torch.empty(out, groups, device="meta")
        return packed, scales, None if self.symmetric else torch.empty_like(scales, dtype=torch.uint8)

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
        activations = rounded_activations(x, group) if self.activations == "int8" else x
        reference, result = (x.new_empty(len(x), len(weight)) for _ in range(2))
        for rows in _slabs(weight):
            part = weight[rows]
            grid = group_grid(part, self.bits, group, self.symmetric, search=False)
            rounded = grid.values(nearest(part, grid).float(), grid.groups(part.shape[1]))
            reference[:, rows], result[:, rows] = x @ part.t(), activations @ rounded.t()
        error = noise_to_signal(reference, result)
        packed, scales, zeros = self._storage(graph, view, candidate)
        only = len(view.weight_node.users) == 1
        stored = packed.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes)
        return Estimate(error, before, after, (view.weight(graph).nbytes if only else 0) - stored)

    @property
    def _activation_bits(self) -> int:
        return 8 if self.activations == "int8" else 16

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Replace the linear."""
        view = _view(graph, candidate)
        weight, group = view.weight(graph).float(), candidate.setting["group"]
        packed, scales, zero_codes = self._rounded(weight, group, view, stats)
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
            self._activation_bits,
        )
        replaced(graph, view, view.node, linear_nbits.target, arguments, self.name)

    def _rounded(self, weight: Tensor, group: int, view: Linear, stats: Stats) -> tuple[Tensor, Tensor, Tensor]:
        """Packed codes, scales and zeros; a few outputs at a time, which are independent of each other."""
        grids = [group_grid(weight[rows], self.bits, group, self.symmetric) for rows in _slabs(weight)]
        scales, zeros = (torch.cat([getattr(grid, name) for grid in grids]) for name in ("scales", "zeros"))
        if self.method == "gptq":
            packed = pack(self._gptq(weight, Grid(self.bits, group, scales, zeros), view, stats), self.bits)
        else:
            pairs = zip(_slabs(weight), grids, strict=True)
            packed = torch.cat([pack(nearest(weight[rows], grid), self.bits) for rows, grid in pairs])
        return packed, scales, zeros.to(torch.uint8)

    def _gptq(self, weight: Tensor, grid: Grid, view: Linear, stats: Stats) -> Tensor:
        found = gptq(weight, stats.moments[view.x.name], grid, act_order=self.act_order)
        if found.damping > DAMPING:
            stats.notes.append(
                f"GPTQ at {label(view.node)!r}: the second moments of its input are not positive definite;"
                f" damping raised to {found.damping:g} of their mean"
            )
        return found.codes


def _slabs(weight: Tensor) -> list[slice]:
    """The outputs of a weight [out, in], as many at a time as keep temporary values small."""
    step = max(1, _SLAB // max(1, weight.shape[1]))
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def _view(graph: Graph, candidate: Candidate) -> Linear:
    node = graph.find(candidate.node)
    view = None if node is None else linear(graph, node)
    assert isinstance(view, Linear), f"{candidate.node} is not a linear of the graph"
    return view
