"""Permute channels so that a pattern of zeros keeps more importance: the graph computes the same, whatever the order.

Rows of a weight that share their zeros (4x1 blocks, N:M shared by outputs) lose least when their important inputs are
the same; of N:M, neighbouring inputs should not be important together. So the channels between operators are put into
an order in which that is so: rows of the producers, biases, vectors of norms, columns of the consumers, and the
residual sums that tie layers together move alike (`fxopt.ir.tied`); the width of attention heads moves inside each
head. Sources: the whole-network rearrangement of SparseByteNN (2023), whose order is not published: this one is greedy,
by the overlap of kept sets, then improved by swaps, as in Pool and Yu, "Channel Permutations for N:M Sparsity" (2021).
"""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.errors import InvalidOption
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.sparsity import Pattern
from fxopt.passes.base import Context, ExactPass
from fxopt.passes.rearrange_channels.channels import Channels, Weight
from fxopt.passes.rearrange_channels.rearrange import Importance, Rearranged, rearrange
from fxopt.passes.rules.apply import record_once

__all__ = ["Importance", "RearrangeChannels", "Rearranged", "rearrange"]


@dataclass(frozen=True)
class RearrangeChannels(ExactPass):
    """Permute channels so that blocks of weights become important or unimportant together; before sparsify.

    Options:
        pattern: the pattern of zeros that is going to be made, such as 4x1, 8x1, 2:4 or 8x2:4.
        sparsity: the share of blocks that will be zero; N:M has its own.
    """

    pattern: str = "4x1"
    sparsity: float = 0.7

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        if not 0 < self.sparsity < 1:
            raise InvalidOption(f"rearrange-channels: sparsity={self.sparsity}; expected more than 0 and less than 1")

    def run(self, graph: Graph, ctx: Context) -> int:
        """Rearrange by the magnitude of weights, once; returns how many groups of channels were."""
        done = ctx.notes.setdefault(self.name, set())
        if (str(self), ctx.where) in done:
            return 0  # another search would find another order, and so on
        done.add((str(self), ctx.where))
        pattern = Pattern.parse(self.pattern)
        found = rearrange(
            graph, pattern, self.sparsity, refuses=lambda made, held: _excluded(ctx, held), made_by=self.name
        )
        text = self.pattern if pattern.is_counted else f"{self.pattern} at {self.sparsity:.0%}"
        record_once(ctx, [_verdict(self.name, each, text) for each in found])
        return sum(each.refusal is None for each in found)


def _excluded(ctx: Context, held: list[Weight]) -> Refusal | None:
    names = (label(view.node) for weight in held for view in weight.views)
    return next(filter(None, map(ctx.excluded, names)), None)


def _verdict(name: str, found: Rearranged, text: str) -> Verdict:
    made: Channels = found.channels
    if found.refusal is not None:
        return Verdict(name, made.name, "refused", f"{made.size} channels: {found.refusal}")
    why = f"{made.size} channels: {text} keeps {found.after:.1%} of the importance, {found.before:.1%} before"
    return Verdict(name, made.name, "applied", why)
