"""How operators become calls of kernels: RULES of each file, by the operator's name without its overload."""

from __future__ import annotations

from fxopt.backends.tvm.lowering import Rule
from fxopt.backends.tvm.rules import arrange, eight_bit, integers, normalise, pointwise, products, spatial

RULES: dict[str, Rule] = {
    **pointwise.RULES, **arrange.RULES, **products.RULES, **normalise.RULES, **spatial.RULES, **integers.RULES,
    **eight_bit.RULES,
}  # fmt: skip

__all__ = ["RULES"]
