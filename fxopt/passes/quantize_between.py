"""x (8 bits) -> Add, Mul, Concat, average pooling -> 8 bits  ->  the integer operator, on the levels of its neighbours.

It runs after the plan was applied. Additions, products and concatenations are changed where every operand lies on
8-bit levels and what takes the result is computed in 8 bits too; average pooling where its operand does, for then the
whole operand would be dequantised. A ReLU or clip behind an addition becomes part of it. The levels of the result are
those to which a taker rounds it, else its range on the calibration data (`meta["levels"]`).
Source: Krishnamoorthi (2018), section 3; the operators are QLinearAdd and its like of ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fxopt.ir.graph import Graph, label, tensor_value
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.neutral import read
from fxopt.ir.ops.concat_a8 import concat_a8
from fxopt.ir.ops.elementwise_a8 import add_a8, mul_a8
from fxopt.ir.ops.pool_a8 import average_pool_a8, global_average_pool_a8
from fxopt.ir.views.common import is_onnx
from fxopt.ir.views.eight_bit import Levels, levels, passes_levels_on, saturated, taken, takers, wanted
from fxopt.passes.base import Context, ExactPass


@dataclass(frozen=True)
class QuantizeBetween(ExactPass):
    """Compute additions, products, concatenations and average pooling between 8-bit operators in 8 bits too.

    A graph without 8-bit operators is left as it is.
    """

    def run(self, graph: Graph, ctx: Context) -> int:
        """Returns how many operators became integer ones."""
        ctx.ledger.verdicts[:] = [each for each in ctx.ledger.verdicts if each.pass_name != self.name]
        useful = _useful(graph)
        changes = 0
        for node in list(graph.calls()):
            if not is_between(graph, node):
                continue
            name = label(node)
            found = ctx.excluded(name) or self._rewritten(graph, ctx, node, useful)
            if found is None:
                continue
            if isinstance(found, Refusal):
                ctx.ledger.add(Verdict(self.name, name, "refused", str(found)))
                continue
            changes += 1
            ctx.ledger.add(Verdict(self.name, name, "applied", "its neighbours are computed in 8 bits"))
        return changes

    def _rewritten(self, graph: Graph, ctx: Context, node: fx.Node, useful: set[fx.Node]) -> fx.Node | Refusal | None:
        """The integer operator in the place of `node`; None where no operand is on 8-bit levels."""
        operands = operands_of(node)
        found = [levels(operand) for operand in operands]
        if not any(found):
            return None
        for operand, each in zip(operands, found, strict=True):
            if each is None:
                return Refusal("the operand {} is not computed in 8 bits", label(operand))
        result = saturated(graph, node)
        if not _is_pool(graph, node) and result not in useful:
            return Refusal("what takes its value is not computed in 8 bits")
        pooled = found[0] if _is_pool(graph, node) else None  # means lie in the range of what they are taken of
        given = wanted(result) or result.meta.get("levels") or pooled
        if given is None:
            return Refusal("no range of its value was observed")
        if result is not node and given[1] != 0:
            return Refusal("its ReLU needs levels that start at zero, not at {}", -given[1] * given[0])
        target, args = _operator(graph, node, operands, [each for each in found if each is not None], given)
        unsupported = ctx.supports(target.name().removeprefix("fxopt::"), "int8")
        if unsupported:
            return Refusal(unsupported)
        new = graph.call(target, args, before=result, made_by=self.name, like=node)
        graph.replace(result, new)
        if result is not node:
            graph.erase(node)
        return new


def behind(graph: Graph, node: fx.Node) -> list[fx.Node]:
    """The values that this pass could put on levels, from `node` on: those whose ranges it wants to know."""
    found: dict[fx.Node, None] = {}
    pending = [node]
    while pending:
        for user, _ in takers(pending.pop()):
            result = saturated(graph, user) if is_between(graph, user) else None
            if result is not None and result not in found:
                found[result] = None
                pending.append(result)
    return list(found)


def is_between(graph: Graph, node: fx.Node) -> bool:
    """Whether this pass changes the operator where its neighbours are computed in 8 bits."""
    value = tensor_value(node)
    if value is None or not value.is_floating_point():
        return False
    if is_onnx(node, "Add", "Mul", "Concat"):
        return all(operand.op != "get_attr" for operand in operands_of(node))
    return _is_pool(graph, node)


def _is_pool(graph: Graph, node: fx.Node) -> bool:
    if is_onnx(node, "AveragePool"):
        kwargs: dict[str, Any] = dict(node.kwargs)
        plain = kwargs.get("auto_pad", "NOTSET") == "NOTSET" and not kwargs.get("ceil_mode", 0)
        return plain and len(kwargs["kernel_shape"]) == 2 and set(kwargs.get("dilations") or [1]) == {1}
    return _spatial_mean(graph, node) is not None


def _spatial_mean(graph: Graph, node: fx.Node) -> bool | None:
    """Whether a mean over all spatial axes keeps them; None for everything else."""
    if is_onnx(node, "GlobalAveragePool"):
        return True
    found = read(graph, node, "mean")
    if found is None:
        return None
    _, axes, keeps = found
    value = tensor_value(node)  # that of the operand is not known while it is an operator just made
    if value is None or not isinstance(axes, tuple) or not all(isinstance(axis, int) for axis in axes):
        return None
    rank = value.dim() + (0 if keeps else len(axes))
    return bool(keeps) if rank == 4 and sorted(axis % 4 for axis in axes) == [2, 3] else None


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The values that an operator computes with."""
    count = 2 if is_onnx(node, "Add", "Mul") else len(node.args) if is_onnx(node, "Concat") else 1
    return [value for value in node.args[:count] if isinstance(value, fx.Node)]


def _operator(
    graph: Graph, node: fx.Node, operands: list[fx.Node], found: list[Levels], given: Levels
) -> tuple[Any, tuple[Any, ...]]:
    """The fxopt operator and its arguments."""
    if is_onnx(node, "Concat"):
        axis = node.kwargs["axis"]
        scales, zeros = [scale for scale, _ in found], [zero for _, zero in found]
        return concat_a8.target, (operands, scales, zeros, axis, *given)
    if is_onnx(node, "Add", "Mul"):
        target = add_a8.target if is_onnx(node, "Add") else mul_a8.target
        return target, (*operands, *found[0], *found[1], *given)
    keeps = _spatial_mean(graph, node)
    if keeps is not None:
        return global_average_pool_a8.target, (operands[0], keeps, *found[0], *given)
    kwargs: dict[str, Any] = dict(node.kwargs)
    shape = list(kwargs["kernel_shape"]), list(kwargs.get("strides") or [1, 1]), list(kwargs.get("pads") or [0] * 4)
    return average_pool_a8.target, (operands[0], *shape, bool(kwargs.get("count_include_pad", 0)), *found[0], *given)


def _useful(graph: Graph) -> set[fx.Node]:
    """The values that something computed in 8 bits takes, or something between that is itself useful."""
    found: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if any(_is_useful_to(graph, user, node, found) for user in node.users):
            found.add(node)
    return found


def _is_useful_to(graph: Graph, user: fx.Node, value: fx.Node, useful: set[fx.Node]) -> bool:
    if passes_levels_on(user):
        return user in useful
    if taken(user, value) is not None or _is_pool(graph, user):
        return True
    return is_between(graph, user) and saturated(graph, user) in useful
