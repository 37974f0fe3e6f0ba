"""The walk of dequantize: from inputs to outputs, every integer value becomes QuantizeLinear of a float value.

What takes such a value then takes the float value itself, so that no integer is left where all its takers are known.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxopt.errors import Unsupported
from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.onnx.records import NodeRecord
from fxopt.ir.onnx.references.quantize import dequantize_linear
from fxopt.ir.onnx.registry import Call
from fxopt.ir.views.common import argument, is_onnx
from fxopt.ir.views.eight_bit import passes_levels_on
from fxopt.ir.views.quantized import codes_of, constant_source, evaluated, quantized
from fxopt.passes.base import Context
from fxopt.passes.dequantize.clipping import clipped
from fxopt.passes.dequantize.operators import FLOAT_FORMS, Made
from fxopt.passes.rules.apply import record_once

_MOVING = ("Expand", "Tile", "DepthToSpace", "SpaceToDepth")  # beside those of `passes_levels_on`
_PER_AXIS = 13  # the opset since which DequantizeLinear takes scales per axis


@dataclass
class Walk:
    """One run of the pass on one graph."""

    graph: Graph
    ctx: Context
    name: str
    weights: bool
    activations: bool
    clip: str
    verdicts: list[Verdict] = field(default_factory=list)
    values: dict[Hashable, fx.Node] = field(default_factory=dict)  # what was made, by what it is made of
    at: fx.Node | None = None  # before which nodes are made

    def run(self) -> int:
        """Returns how many operators changed."""
        before = set(self.graph.nodes)
        changes = sum(self.visit(node) for node in list(self.graph.calls()))
        record_once(self.ctx, self.verdicts)
        if changes:
            self.graph.prune()
            return changes
        for node in reversed(list(self.graph.nodes)):  # parts of forms that were refused
            if node not in before and not node.users:
                self.graph.erase(node)
        return 0

    def visit(self, node: fx.Node) -> int:
        """Make a float operator of an integer one, or a float value of a dequantised one."""
        if is_onnx(node, "DequantizeLinear") or is_onnx(node, "DequantizeLinear", domain="com.microsoft"):
            return self.dequantize_linear(node)
        form = FLOAT_FORMS.get((getattr(node.target, "domain", ""), getattr(node.target, "op_type", "")))
        if form is None:
            found = quantized(self.graph, node)
            if found is not None and found.form != "QDQ":
                self.refuse(node, Refusal("{} has no float form", found.form))
            return 0
        excluded = self.ctx.excluded(label(node))
        if excluded is not None:
            return self.refuse(node, excluded)
        self.at = node
        builder = Builder(self.graph, node, self.name)
        text = str(quantized(self.graph, node) or "integers")
        try:
            made = form(self, builder, node)
            self.put(builder, node, made)
        except Unsupported as error:
            builder.discard()
            return self.refuse(node, Refusal("{}", error))
        return self.accept(node, f"a float operator now; was: {text}")

    def put(self, builder: Builder, node: fx.Node, made: Made) -> None:
        """The float value in the place of the integer one, quantised for those that still take integers."""
        value = made.value
        value.meta.setdefault("onnx", NodeRecord(label(node), ()))
        if made.scale is None:
            self.graph.replace(made.replaces or node, value)
            return
        zero = made.zero
        if zero is None:
            dtype = builder.dtype(node.args[0])
            if dtype is None:
                raise Unsupported("it has no zero point of its result, and its element type is unknown")
            zero = builder.const(torch.zeros((), dtype=dtype), f"{label(node)}_zero")
        self.graph.replace(node, builder.onnx("QuantizeLinear", value, made.scale, zero))

    # ---- values

    def dequantize_linear(self, node: fx.Node) -> int:
        """A constant, or the float value before the QuantizeLinear that it undoes."""
        codes, scale, zero = (argument(node, place) for place in range(3))
        users = [user for user in node.users if user.op != "output"] or [node]
        excluded = next(filter(None, (self.ctx.excluded(label(user)) for user in users)), None)
        if excluded is not None:
            return self.refuse(node, excluded)
        self.at = node
        constant = self.constant(codes, scale, zero, node)
        value = constant or self.float_of(codes, scale, zero)
        if isinstance(value, fx.Node):
            self.graph.replace(node, value)
            return self.accept(node, "a float constant now" if constant else "the value before QuantizeLinear now")
        is_constant = constant_source(self.graph, codes) is not None
        if (is_constant and self.weights) or (not is_constant and self.activations):
            self.refuse(node, value)
        return 0

    def real(self, codes: Any, scale: Any, zero: Any, axis: int = 1) -> fx.Node:
        """scale * (codes - zero) as a node before the operator that is visited: an operand of its float form.

        Raises:
            Unsupported: it has no form at the model's opset.
        """
        builder = self.builder()
        known = self.constant(codes, scale, zero, None, axis) or self.float_of(codes, scale, zero)
        if isinstance(known, fx.Node):
            return known
        count = self.count(scale)
        if count != 1 and builder.opset < _PER_AXIS:
            raise Unsupported(f"opset {builder.opset} has no DequantizeLinear with {count} scales")
        extra = {} if count == 1 else {"axis": axis}
        return builder.onnx("DequantizeLinear", codes, scale, *(() if zero is None else (zero,)), _like=scale, **extra)

    def constant(self, codes: Any, scale: Any, zero: Any, node: fx.Node | None, axis: int = 1) -> fx.Node | None:
        """The float constant of constant codes; `node` is the DequantizeLinear that says how, else `axis` does."""
        if not self.weights:
            return None
        parts = [evaluated(self.graph, codes), codes_of(self.graph, scale), codes_of(self.graph, zero)]
        if parts[0] is None or parts[1] is None or (zero is not None and parts[2] is None):
            return None
        options = dict(node.kwargs) if node is not None else {"axis": axis}
        key = (codes, scale, zero, str(sorted(options.items())))
        if key not in self.values:
            value = dequantize_linear(Call(21), *parts, **options)
            self.values[key] = self.builder().const(value, f"{label(codes)}_dequantized")
        return self.values[key]

    def float_of(self, codes: Any, scale: Any, zero: Any) -> fx.Node | Refusal:
        """The float value that was quantised to these codes (or that constant ones stand for), moved like them."""
        moves = []
        while (passes_levels_on(codes) or is_onnx(codes, *_MOVING)) and "_outputs" not in codes.kwargs:
            moves.append(codes)
            codes = codes.args[0]
        value = self.origin(codes, scale, zero, bool(moves))
        if isinstance(value, Refusal):
            return value
        for move in reversed(moves):
            key = ("moved", move, value)
            if key not in self.values:
                arguments = (value, *move.args[1:])
                assert self.at is not None
                self.values[key] = self.graph.call(
                    move.target, arguments, dict(move.kwargs), before=self.at, made_by=self.name, like=move
                )
            value = self.values[key]
        return value

    def origin(self, codes: Any, scale: Any, zero: Any, moved: bool) -> fx.Node | Refusal:
        """The float value before anything moved the codes."""
        if constant_source(self.graph, codes) is not None:
            if not self.weights:
                return Refusal("weights=False keeps its codes")
            if moved and self.count(scale) > 1:
                return Refusal("its constant codes are moved, and have {} scales", self.count(scale))
            return self.constant(codes, scale, zero, None) or Refusal("its scale or zero point is computed at run time")
        if not is_onnx(codes, "QuantizeLinear"):
            return Refusal("its codes come from {}, not from QuantizeLinear", _source(codes))
        if not self.activations:
            return Refusal("activations=False keeps it")
        if not self.same(scale, argument(codes, 1)) or not self.same(zero, argument(codes, 2)):
            return Refusal("its scale or zero point is another than that of the QuantizeLinear before it")
        if any(value is not None and self.graph.constant(value) is None for value in (scale, zero)):
            return Refusal("its range is computed at run time, so what it cuts off is unknown")
        return self.unrounded(codes)

    def unrounded(self, node: fx.Node) -> fx.Node:
        """The operand of QuantizeLinear, with what its range cut off on purpose."""
        if ("unrounded", node) not in self.values:
            value, text = clipped(self.graph, Builder(self.graph, node, self.name), node, self.clip)
            self.values["unrounded", node] = value
            self.verdicts.append(Verdict(self.name, label(node), "applied", f"its value is no longer rounded{text}"))
        return self.values["unrounded", node]

    # ---- helpers

    def builder(self) -> Builder:
        """Makes nodes before the operator that is visited."""
        assert self.at is not None
        return Builder(self.graph, self.at, self.name)

    def count(self, scale: Any) -> int:
        """Elements of a constant scale; those that are computed count as one."""
        constant = self.graph.constant(scale)
        return 1 if constant is None else constant.numel()

    def same(self, one: Any, other: Any) -> bool:
        """Whether two scales or zero points are equal; a missing zero point is 0."""
        if one is other:
            return True
        first, second = (torch.zeros(()) if value is None else self.graph.constant(value) for value in (one, other))
        if first is None or second is None:
            return False
        return torch.equal(first.reshape(-1).double(), second.reshape(-1).double())

    def accept(self, node: fx.Node, reason: str) -> int:
        """Write that an operator changed."""
        self.verdicts.append(Verdict(self.name, label(node), "applied", reason))
        return 1

    def refuse(self, node: fx.Node, reason: Refusal) -> int:
        """Write why an operator stays."""
        self.verdicts.append(Verdict(self.name, label(node), "refused", str(reason)))
        return 0


def _source(codes: Any) -> str:
    if not isinstance(codes, fx.Node) or codes.op != "call_function":
        return "an input of the graph"
    return f"{getattr(codes.target, 'op_type', codes.target)} {label(codes)!r}"
