"""How operators become calls of kernels: RULES of each file, by the operator's name without its overload."""

from __future__ import annotations

from fxopt.backends.tvm.lowering import Rule
from fxopt.backends.tvm.rules import (
    arrange,
    eight_bit,
    functions,
    integers,
    lookup,
    normalise,
    pointwise,
    products,
    scans,
    spatial,
    transposed,
)

# Of one name in two files, the later one counts; it falls back to the other itself.
RULES: dict[str, Rule] = {
    **pointwise.RULES, **arrange.RULES, **products.RULES, **normalise.RULES, **spatial.RULES, **integers.RULES,
    **eight_bit.RULES, **functions.RULES, **lookup.RULES, **scans.RULES, **transposed.RULES,
}  # fmt: skip

__all__ = ["RULES"]
