"""`Seen`: which keys a query sees."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Seen:
    """The keys from `left` before to `right` after a query's position (None: to the end), of its block, not of padding.

    Attributes:
        blocks: sizes of blocks along the diagonal, of which a query sees its own; () when they are known at run time.
        is_padding: some keys are hidden from all queries of a row of the batch.
        is_general: keys are hidden in some other way, or scores are changed.
    """

    left: int | None = None
    right: int | None = None
    blocks: tuple[int, ...] | None = None
    is_padding: bool = False
    is_general: bool = False

    def both(self, other: Seen) -> Seen:
        """What both see."""
        known = [blocks for blocks in (self.blocks, other.blocks) if blocks is not None]
        mixed = len(known) == 2 and known[0] != known[1]
        return Seen(
            _least(self.left, other.left),
            _least(self.right, other.right),
            known[0] if known else None,
            self.is_padding or other.is_padding,
            self.is_general or other.is_general or mixed,
        )

    @property
    def is_window(self) -> bool:
        """Whether nothing but the distance from the query counts."""
        return self.blocks is None and not self.is_padding and not self.is_general

    @property
    def kind(self) -> str:
        """The names of what hides, joined by " + "; "none" when nothing does."""
        if self.is_general:
            return "general"
        names = []
        if self.right == 0 and self.left is None:
            names.append("causal")
        elif self.left is not None or self.right is not None:
            names.append("banded")
        if self.blocks is not None:
            names.append("block-diagonal")
        if self.is_padding:
            names.append("padding")
        return " + ".join(names) or "none"


def _least(one: int | None, two: int | None) -> int | None:
    return one if two is None else two if one is None else min(one, two)
