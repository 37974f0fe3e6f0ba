"""Remove operators that give back what they got, and pairs that undo each other.

Everything is exact to the bit. `x + 0.0` is not (it turns -0.0 into 0.0) and stays unless `signed_zeros=false`. In
torch graphs a copy stays where a result would share memory with an input or constant, or where the strides change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.ir.graph import Graph
from fxopt.ir.pattern import Rule
from fxopt.passes.base import Context, ExactPass
from fxopt.passes.rules.apply import apply_rules
from fxopt.passes.rules.collapse_casts import CollapseCasts
from fxopt.passes.rules.collapse_reshapes import CollapseReshapes
from fxopt.passes.rules.collapse_transposes import CollapseTransposes
from fxopt.passes.rules.drop_empty_pad import DropEmptyPad
from fxopt.passes.rules.drop_full_slice import DropFullSlice
from fxopt.passes.rules.drop_identity import DropIdentity
from fxopt.passes.rules.drop_identity_transpose import DropIdentityTranspose
from fxopt.passes.rules.drop_positive_zero import DropPositiveZero
from fxopt.passes.rules.drop_same_cast import DropSameCast
from fxopt.passes.rules.drop_same_shape import DropSameShape
from fxopt.passes.rules.drop_squeeze_pair import DropSqueezePair
from fxopt.passes.rules.drop_unit_factor import DropUnitFactor
from fxopt.passes.rules.drop_zero_term import DropZeroTerm


@dataclass(frozen=True)
class RemoveIdentities(ExactPass):
    """Remove operators that give back what they got."""

    enters_bodies: ClassVar[bool] = True

    signed_zeros: bool = True  # False: x + 0.0 goes too, although it turns -0.0 into 0.0

    def rules(self) -> tuple[Rule, ...]:
        """In the order in which they are tried."""
        return (
            DropIdentity(),
            DropSameCast(),
            CollapseCasts(),
            DropUnitFactor(),
            DropZeroTerm(),
            DropPositiveZero(self.signed_zeros),
            DropIdentityTranspose(),  # before the collapse, which leaves one less to look at
            CollapseTransposes(),
            DropSameShape(),
            CollapseReshapes(),
            DropSqueezePair(),
            DropFullSlice(),
            DropEmptyPad(),
        )

    def run(self, graph: Graph, ctx: Context) -> int:
        """Apply the rules until nothing changes."""
        return apply_rules(graph, self.rules(), ctx, made_by=self.name)
