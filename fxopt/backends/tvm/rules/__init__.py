"""How operators become calls of kernels: RULES of each file, by the operator's name without its overload."""

from __future__ import annotations

from fxopt.backends.tvm.lowering import Rule
from fxopt.backends.tvm.rules import arrange, integers, normalise, pointwise, products, spatial

RULES: dict[str, Rule] = {
    **pointwise.RULES, **arrange.RULES, **products.RULES, **normalise.RULES, **spatial.RULES, **integers.RULES,
}  # fmt: skip

__all__ = ["RULES"]
