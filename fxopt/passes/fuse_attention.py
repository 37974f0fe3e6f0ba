"""softmax(q @ k.T * scale + mask) @ v in its parts -> the operator `Attention`, where the backend runs it faster.

Rows of which a mask hides every key keep their meaning: with hidden scores of minus infinity `Attention` gives 0 for
them, as the replacement of NaN by 0 does; with large negative ones, the mean of v, if these are not so large that
backends take them for minus infinity: they are replaced by -1e30, which hides a key as well.

Where the heads were only separated for the product, q, k and v are taken as [batch, length, heads * width], and nothing
is transposed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label, shape_of, tensor_value
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.neutral import read
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.views.attention import Attention, attentions
from fxopt.ir.views.common import only_user, scalar_constant
from fxopt.passes.base import Context, ExactPass

_OPSETS = (23, 24)  # in which backends have a kernel for Attention
_HIDDEN = -1e30  # hides a key: the exponential of its distance to any other score is 0
_HEADS_FIRST, _K_TRANSPOSED = (0, 2, 1, 3), (0, 2, 3, 1)


@dataclass(frozen=True)
class _Mask:
    """What a mask does: nothing, hide later keys, hide keys (`value` is true where it keeps or hides), or be added.

    `hidden` is the score that a boolean one gives where it hides.
    """

    kind: Literal["none", "causal", "boolean", "added"]
    value: fx.Node | torch.Tensor | None = None
    keeps: bool = True
    hidden: float = -math.inf


@dataclass(frozen=True)
class _Plan:
    """One attention that can be fused; q, k and v as they are taken."""

    view: Attention
    mask: _Mask
    q: fx.Node
    k: fx.Node
    v: fx.Node
    is_flat: bool
    heads: int


@dataclass(frozen=True)
class FuseAttention(ExactPass):
    """Write attention that is spelled out as the one operator that the backend runs faster."""

    def opset(self, graph: Graph, ctx: Context) -> int:
        """The version of the ONNX standard that fusing needs."""
        if graph.origin != "onnx" or _opset(graph) >= _OPSETS[0]:
            return 0
        can = any(isinstance(planned(graph, view, ctx), _Plan) for view in attentions(graph))
        return _OPSETS[0] if can else 0

    def run(self, graph: Graph, ctx: Context) -> int:
        """Returns how many attentions were fused."""
        if graph.origin != "onnx":
            return 0
        changes = 0
        masks: dict[Any, fx.Node] = {}
        for view in list(attentions(graph)):
            if isinstance(view, Attention) and view.kind != "spelled-out":
                continue
            plan = planned(graph, view, ctx)
            if isinstance(plan, _Plan) and _opset(graph) not in _OPSETS:
                plan = Refusal("Attention has a fast kernel at opsets 23 and 24; the model has {}", _opset(graph))
            if isinstance(plan, _Plan):
                _fuse(graph, plan, masks, self.name)
                changes += 1
            else:
                node = view.node if isinstance(view, Attention) else view[0]
                verdict = Verdict(self.name, label(node), "refused", str(plan))
                if verdict not in ctx.ledger.verdicts:
                    ctx.ledger.add(verdict)
        if changes:
            graph.prune()
        return changes


def planned(graph: Graph, view: Attention | tuple[fx.Node, Refusal], ctx: Context) -> _Plan | Refusal:
    """How an attention is fused, or why it is not."""
    if not isinstance(view, Attention):
        return view[1]
    if view.kind != "spelled-out":
        return Refusal("it is one operator already")
    excluded = ctx.excluded(label(view.node))
    if excluded is not None:
        return excluded
    value, scale = tensor_value(view.q), view.factor
    if value is None or scale is None:
        return Refusal("the type of its query is unknown")
    unsupported = ctx.supports("Attention", str(value.dtype).removeprefix("torch."))
    if unsupported:
        return Refusal(unsupported)
    if view.softcap:
        return Refusal("its scores are bounded by a soft cap of {}", view.softcap)
    mask = _mask(graph, view)
    return mask if isinstance(mask, Refusal) else _operands(graph, view, mask)


def _opset(graph: Graph) -> int:
    return 0 if graph.model is None else int(graph.model.opsets.get("", 0))


# ---- masks


def _mask(graph: Graph, view: Attention) -> _Mask | Refusal:
    if view.mask is None:
        return _Mask("none")
    constant = graph.constant(view.mask)
    if constant is not None:
        return _constant_mask(view, constant)
    if view.mask_is_boolean:
        return _defined(view, _Mask("boolean", view.mask, view.mask_keeps, _replacing(view)))
    choice: Any = read(graph, view.mask, "where")
    numbers = [] if choice is None else [scalar_constant(graph, value) for value in choice[1:]]
    known = [value for value in numbers if value is not None]
    if choice is not None and len(known) == 2 and max(known) == 0.0:
        return _defined(view, _Mask("boolean", choice[0], known[0] == 0.0, min(known)))
    if view.nan_to_zero:
        return Refusal("its mask {} is computed, so that it is unknown whether rows without keys give 0", view.mask)
    return _Mask("added", view.mask)


def _defined(view: Attention, mask: _Mask) -> _Mask | Refusal:
    if mask.hidden == -math.inf and not view.nan_to_zero:
        return Refusal("its mask {} may leave rows without keys, which are NaN and would become 0", view.mask)
    return mask


def _replacing(view: Attention) -> float:
    """What a boolean mask puts in the place of hidden scores; where that is finite, rows without keys get the mean."""
    return -math.inf if view.hidden in (None, -math.inf) else _HIDDEN


def _constant_mask(view: Attention, value: torch.Tensor) -> _Mask | Refusal:
    """A constant mask is taken as what it does."""
    if value.dtype == torch.bool:
        value = torch.zeros(value.shape).masked_fill(~value if view.mask_keeps else value, _replacing(view))
    if bool((value == 0).all()):
        return _Mask("none")
    if not bool(value.isfinite().any(-1).all()) and not view.nan_to_zero:
        return Refusal("its mask hides every key of some rows")
    length = value.shape[-1]
    hides = value <= _HIDDEN
    has_keys = not bool(hides.all(-1).any())
    if value.shape[-2:] == (length, length) and has_keys:
        later = torch.ones(length, length).triu(1).bool()
        if bool(((value == 0) == ~later).all()) and bool((hides == later).all()):
            return _Mask("causal")
    if bool(((value == 0) | hides).all()) and (has_keys or bool(value[hides].isinf().all())):
        return _Mask("boolean", ~hides)
    if bool(value.isinf().all(-1).any()):
        return Refusal("its mask mixes rows without keys with finite numbers")
    return _Mask("added", value.clamp(min=_HIDDEN))


# ---- operands


def _operands(graph: Graph, view: Attention, mask: _Mask) -> _Plan | Refusal:
    shapes = [shape_of(value) for value in (view.q, view.k, view.v)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return Refusal("its operands are not of the form [batch, heads, length, width]")
    (q, k, v) = (tuple(map(str, shape or ())) for shape in shapes)
    if view.k_transposed:
        k = (*k[:2], k[3], k[2])
    if q[:2] != k[:2] or k[:3] != v[:3]:
        return Refusal("its operands differ in batch or heads: {}, {}, {}", q, k, v)
    if not q[1].isdigit() or not q[3].isdigit():
        return Refusal("the number or the width of its heads is known at run time only")
    shape = tuple(mask.value.shape) if isinstance(mask.value, torch.Tensor) else shape_of(mask.value)
    if mask.value is None:
        shape = ()
    if shape is None or len(shape) == 3 or len(shape) == 1 or len(shape) > 4:
        return Refusal("the shape of its mask, {}, is not [batch, heads, length, keys]", shape)
    if mask.kind == "causal" and q[2] != k[2]:
        return Refusal("its causal mask is of another length than its keys")
    k_order = _K_TRANSPOSED if view.k_transposed else _HEADS_FIRST
    orders = ((view.q, _HEADS_FIRST), (view.k, k_order), (view.v, _HEADS_FIRST))
    flat = [_merged(graph, value, order) for value, order in orders]
    merged = [value for value in flat if value is not None]
    if len(merged) == 3:
        return _Plan(view, mask, merged[0], merged[1], merged[2], is_flat=True, heads=int(q[1]))
    return _Plan(view, mask, view.q, view.k, view.v, is_flat=False, heads=int(q[1]))


def _merged(graph: Graph, value: fx.Node, perm: tuple[int, ...]) -> fx.Node | None:
    """x [batch, length, heads * width] when the value is transpose(reshape(x, [batch, length, heads, width]))."""
    turned = read(graph, value, "transpose")
    split = None if turned is None or tuple(turned[1]) != perm else read(graph, turned[0], "reshape")
    if turned is None or split is None or not isinstance(split[0], fx.Node):
        return None
    inner, outer = shape_of(split[0]), shape_of(turned[0])
    if inner is None or outer is None or len(inner) != 3 or len(outer) != 4:
        return None
    same = list(map(str, inner[:2])) == list(map(str, outer[:2]))
    whole = all(isinstance(size, int) for size in (inner[2], *outer[2:])) and inner[2] == outer[2] * outer[3]
    return split[0] if same and whole else None


# ---- rewriting


def _fuse(graph: Graph, plan: _Plan, masks: dict[Any, fx.Node], name: str) -> None:
    view = plan.view
    b = Builder(graph, view.node, name)
    mask = _mask_node(b, plan, masks)
    k = b.transpose(plan.k, (0, 1, 3, 2)) if view.k_transposed and not plan.is_flat else plan.k
    options: dict[str, Any] = {"scale": view.factor}
    if plan.is_flat:
        options |= {"q_num_heads": plan.heads, "kv_num_heads": plan.heads}
    if plan.mask.kind == "causal":
        options["is_causal"] = 1
    inputs = (plan.q, k, plan.v) if mask is None else (plan.q, k, plan.v, mask)
    result = b.call(OnnxOp("", "Attention", _opset(graph)), *inputs, **options)
    width = (shape_of(view.q) or (0,))[-1]
    end = _joined(graph, view.node) if plan.is_flat else view.node
    if end is None:
        split = b.onnx("Reshape", result, b.ints([0, 0, plan.heads, width], "heads"))
        result, end = b.transpose(split, _HEADS_FIRST), view.node
    elif plan.is_flat and len(shape_of(end) or ()) == 2:
        result = b.reshape(result, [-1, plan.heads * width])
    graph.replace(end, result)


def _joined(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The node that joins the heads of the result again: reshape(transpose(y), [batch, length, heads * width]).

    Batch and length may be joined too.
    """
    turn = only_user(node)
    turned = None if turn is None else read(graph, turn, "transpose")
    join = None if turn is None or turned is None or tuple(turned[1]) != _HEADS_FIRST else only_user(turn)
    joined = None if join is None else read(graph, join, "reshape")
    before, after = (None if value is None else shape_of(value) for value in (turn, join))
    if joined is None or joined[0] is not turn or before is None or after is None or len(after) not in (2, 3):
        return None
    same = len(after) == 2 or list(map(str, before[:2])) == list(map(str, after[:2]))
    return join if same and after[-1] == before[2] * before[3] else None


def _mask_node(b: Builder, plan: _Plan, masks: dict[Any, fx.Node]) -> fx.Node | None:
    """The mask as Attention takes it, its last two axes [length, keys]; made once for all that share it."""
    mask, view = plan.mask, plan.view
    if mask.value is None:
        return None
    sizes = [_length(view.q), _length(view.v)]
    key = (view.mask, mask.kind, mask.keeps, mask.hidden, str(sizes))
    if key not in masks:
        node = mask.value if isinstance(mask.value, fx.Node) else b.const(mask.value, "attention_mask")
        shape = tuple(mask.value.shape) if isinstance(mask.value, torch.Tensor) else shape_of(mask.value) or ()
        if mask.kind == "added" and isinstance(mask.value, fx.Node):
            node = b.maximum(node, _HIDDEN)
        elif mask.hidden > -math.inf:
            shown, hidden = (b.const(torch.tensor(x), "score") for x in (0.0, max(mask.hidden, _HIDDEN)))
            node = b.where(node, *((shown, hidden) if mask.keeps else (hidden, shown)))
        elif not mask.keeps:
            node = b.onnx("Not", node)
        if list(map(str, shape[-2:])) != list(map(str, sizes)):
            node = b.expand(node, _mask_shape(b, plan, sizes))
        masks[key] = node
    return masks[key]


def _length(value: fx.Node) -> Any:
    """Of [batch, heads, length, width]."""
    shape = shape_of(value)
    assert shape is not None, "planned() has looked at it"
    return shape[2]


def _mask_shape(b: Builder, plan: _Plan, sizes: list[Any]) -> fx.Node | list[Any]:
    """[1, 1, length, keys]; batch and heads broadcast."""
    if all(isinstance(size, int) for size in sizes):
        return [1, 1, *sizes]
    axis = 1 if plan.is_flat else 2
    lengths = [b.onnx("Shape", value, start=axis, end=axis + 1) for value in (plan.q, plan.v)]
    return b.concat([b.const(torch.ones(2, dtype=torch.int64), "ones"), *lengths], 0)
