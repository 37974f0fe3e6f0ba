"""8-bit linears with calibrated ranges -> linears on codes, with their activation, residual sum and layer norm.

Between two of them a value is rounded to codes where it is made, so that floats are neither written nor read. Scalings
of channels before a rounding (smoothing) become part of it. The results differ from those of the operators they replace
by rounding: where a value lies near the middle of two codes, it may get the other one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt.ir.builder import constant_before
from fxopt.ir.graph import Graph, label, provenance, shape_of
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.neutral import read
from fxopt.ir.ops.linear_u8s8 import layer_norm_u8, linear_u8s8, quantize_u8
from fxopt.ir.ops.linear_w8a8 import linear_w8a8, linear_w8a8_dynamic
from fxopt.ir.views.common import is_onnx, only_user
from fxopt.ir.views.norm import Norm, norm
from fxopt.passes.base import Context, ExactPass

_EPILOGUE, _RESIDUAL, _GAMMA, _BETA, _EPS = 5, 6, 7, 8, 9  # arguments of linear_u8s8


@dataclass(frozen=True)
class FuseInt8(ExactPass):
    """Compute 8-bit linears on codes, with what follows them."""

    def run(self, graph: Graph, ctx: Context) -> int:
        """Returns how many linears are computed on codes."""
        changes = 0
        made: dict[Any, fx.Node] = {}
        for node in list(graph.calls()):
            if node.target not in (linear_w8a8.target, linear_w8a8_dynamic.target):
                continue
            refusal = _refusal(graph, ctx, node)
            if refusal is None:
                self._on_codes(graph, node, made)
                changes += 1
            else:
                ctx.ledger.add(Verdict(self.name, label(node), "refused", str(refusal)))
        for node in list(graph.calls()):
            if node.target is linear_u8s8.target:
                done = self._with_activation(graph, node)
                if not done:
                    self._with_residual(graph, node)
        for node in list(graph.calls()):
            self._rounded_norm(graph, node)
        if changes:
            graph.prune()
        return changes

    def _call(self, graph: Graph, target: Any, args: tuple[Any, ...], before: fx.Node, like: fx.Node) -> fx.Node:
        return graph.call(target, args, before=before, made_by=self.name, like=like)

    def _const(self, graph: Graph, before: fx.Node, value: torch.Tensor, hint: str) -> fx.Node:
        return constant_before(graph, before, value, hint, (label(before), self.name))

    def _on_codes(self, graph: Graph, node: fx.Node, made: dict[Any, fx.Node]) -> None:
        x, codes, scales, bias, x_scale, zero = node.args
        assert isinstance(x, fx.Node) and isinstance(x_scale, float)
        weights, units = graph.constant(codes), graph.constant(scales)
        assert weights is not None and units is not None
        factor = torch.ones(weights.shape[1], dtype=torch.float64)
        product = read(graph, x, "mul")
        for value, other in (product, product[::-1]) if product is not None else ():
            constant = graph.constant(other)
            if isinstance(value, fx.Node) and constant is not None and constant.shape in (factor.shape, ()):
                x, factor = value, factor * constant.double()
                break
        inverse = (factor / x_scale).float()
        key = (x, inverse.numpy().tobytes(), zero)
        if key not in made:
            constant_node = self._const(graph, node, inverse, f"{label(x)}_inverse")
            made[key] = self._call(graph, quantize_u8.target, (x, constant_node, zero), node, node)
        added = graph.constant(bias)
        if added is None:
            bias = self._const(graph, node, torch.zeros(len(weights)), f"{label(node)}_bias")
        scales = self._const(graph, node, (units.double() * x_scale).float(), f"{label(node)}_scales")
        rest = (zero, "none", None, None, None, 0.0)
        graph.replace(node, self._call(graph, linear_u8s8.target, (made[key], codes, scales, bias, *rest), node, node))

    def _with_activation(self, graph: Graph, node: fx.Node) -> bool:
        user = only_user(node)
        epilogue = None if user is None else _activation(user)
        if user is None or epilogue is None:
            return False
        args = list(node.args)
        args[_EPILOGUE] = epilogue
        graph.replace(user, self._call(graph, linear_u8s8.target, tuple(args), user, node))
        return True

    def _with_residual(self, graph: Graph, node: fx.Node) -> bool:
        total = only_user(node)
        if total is None or not is_onnx(total, "Add", "Sum") or len(total.args) != 2:
            return False
        residual = next((operand for operand in total.args if operand is not node), None)
        if not isinstance(residual, fx.Node) or not _same_shape(residual, total):
            return False
        args = list(node.args)
        args[_EPILOGUE], args[_RESIDUAL] = "residual", residual
        end = total
        view = None if only_user(total) is None else norm(graph, only_user(total))  # type: ignore[arg-type]
        if isinstance(view, Norm) and _is_plain(graph, view):
            end = view.node
            args[_EPILOGUE], args[_GAMMA], args[_BETA], args[_EPS] = (
                "layer_norm", view.weight_node, view.bias_node, view.eps,
            )  # fmt: skip
        shape = str(shape_of(end))
        result = self._call(graph, linear_u8s8.target, tuple(args), end, node)
        result.meta["sums_to"] = shape
        graph.replace(end, result)
        return True

    def _rounded_norm(self, graph: Graph, node: fx.Node) -> None:
        """A layer norm of which nothing but codes is used."""
        view = norm(graph, node)
        if not isinstance(view, Norm) or not _is_plain(graph, view):
            return
        users = list(node.users)
        first = users[0]
        if any(user.target is not quantize_u8.target or user.args[1:] != first.args[1:] for user in users):
            return
        _, inverse, zero = first.args
        args = (view.x, view.weight_node, view.bias_node, view.eps, inverse, zero)
        result = self._call(graph, layer_norm_u8.target, args, first, node)
        for user in users:
            user.replace_all_uses_with(result)
            graph.erase(user)
        result.meta["provenance"] = (*provenance(node), self.name)


def _refusal(graph: Graph, ctx: Context, node: fx.Node) -> Refusal | None:
    excluded = ctx.excluded(label(node))
    if excluded is not None:
        return excluded
    if node.target is linear_w8a8_dynamic.target:
        return Refusal("the range of its input is found at run time")
    weights = graph.constant(node.args[1])
    if weights is None or weights.shape[1] % 4:
        return Refusal("its {} inputs are not a multiple of 4", "unknown" if weights is None else weights.shape[1])
    return None


def _same_shape(value: fx.Node, total: fx.Node) -> bool:
    """Whether a value is of the shape of a sum; one that was fused just now stands for one with a known type."""
    shape, wanted = shape_of(value), shape_of(total)
    if wanted is None:
        return False
    if shape is None and value.target is linear_u8s8.target:
        return value.meta.get("sums_to") == str(wanted)
    return shape is not None and str(shape) == str(wanted)


def _activation(node: fx.Node) -> str | None:
    """The epilogue that computes the node; None when there is none."""
    if is_onnx(node, "Relu"):
        return "relu"
    if is_onnx(node, "Gelu"):
        return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu"
    return "gelu" if is_onnx(node, "Gelu", domain="com.microsoft") else None


def _is_plain(graph: Graph, view: Norm) -> bool:
    """A layer norm over the last axis, in one operator, with constant float32 weight and bias."""
    whole = view.kind == "layer" and view.axes == 1 and is_onnx(view.node, "LayerNormalization")
    if not whole or view.node.kwargs.get("_outputs", 1) != 1:
        return False
    constants = [graph.constant(view.weight_node), graph.constant(view.bias_node)]
    return all(value is not None and value.dtype == torch.float32 for value in constants)
