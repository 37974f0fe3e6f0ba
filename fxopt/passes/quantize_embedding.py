"""quantize-embedding: tables of embeddings in 8 bits, a quarter of their bytes.

The rows that are looked up are converted, never the table: that would take longer than the rest of many a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from fxopt.errors import InvalidOption
from fxopt.ir.builder import Builder
from fxopt.ir.error import noise_to_signal
from fxopt.ir.graph import Graph, hint, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.ops.embedding_w8 import embedding_w8
from fxopt.ir.target import Cost
from fxopt.ir.views.embedding import Embedding, embedding, embeddings
from fxopt.passes.base import Candidate, Context, Estimate, LossyPass, Setting
from fxopt.passes.quantize_linear.common import FLOATS, value_of
from fxopt.passes.quantize_linear.grids import quantize_weight
from fxopt.passes.stats import Stats

_SLAB = 1 << 21  # elements


@dataclass(frozen=True)
class QuantizeEmbedding(LossyPass):
    """Store tables that are only looked up in 8 bits, symmetric with a scale per row.

    It saves bytes; time only of a table that is much larger than the cache, so that `objective="size"` is what asks for
    it. Lookups that share a table become 8-bit lookups together.

    Options:
        bits: of the codes: 8, or None, which is neutral: nothing is offered.
    """

    bits: int | None = 8

    def __post_init__(self) -> None:
        if self.bits not in (8, None):
            raise InvalidOption(f"quantize-embedding: bits={self.bits}; expected 8, or none for no change")

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        """One candidate per table, at its first lookup."""
        if self.bits is None:
            return
        first: dict[str, Embedding] = {}
        for view in embeddings(graph):
            leader = first.setdefault(str(view.table_node.target), view)
            refusal = self._refusal(graph, ctx, view)
            if leader is not view:
                refusal = Refusal("shares its table with {}, where both are decided", label(leader.node))
            rows, features = view.table(graph).shape
            group = f"embedding_w8 {rows}x{features}"
            setting = Setting.of(self.name, bits=self.bits)
            yield Candidate(self.name, view.node.name, label(view.node), setting, refusal, group)

    def _refusal(self, graph: Graph, ctx: Context, view: Embedding) -> Refusal | None:
        excluded = [ctx.excluded(label(found.node)) for found in _lookups(graph, view)]
        if any(excluded):
            return next(filter(None, excluded))
        table = view.table(graph)
        if table.dtype not in FLOATS:
            return Refusal("the table has type {}; expected a floating-point type of at most 32 bits", table.dtype)
        others = [user for user in _users(graph, view) if embedding(graph, user) is None]
        if others:
            return Refusal("the table is also taken by {}, which needs it in floats", label(others[0]))
        if table.numel() == 0:
            return Refusal("the table is empty")
        if not bool(torch.isfinite(table).all()):
            return Refusal("the table holds infinite or NaN values")
        if not all(isinstance(found.node.meta.get("val"), torch.Tensor) for found in _lookups(graph, view)):
            return Refusal("the types of what is looked up are not known")
        unsupported = ctx.supports("embedding_w8", "int8")
        return Refusal(unsupported) if unsupported else None

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """The rows that are looked up."""
        return tuple(found.node for found in _lookups(graph, _view(graph, candidate)))

    def work(self, graph: Graph, candidate: Candidate) -> tuple[Cost, Cost]:
        """Work of all lookups in the table, in both forms."""
        view = _view(graph, candidate)
        table = view.table(graph)
        codes = torch.empty(table.shape, dtype=torch.int8, device="meta")
        scales = torch.empty(table.shape[0], 1, device="meta")
        pairs = [
            (_float_cost(found.node), embedding_w8.cost_of(codes, scales, _indices(found.node)))
            for found in _lookups(graph, view)
        ]
        before, after = pairs[0]
        for more, fewer in pairs[1:]:
            before, after = before + more, after + fewer
        return before, after

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """The error of rounding the rows that the calibration data look up."""
        view = _view(graph, candidate)
        before, after = self.work(graph, candidate)
        errors = []
        for node in self.observed(graph, candidate):
            sample = stats[node].sample
            assert sample is not None
            rows = sample.reshape(-1, sample.shape[-1]).float()
            codes, scales = _rounded(rows)
            errors.append(noise_to_signal(rows, codes.float() * scales))
        table = view.table(graph)
        stored = table.numel() + 4 * table.shape[0]
        return Estimate(max(errors), before, after, table.nbytes - stored)

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Replace every lookup in the table."""
        view = _view(graph, candidate)
        lookups = _lookups(graph, view)
        table, stem, source = view.table(graph), label(view.table_node), (label(view.node), self.name)
        codes, scales = _rounded(table)
        codes_node = graph.add_constant(codes, f"{stem}_codes", source)
        scales_node = graph.add_constant(scales, f"{stem}_scales", source)
        for found in lookups:
            builder = Builder(graph, found.node, self.name, like=found.node)
            arguments = (codes_node, scales_node, found.indices)
            rows = graph.call(embedding_w8.target, arguments, before=found.node, made_by=self.name, like=found.node)
            graph.replace(found.node, rows if table.dtype == torch.float32 else builder.cast(rows, table.dtype))
        for node in {found.table_node for found in lookups}:
            if not node.users:
                graph.erase(node)


def _rounded(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [rows, features] and scales [rows, 1]; a few rows at a time, which are independent of each other."""
    step = max(1, _SLAB // max(1, table.shape[1]))
    parts = [quantize_weight(table[start : start + step]) for start in range(0, len(table), step)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])[:, None]


def _indices(node: fx.Node) -> torch.Tensor:
    """As many as the lookup gives rows: where they are computed from shapes, they have no tensor as their type."""
    return torch.empty([hint(dim) for dim in value_of(node).shape[:-1]], dtype=torch.int64, device="meta")


def _float_cost(node: fx.Node) -> Cost:
    """The rows are read and written."""
    value = value_of(node)
    count = 1
    for dim in value.shape:
        count *= hint(dim)
    return Cost(0.0, 2.0 * count * value.itemsize, str(value.dtype).removeprefix("torch."), "shape", 1)


def _users(graph: Graph, view: Embedding) -> list[fx.Node]:
    """What takes the table; one constant may have several nodes."""
    holders = (node for node in graph.nodes if node.op == "get_attr" and node.target == view.table_node.target)
    return [user for holder in holders for user in holder.users]


def _lookups(graph: Graph, view: Embedding) -> list[Embedding]:
    """Every lookup in the table of this one, in execution order."""
    return [found for found in embeddings(graph) if found.table_node.target == view.table_node.target]


def _view(graph: Graph, candidate: Candidate) -> Embedding:
    node = graph.find(candidate.node)
    view = None if node is None else embedding(graph, node)
    assert view is not None, f"{candidate.node} is not a lookup of the graph"
    return view
