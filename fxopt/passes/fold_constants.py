"""Compute what depends on constants alone, once and for all.

A folded value keeps its name. It is kept in the model unless it is large and larger than the constants that it makes
unnecessary. Quantized weights stay quantized; random and effectful operators stay, and so do those without a torch
reference. In ONNX graphs a shape that is known although its input is not (`Shape` of a fixed size) is a constant too.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxopt.ir.builder import constant_before
from fxopt.ir.fake_values import same_type
from fxopt.ir.graph import Graph, label, provenance
from fxopt.ir.interpreter import constant_value, evaluate
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.onnx.lane import has_symbol, to_tensor
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.onnx.records import ConstantRecord, NodeRecord
from fxopt.ir.views.common import is_onnx
from fxopt.passes.base import Context, ExactPass
from fxopt.passes.rules.apply import drop_unused, record_once
from fxopt.passes.rules.checks import is_exact_on_sizes
from fxopt.passes.rules.safety import is_pure, is_view, returned

aten = torch.ops.aten
_QUANTIZED = ("DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear")
_BOUNDED = ("NonZero", "Compress", "Unique")  # the size of the result depends on data, but is bounded by the input's
_BOUNDED_TORCH = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default)


@dataclass(frozen=True)
class FoldConstants(ExactPass):
    """Compute what depends on constants alone, once and for all."""

    enters_bodies: ClassVar[bool] = True

    max_bytes: int = 1 << 20  # a larger value is kept only if it is no larger than the constants that it replaces

    def run(self, graph: Graph, ctx: Context) -> int:
        """Evaluate in execution order, then make constants of what other operators use; returns how many."""
        run = _Run(graph, ctx, self.max_bytes, returned(graph))
        with torch.no_grad():
            for node in graph.nodes:
                run.visit(node)
        folded = sum(run.fold(node) for node in list(run.values))
        record_once(ctx, (Verdict(self.name, label(node), "refused", str(why)) for node, why in run.refusals.items()))
        if folded:
            graph.release_constants()
        return folded


@dataclass
class _Run:
    graph: Graph
    ctx: Context
    max_bytes: int
    returned: set[fx.Node]
    values: dict[fx.Node, Any] = field(default_factory=dict)  # of operators, in execution order
    exact: set[fx.Node] = field(default_factory=set)  # ONNX shapes that hold for every size of the inputs
    refusals: dict[fx.Node, Refusal] = field(default_factory=dict)

    # ---- evaluation

    def visit(self, node: fx.Node) -> None:
        """Find the operator's value when it is constant."""
        if node.op != "call_function" or not node.users:
            return
        if not all(self.is_constant(used) for used in node.all_input_nodes):
            self.visit_shape(node)
            return
        if not is_pure(node) or (self.graph.origin == "torch" and self.is_result_or_large_view(node)):
            return
        args = fx.map_arg(node.args, self.value)
        kwargs = fx.map_arg(node.kwargs, self.value)
        reason = self.refused(node) or self.refused_size(node, args, kwargs)
        if reason is None:
            try:
                value = evaluate(self.graph, node, args, kwargs)
            except Exception as error:  # what an operator does not accept here it will not accept at run time either
                reason = Refusal("evaluating it fails: {}: {}", type(error).__name__, str(error).split("\n")[0])
            else:
                if isinstance(value, (torch.Tensor, np.ndarray, tuple)):  # not a sequence
                    self.values[node] = value
        if reason is not None:
            self.refusals[node] = reason

    def visit_shape(self, node: fx.Node) -> None:
        """Take a host value without symbols that was computed from shapes, without comparing symbolic sizes."""
        if self.graph.origin != "onnx":
            return
        if not is_onnx(node, "Shape", "Size"):
            exact = is_exact_on_sizes(node) and bool(node.all_input_nodes)
            if not exact or not all(used in self.exact or self.is_constant(used) for used in node.all_input_nodes):
                return
        self.exact.add(node)
        value = node.meta.get("val")
        if not isinstance(value, np.ndarray) or not same_type(value, node.meta.get("probe", value)):
            return
        if not has_symbol(value) and self.ctx.excluded(label(node)) is None:
            self.values[node] = value

    def is_result_or_large_view(self, node: fx.Node) -> bool:
        """A result is a tensor of its own, and a view costs nothing."""
        return node in self.returned or (is_view(node) and (_bytes(node.meta.get("val")) or 0) > self.max_bytes)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the value is known: evaluated, or a constant with data."""
        if node.op != "get_attr":
            return node in self.values
        constant = self.graph.constant(node)
        return constant is not None and not isinstance(constant, FakeTensor) and not constant.is_meta

    def value(self, node: fx.Node) -> Any:
        """The known value."""
        return self.values[node] if node in self.values else constant_value(self.graph, node)

    # ---- decisions

    def refused(self, node: fx.Node) -> Refusal | None:
        """Why the operator is not evaluated."""
        excluded = self.ctx.excluded(label(node))
        if excluded is not None:
            return excluded
        if isinstance(node.target, OnnxOp) and not node.target.has_reference:
            return Refusal("{} has no torch reference", node.target.op_type)
        if is_onnx(node, *_QUANTIZED) or getattr(node.target, "namespace", "") == "quantized_decomposed":
            return Refusal("a quantized constant stays quantized")
        return None

    def refused_size(self, node: fx.Node, args: Any, kwargs: Any) -> Refusal | None:
        """The refusal of a value that would make the model grow, or whose size cannot be known before."""
        value = node.meta.get("val")
        if node.target is operator.getitem or is_onnx(node, *_BOUNDED) or node.target in _BOUNDED_TORCH:
            return None
        if value is None:
            try:
                with FakeTensorMode(allow_non_fake_inputs=True):
                    value = evaluate(self.graph, node, args, kwargs)
            except Exception:
                return Refusal("the size of its result depends on data")
        size = _bytes(value)
        if size is None or size <= self.max_bytes:
            return None
        own = [used for used in node.all_input_nodes if all(user is node for user in used.users)]
        freed = sum(_bytes(self.value(used)) or 0 for used in own)
        if size <= freed:
            return None
        text = "{} bytes exceed max_bytes={} and the {} bytes that become unnecessary"
        return Refusal(text, size, self.max_bytes, freed)

    # ---- rewriting

    def fold(self, node: fx.Node) -> int:
        """Make a constant of the value when an operator that stays, or the output, uses it."""
        users = [user for user in node.users if user not in self.values]
        value = to_tensor(self.values[node])
        if not users or not isinstance(value, torch.Tensor):
            return 0
        constant = self.constant(node, value.contiguous())
        for user in users:
            user.replace_input_with(node, constant)
        drop_unused(self.graph, [node])
        return 1

    def constant(self, node: fx.Node, value: torch.Tensor) -> fx.Node:
        """The value as a constant, under the name that the operator's value has in the file."""
        made = constant_before(self.graph, node, value, node.name, (*provenance(node), "fold-constants"))
        source, index = node.args if node.target is operator.getitem else (node, 0)
        record = source.meta.get("onnx") if isinstance(source, fx.Node) else None
        if isinstance(record, NodeRecord) and isinstance(index, int) and record.outputs[index]:
            made.meta["onnx"] = ConstantRecord(record.outputs[index], "initializer", None)
        return made


def _bytes(value: Any) -> int | None:
    """The size of a value; None when it is unknown."""
    if isinstance(value, (tuple, list)):
        return sum(_bytes(item) or 0 for item in value)
    if isinstance(value, np.ndarray):
        return int(value.nbytes)
    if not isinstance(value, torch.Tensor) or any(not isinstance(size, int) for size in value.shape):
        return None
    return value.numel() * value.dtype.itemsize
