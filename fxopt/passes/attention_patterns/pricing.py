"""What patterns cost on the backend: the tiles in which it multiplies, and the time of these over dense attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fxopt.ir.ledger import Refusal
from fxopt.ir.ops.attention_pattern import BLOCK, patterns_of
from fxopt.ir.pattern_work import Price, Tile, Work, has_frames, work_of
from fxopt.passes.attention_patterns.site import Site
from fxopt.passes.base import Context

_STEP = 0.02  # of densities that a backend is asked about


@dataclass(frozen=True)
class Kernel:
    """The tile of a kernel (None: slices of dense attention) and what its work costs."""

    tile: Tile | None
    price: Price


@dataclass(frozen=True)
class Pricing:
    """What attention over so many tokens costs, by heads of so much width.

    Attributes:
        kernel: what runs patterns.
        renumbered: what runs them where tokens of a head are renumbered.
        lists: whether lists of blocks are taken.
        threads: on which slices run.
    """

    length: int
    width: int
    kernel: Kernel
    renumbered: Kernel
    lists: bool
    threads: int

    def __str__(self) -> str:
        if self.kernel.tile is None:
            return f"slices on {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"tiles of {self.kernel.tile}"

    def kernel_for(self, patterns: Sequence[int]) -> Kernel:
        """One kernel runs all heads."""
        moves = any(has_frames(pattern, self.length) for pattern in patterns_of(patterns))
        return self.renumbered if moves else self.kernel

    def work(self, patterns: Sequence[int], blocks: Tensor | None = None) -> Work:
        """The work of all heads, in the tiles of the kernel."""
        return work_of(patterns, self.length, blocks, self.kernel_for(patterns).tile)

    def over_dense(self, patterns: Sequence[int], work: Work) -> float:
        """The time of this work over that of as many dense heads."""
        heads = len(patterns_of(patterns))
        return self.kernel_for(patterns).price.over_dense(work, 2.0 * heads * self.length**2 * self.width)


def pricing_of(ctx: Context, site: Site, frames: bool) -> Pricing | Refusal:
    """What the backend says and what was measured of it, or why it has nothing for this attention.

    Args:
        frames: tokens of some heads may be renumbered.
    """
    dtype = str(site.dtype).removeprefix("torch.")
    unsupported = ctx.supports("attention_pattern", dtype)
    kernel = Refusal(unsupported) if unsupported else _kernel(ctx, site, dtype, False)
    if isinstance(kernel, Refusal):
        return kernel
    renumbered = _kernel(ctx, site, dtype, True) if frames else kernel
    if isinstance(renumbered, Refusal):
        renumbered = Kernel(kernel.tile, Price.of_break_even(0.0))
    lists = kernel.tile is None and not ctx.supports("attention_pattern", dtype, f"blocks={BLOCK}")
    return Pricing(site.length, site.width, kernel, renumbered, lists, ctx.target.cores)


def _kernel(ctx: Context, site: Site, dtype: str, renumbered: bool) -> Kernel | Refusal:
    """The kernel, with the break-even that the backend gives, or else with measured prices of slices."""
    asked = f"heads={site.heads},length={site.length},width={site.width},type={dtype}"
    asked += ",renumbered=1" if renumbered else ""
    most, unsupported = 1.0, ""
    while most > 0 and (unsupported := ctx.supports("attention_pattern", dtype, f"{asked},density={most:.2f}")):
        most = round(most - _STEP, 2)
    if most <= 0:
        return Refusal(unsupported)
    tile = ctx.attention_tile(dtype, site.width, renumbered)
    if tile is not None or most < 1.0:
        return Kernel(tile, Price.of_break_even(most))
    return Kernel(None, ctx.attention_price())
