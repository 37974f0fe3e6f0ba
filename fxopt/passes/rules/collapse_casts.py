"""A cast to a type that holds every value, and another cast after it."""

from __future__ import annotations

import torch
from torch import fx

from fxopt.ir.pattern import Builder, Match, Mismatch, OpNames, P, Refusal, Rule

_WIDER: dict[torch.dtype, tuple[torch.dtype, ...]] = {  # types that hold every value exactly
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
    torch.int8: (torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    torch.uint8: (torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    torch.int16: (torch.int32, torch.int64, torch.float32, torch.float64),
    torch.int32: (torch.int64, torch.float64),
}


class CollapseCasts(Rule):
    """cast(cast(x, wide), dtype)  ->  cast(x, dtype)"""

    shares_inner = True

    def pattern(self, op: OpNames, /, x: P, wide: P, dtype: P) -> P:
        """Two casts, one after the other."""
        return op.cast(op.cast(x, wide), dtype)

    def check(self, match: Match, /, x: fx.Node, wide: torch.dtype, dtype: torch.dtype) -> Refusal | None:
        """The first cast loses nothing, and the direct cast treats what does not fit in the same way."""
        given = match.dtype(x)
        if given is None:
            return Mismatch("the element type of {} is unknown", x)
        if given == wide:
            return None
        if wide not in _WIDER.get(given, ()):
            return Mismatch("the cast from {} to {} loses digits", given, wide)
        integers = not any(each.is_floating_point for each in (given, wide, dtype))
        if given == dtype or dtype.is_floating_point or integers:
            return None
        return Mismatch("a cast from {} to {} may treat what does not fit in another way", given, dtype)

    def replace(self, b: Builder, /, x: fx.Node, wide: torch.dtype, dtype: torch.dtype) -> fx.Node:
        """x, or one cast"""
        return x if b.dtype(x) == dtype else b.cast(x, dtype)
