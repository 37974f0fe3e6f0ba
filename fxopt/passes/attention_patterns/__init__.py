"""attention-patterns: heads that look at few keys only compute these, each head by a pattern of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxopt.errors import InvalidOption
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.ops.attention import attention
from fxopt.ir.target import Cost
from fxopt.ir.views.attention import Attention, attentions
from fxopt.passes.attention_patterns.modes import Choice, cheapest, choices
from fxopt.passes.attention_patterns.pricing import Pricing, pricing_of
from fxopt.passes.attention_patterns.rewrite import arranged, rewrite
from fxopt.passes.attention_patterns.site import Site, find_site, site_of
from fxopt.passes.base import Candidate, Context, Estimate, LossyPass, Setting
from fxopt.passes.stats import Stats

__all__ = ["AttentionPatterns"]

_TOLERANCES = (1e-5, 1e-4, 1e-3, 1e-2)
_LEAST_GAIN = 0.95  # of the time of dense attention: what gains less is within the error of predictions
_SEQUENCES = 2  # of calibration, at least


@dataclass(frozen=True)
class AttentionPatterns(LossyPass):
    """Give every head of an attention the cheapest pattern of keys that leaves the layer's output as it was, nearly.

    It is done where it is asked for. For each head, full, skip, diagonal windows, many diagonals, a stripe, sinks with
    a window, and lists of blocks are tried on calibration samples; the error is that of the layer's output, behind the
    output projection. Heads with one pattern are put next to each other, which costs nothing: the order is folded into
    the linears around them, and heads that are skipped leave these.

    Options:
        frames, height, width: how tokens are laid out, frame by frame and row by row; many diagonals need it.
        tolerance: the error of one layer's output, noise to signal; None: several are offered, 0 is no change.
    """

    frames: int = 0
    height: int = 0
    width: int = 0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        sizes = (self.frames, self.height, self.width)
        if any(sizes) and not all(size > 0 for size in sizes):
            raise InvalidOption(f"attention-patterns: frames, height and width are {sizes}; give all three, or none")
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise InvalidOption(f"attention-patterns: tolerance={self.tolerance}; expected at least 0 and below 1")

    def candidates(self, graph: Graph, ctx: Context) -> Iterator[Candidate]:
        """For every attention, one candidate per tolerance."""
        for view in list(attentions(graph)):
            if not isinstance(view, Attention) or self.tolerance == 0:
                continue
            site = ctx.excluded(label(view.node)) or site_of(graph, view)
            pricing = pricing_of(ctx, site, self.frames > 0) if isinstance(site, Site) else site
            if isinstance(site, Site) and not isinstance(pricing, Refusal):
                pricing = self._mismatch(site) or pricing
            refusal = pricing if isinstance(pricing, Refusal) else None
            size = f"{site.heads}x{site.length}x{site.width}" if isinstance(site, Site) else ""
            for tolerance in _TOLERANCES if self.tolerance is None else (self.tolerance,):
                setting = Setting.of(self.name, tolerance=tolerance, **({} if refusal else {"kernel": pricing}))
                yield Candidate(
                    self.name, view.node.name, label(view.node), setting, refusal, f"attention_pattern {size}"
                )
                if refusal is not None:
                    break

    def _mismatch(self, site: Site) -> Refusal | None:
        """Why the layout that was given is not this attention's."""
        tokens = self.frames * self.height * self.width
        if not tokens or tokens == site.length:
            return None
        text = "its {} tokens are not {} frames of {} x {}; without frames many diagonals are not tried"
        return Refusal(text, site.length, self.frames, self.height, self.width)

    def observed(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """Queries, keys and values."""
        return find_site(graph, candidate.node).observed

    def whole(self, graph: Graph, candidate: Candidate) -> tuple[fx.Node, ...]:
        """All of them, of some sequences: rows alone say nothing about who looks at whom."""
        return self.observed(graph, candidate)

    def estimate(self, graph: Graph, candidate: Candidate, stats: Stats) -> Estimate:
        """The sum of the heads' errors, and the time that the backend's slices or tiles are predicted to take."""
        site = find_site(graph, candidate.node)
        before = _dense(site)
        items = stats[site.observed[0]].items
        assert items is not None
        sequences = len(items)
        if sequences < _SEQUENCES:
            text = "calibrated on {} sequence of {} tokens; expected at least {}: give more samples"
            return Estimate(0.0, before, before, refusal=Refusal(text, sequences, site.length, _SEQUENCES))
        chosen = self._chosen(graph, site, candidate, stats)
        pricing: Pricing = candidate.setting["kernel"]
        plan = arranged([found.mode for found in chosen], site.folds)
        work, left = pricing.work(plan.numbers, plan.blocks(site.length)), len(plan.heads) / site.heads
        time = pricing.over_dense(plan.numbers, work) * left
        error = sum(found.error for found in chosen)
        after = replace(before, flops=before.flops * time, bytes=before.bytes * time)
        folded = "their order folded into the projections" if site.folds else "in their order"
        tile = pricing.kernel_for(plan.numbers).tile
        counted = f"in {work.calls} slices" if tile is None else f"in tiles of {tile}"
        share = f"{100 * work.share * left:.0f} % of the work left, {counted}"
        refusal = self._refusal(chosen, share, time, candidate)
        return Estimate(error, before, after, refusal=refusal, detail=f"{described(chosen)}, {folded}; {share}")

    def _refusal(self, chosen: list[Choice], share: str, time: float, of: Candidate) -> Refusal | None:
        hint = "" if self.frames else "; many diagonals were not tried: the layout (frames, height, width) is not given"
        if all(found.mode.name == "full" for found in chosen):
            text = "no head has a pattern that changes the output by at most {:.0e} and takes less time{}"
            return Refusal(text, of.setting["tolerance"], hint)
        if time >= _LEAST_GAIN:
            text = "{}, {}: predicted to take {:.0f} % of the time of dense attention on {} threads{}"
            return Refusal(text, described(chosen), share, 100 * time, of.setting["kernel"].threads, hint)
        return None

    def apply(self, graph: Graph, candidate: Candidate, stats: Stats) -> None:
        """Write one operator for all heads."""
        site = find_site(graph, candidate.node)
        chosen = self._chosen(graph, site, candidate, stats)
        rewrite(graph, site, [found.mode for found in chosen], self.name)

    def _chosen(self, graph: Graph, site: Site, candidate: Candidate, stats: Stats) -> list[Choice]:
        """What each head is, within the tolerance of the candidate."""
        key = (self.name, candidate.node, self.frames, self.height, self.width)
        if key not in stats.cache:
            values = [stats[node].items for node in site.observed]
            q, k, v = (
                site.heads_first(value, operand)
                for value, operand in zip(values, site.operands, strict=True)
                if value is not None
            )
            frame = self.height * self.width or None
            factor, pricing = float(site.view.factor or 0.0), candidate.setting["kernel"]
            stats.cache[key] = choices(q, k, v, factor, site.projection(graph), frame, pricing)
        return cheapest(stats.cache[key], float(candidate.setting["tolerance"]))


def described(chosen: list[Choice]) -> str:
    """`3 heads diagonal, 1 skip, 2 full`."""
    counts = Counter(found.mode.name for found in chosen)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _dense(site: Site) -> Cost:
    """The work of the attention as it is, for one sequence."""
    x = torch.empty(1, site.heads, site.length, site.width, dtype=site.dtype, device="meta")
    return attention.cost_of(x, x, x, None, None, float(site.view.factor or 0.0), 0.0, -1, -1)


