"""Why a layer is left dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Refusal
from fxopt.ir.masks import mark_of
from fxopt.ir.sparsity import Pattern
from fxopt.ir.views.quantized import quantized
from fxopt.passes.base import Context
from fxopt.passes.quantize_linear.common import unfit as unfit_weight
from fxopt.passes.sparsify.layer import Layer, is_head

_FEW = 0.01  # share of zeros that a weight has by chance
_TINY = 1e-9


def unfit(graph: Graph, ctx: Context, layer: Layer, users: Mapping[fx.Node, list[fx.Node]]) -> Refusal | None:
    """Why no pattern is offered.

    Args:
        users: what uses the data of each constant.
    """
    already = quantized(graph, layer.node)
    if already is not None:
        return Refusal("quantised already: {}; sparsify comes before, the pass dequantize makes floats of it", already)
    refusal = unfit_weight(graph, ctx, layer.view)
    if refusal is not None:
        return refusal
    if not all(isinstance(node.meta.get("val"), Tensor) for node in (layer.x, layer.node)):
        return Refusal("the type of its input {} or of its result is not known", label(layer.x))
    others = [user for user in users[layer.view.weight_node] if user not in _own(layer)]
    if others:
        return Refusal("its weight is tied: {} uses it too and would lose weights", label(others[0]))
    if is_head(graph, layer) and ctx.include is None:
        return Refusal("its value is an output of the model: heads stay dense unless --include names them")
    return None


def _own(layer: Layer) -> set[fx.Node]:
    """The nodes of the view, and what transposes its weight."""
    inner = {layer.node, *getattr(layer.view, "inner", ())}
    return inner | {used for node in inner for used in node.all_input_nodes if len(used.users) == 1}


def unfit_pattern(graph: Graph, layer: Layer, pattern: Pattern, share: float) -> Refusal | None:
    """Why the weight cannot have this pattern, or has zeros that it would undo."""
    weight = layer.weight(graph)
    refusal = pattern.refusal(*weight.shape)
    if refusal:
        return Refusal(refusal)
    mark = mark_of(layer.node)
    if mark is not None and mark.pattern != pattern:
        return Refusal("its weight has the pattern {} already, which {} would break", mark.pattern, pattern)
    if mark is not None and mark.zeros >= share - _FEW:
        return Refusal("its weight has the pattern {} already, with {:.0%} zeros", mark.pattern, mark.zeros)
    zeros = float((weight == 0).double().mean())
    if zeros > share + _FEW and not has_already(weight, pattern, share):
        return Refusal("{:.0%} of its weights are zero already, not as {}, which would fill some", zeros, pattern)
    return None


def unfit_beside(layer: Layer, weight: Tensor, setting: Mapping[str, Any]) -> Refusal | None:
    """Why no matrices are put beside the sparse weight, where the setting wants them."""
    if layer.is_conv and ("rank" in setting or "block" in setting):
        return Refusal("thin and block-diagonal matrices are put beside linears, not convolutions")
    if setting.get("rank") == 0:
        return Refusal("a rank of 1 has more than the asked share of the parameters of a weight {}x{}", *weight.shape)
    block = setting.get("block", 1)
    if any(size % block for size in weight.shape):
        return Refusal("{}x{} does not divide into blocks of {}; try another block", *weight.shape, block)
    if "block" in setting and block % Pattern.parse(setting["pattern"]).of:
        return Refusal("blocks of {} cut through the groups of {}", block, setting["pattern"])
    return None


def has_already(weight: Tensor, pattern: Pattern, share: float) -> bool:
    """Whether the weight came with such zeros."""
    if pattern.is_counted:
        return not pattern.violation(weight)
    return pattern.zeros(weight) >= share - _TINY
