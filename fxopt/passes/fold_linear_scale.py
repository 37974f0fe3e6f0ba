"""linear(x) * c -> linear(x) with scales * c and bias * c, also where attention lies between them.

The value of attention is linear in each feature of v, so a factor per feature of the result is one of v. Factors are
computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fxopt.ir.builder import constant_before
from fxopt.ir.graph import Graph, label, provenance
from fxopt.ir.neutral import read
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.views.common import is_onnx, only_user
from fxopt.ir.views.linear import Linear, linear
from fxopt.passes.base import Context, ExactPass

_OPERATORS = (linear_w8a8.target, linear_w8a8_dynamic.target)
_SCALES, _BIAS = 2, 3  # arguments of these operators


@dataclass(frozen=True)
class FoldLinearScale(ExactPass):
    """Fold a constant factor per feature into the 8-bit linear before it."""

    def run(self, graph: Graph, ctx: Context) -> int:
        """Returns how many factors were folded."""
        changes = 0
        for node in list(graph.calls()):
            product = read(graph, node, "mul")
            for value, constant in (product, product[::-1]) if product is not None else ():
                factor = graph.constant(constant)
                source = _source(value, node)
                if factor is None or source is None or source.target not in _OPERATORS:
                    continue
                scales = graph.constant(source.args[_SCALES])
                if scales is None or factor.shape != scales.shape or ctx.excluded(label(node)) is not None:
                    continue
                self._absorb(graph, source, factor)
                graph.replace(node, value)
                changes += 1
                break
        if changes:
            graph.prune()
        return changes

    def _absorb(self, graph: Graph, source: fx.Node, factor: torch.Tensor) -> None:
        for index in (_SCALES, _BIAS):
            old = source.args[index]
            value = graph.constant(old)
            if not isinstance(old, fx.Node) or value is None:
                continue
            product = (value.double() * factor.double()).to(value.dtype)
            source.update_arg(index, constant_before(graph, source, product, label(old), (*provenance(old), self.name)))
        source.meta["provenance"] = (*provenance(source), self.name)


def can_absorb(graph: Graph, value: fx.Node) -> bool:
    """Whether a factor of `value`, the input of a linear, can be folded when the linear before it has 8 bits."""
    user = only_user(value)
    source = None if user is None else _source(value, user)
    return source is not None and source is not value and isinstance(linear(graph, source), Linear)


def _source(value: object, user: fx.Node) -> fx.Node | None:
    """The node whose features are those of `value`, used for nothing else: below attention, its v."""
    if not isinstance(value, fx.Node) or only_user(value) is not user:
        return None
    if not is_onnx(value, "Attention"):
        return value
    options = value.kwargs
    v = value.args[2]
    is_plain = options.get("q_num_heads") is not None and options.get("q_num_heads") == options.get("kv_num_heads")
    if not is_plain or options.get("_outputs", 1) != 1 or not isinstance(v, fx.Node) or only_user(v) is not value:
        return None
    return v
