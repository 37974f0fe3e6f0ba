"""`Attention`: softmax(q @ k.T * scale + mask) @ v, as one operator or spelled out, in both dialects."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from fxopt.ir.graph import Graph, shape_of, tensor_value
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.views.common import argument, aten, escapes, is_aten, is_onnx, scalar_constant

Kind = Literal["sdpa", "onnx", "contrib", "spelled-out"]
_HIDDEN_BELOW = -1e4  # a masked score is at most this


@dataclass(frozen=True)
class Attention:
    """q, k, v [..., heads, length, width]; with `heads` set, [batch, length, heads * width] instead.

    `scale` None means 1 / sqrt(width). The mask is added to the scores, or, when it is boolean, keeps (`mask_keeps`) or
    hides (not `mask_keeps`) the scores where it is true. With `k_transposed`, `k` is [..., width, length].
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    kind: Kind
    mask: fx.Node | None = None
    mask_keeps: bool = True
    scale: float | None = None
    causal: bool = False
    softcap: float = 0.0
    heads: tuple[int, int] | None = None  # of q, and of k and v
    k_transposed: bool = False
    inner: tuple[fx.Node, ...] = ()
    hidden: float | None = None  # the score that a spelled-out boolean mask puts where it hides
    nan_to_zero: bool = False  # a spelled-out softmax whose NaN (of rows without a key) becomes 0

    @property
    def mask_is_boolean(self) -> bool | None:
        """Whether the mask keeps or hides, instead of being added; None when it is unknown or there is none."""
        value = tensor_value(self.mask)
        return None if value is None else value.dtype == torch.bool

    @property
    def factor(self) -> float | None:
        """The scale as a number; None when the width is unknown."""
        if self.scale is not None:
            return self.scale
        shape = shape_of(self.q)
        if shape is None or not isinstance(shape[-1], int):
            return None
        return 1 / math.sqrt(shape[-1] // (self.heads[0] if self.heads else 1))


def attention(graph: Graph, node: fx.Node) -> Attention | Refusal | None:
    """The attention whose value `node` is; None when it is something else, a refusal when it is almost one."""
    if is_aten(node, aten.scaled_dot_product_attention.default):
        return _sdpa(node)
    if is_onnx(node, "Attention"):
        return _onnx(node)
    if is_onnx(node, "MultiHeadAttention", domain="com.microsoft"):
        return _multi_head(node)
    if is_onnx(node, "Attention", "GroupQueryAttention", "PackedMultiHeadAttention", domain="com.microsoft"):
        return Refusal("com.microsoft::{} is a fused form with packed weights or a cache", _op_type(node))
    return _spelled_out(graph, node)


def attentions(graph: Graph) -> Iterator[Attention | tuple[fx.Node, Refusal]]:
    """Every attention of the graph in execution order, and what is almost one with the reason."""
    for node in list(graph.calls()):
        view = attention(graph, node)
        if isinstance(view, Attention):
            yield view
        elif view is not None:
            yield node, view


def _op_type(node: fx.Node) -> str:
    return str(getattr(node.target, "op_type", node.target))


# ---- one operator


def _sdpa(node: fx.Node) -> Attention | Refusal:
    q, k, v = node.args[:3]
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    if dropout:
        return Refusal("dropout_p={}; attention with dropout is for training", dropout)
    scale, causal = node.kwargs.get("scale"), bool(argument(node, 5, "is_causal", False))
    return Attention(node, q, k, v, "sdpa", mask, True, scale, causal)  # type: ignore[arg-type]


def _onnx(node: fx.Node) -> Attention | Refusal:
    options: Any = node.kwargs
    if options.get("_outputs", 1) != 1:
        return Refusal("it also returns the updated cache or the scores")
    names = ("q", "k", "v", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
    for name, given in zip(names[4:], node.args[4:]):
        if given is not None:
            return Refusal("it takes {}", name)
    q, k, v = node.args[:3]
    heads = (options["q_num_heads"], options["kv_num_heads"]) if options.get("q_num_heads") else None
    scale, softcap = options.get("scale"), float(options.get("softcap", 0.0))
    causal, mask = bool(options.get("is_causal", 0)), argument(node, 3)
    return Attention(node, q, k, v, "onnx", mask, True, scale, causal, softcap, heads)  # type: ignore[arg-type]


def _multi_head(node: fx.Node) -> Attention | Refusal:
    options: Any = node.kwargs
    if options.get("_outputs", 1) != 1:
        return Refusal("it also returns the updated cache or the scores")
    names = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key", "past_value")
    for index, given in enumerate(node.args[3:], 3):
        if given is not None and index != 5:
            return Refusal("it takes {}", names[index] if index < len(names) else "a cache")
    q, k, v = (argument(node, index) for index in range(3))
    if k is None or v is None:
        return Refusal("query, key and value are packed in one input")
    heads, scale = (options["num_heads"],) * 2, options.get("scale") or None
    causal, mask = bool(options.get("unidirectional", 0)), argument(node, 5)
    return Attention(node, q, k, v, "contrib", mask, True, scale, causal, 0.0, heads)


# ---- spelled out


@dataclass
class _Scores:
    """What is found between the softmax and q @ k.T."""

    inner: list[fx.Node] = field(default_factory=list)
    mask: fx.Node | None = None
    mask_keeps: bool = True
    scale: float = 1.0
    softcap: float = 0.0
    hidden: float | None = None
    nan_to_zero: bool = False


def _spelled_out(graph: Graph, node: fx.Node) -> Attention | Refusal | None:
    product = read(graph, node, "matmul")
    if product is None or not all(isinstance(operand, fx.Node) for operand in product):
        return None
    weights, v = product
    found = _Scores()
    softmax = _softmax_below(graph, weights, found)
    if softmax is None:
        return None
    scores, axis = softmax
    rank = len(shape_of(scores) or ())
    if axis not in (-1, rank - 1):
        return Refusal("the softmax runs over axis {}, not over the last one", axis)
    similarity = _similarity(graph, scores, found)
    if isinstance(similarity, Refusal):
        return similarity
    q, k = (_unscaled(graph, operand, found) for operand in similarity)
    k, k_transposed = _untransposed(graph, k, found)
    inner = tuple(dict.fromkeys(found.inner))
    outside = escapes(inner, node)
    if outside is not None:
        return Refusal("its inner value {} is also used by {}", outside[0].name, outside[1].name)
    return Attention(
        node, q, k, v, "spelled-out", found.mask, found.mask_keeps, found.scale, False, found.softcap,
        None, k_transposed, inner, found.hidden, found.nan_to_zero,
    )  # fmt: skip


def _softmax_below(graph: Graph, node: fx.Node, found: _Scores) -> tuple[fx.Node, int] | None:
    """(scores, axis) of a softmax below casts and the replacement of NaN by 0."""
    for _ in range(4):
        found.inner.append(node)
        softmax: Any = read(graph, node, "softmax")
        if is_aten(node, aten.softmax.int):
            softmax = node.args[:2]  # with an element type for the result, too
        if softmax is not None:
            return softmax[0], softmax[1]
        below = _nan_to_zero(graph, node, found) or read(graph, node, "cast")
        if below is None or not isinstance(below[0], fx.Node):
            return None
        node = below[0]
    return None


def _nan_to_zero(graph: Graph, node: fx.Node, found: _Scores) -> tuple[fx.Node] | None:
    """(p,) when the node is where(isnan(p), 0, p)."""
    choice = read(graph, node, "where")
    if choice is None or scalar_constant(graph, choice[1]) != 0:
        return None
    condition, _, p = choice
    tests = is_onnx(condition, "IsNaN") or is_aten(condition, aten.isnan.default)
    if not tests or condition.args[0] is not p or not isinstance(p, fx.Node):
        return None
    found.inner.append(condition)
    found.nan_to_zero = True
    return (p,)


def _similarity(graph: Graph, node: fx.Node, found: _Scores) -> tuple[fx.Node, fx.Node] | Refusal:
    """(q, k.T) below scales, masks, a soft cap and casts."""
    while True:
        found.inner.append(node)
        product = read(graph, node, "matmul")
        if product is not None:
            return product[0], product[1]
        below = (
            _scaled(graph, node, found)
            or _masked(graph, node, found)
            or _capped(graph, node, found)
            or _operand(read(graph, node, "cast"))
        )
        if isinstance(below, Refusal):
            return below
        if below is None:
            return Refusal("between q @ k.T and the softmax there is {}, which is not understood", _op_type(node))
        node = below


def _operand(arguments: tuple[Any, ...] | None) -> fx.Node | None:
    return arguments[0] if arguments is not None and isinstance(arguments[0], fx.Node) else None


def _scaled(graph: Graph, node: fx.Node, found: _Scores) -> fx.Node | None:
    """What is multiplied or divided by a constant number."""
    product, ratio = read(graph, node, "mul"), read(graph, node, "div")
    for value, constant in (product, product[::-1]) if product is not None else ():
        factor = scalar_constant(graph, constant)
        if factor is not None and isinstance(value, fx.Node):
            if read(graph, value, "tanh") is not None:
                return None  # a soft cap
            found.scale *= factor
            return value
    divisor = None if ratio is None else scalar_constant(graph, ratio[1])
    if ratio is not None and divisor and isinstance(ratio[0], fx.Node):
        found.scale /= divisor
        return ratio[0]
    return None


def _masked(graph: Graph, node: fx.Node, found: _Scores) -> fx.Node | Refusal | None:
    """What a mask is added to, or is hidden by one."""
    total = read(graph, node, "add")
    if total is not None and all(isinstance(operand, fx.Node) for operand in total):
        first = _reaches_product(graph, total[0])
        value, mask = total if first else total[::-1]
        if not first and not _reaches_product(graph, value):
            return None
        if first and _reaches_product(graph, mask):
            return Refusal("two products are added before the softmax (a relative position term)")
        return _with_mask(found, value, mask, True)
    choice: Any = read(graph, node, "where")
    if choice is None and is_aten(node, aten.masked_fill.Scalar):
        choice = (node.args[1], node.args[2], node.args[0])
    if choice is None:
        return None
    for position in (1, 2):
        filler = scalar_constant(graph, choice[3 - position])
        if filler is not None and filler <= _HIDDEN_BELOW and isinstance(choice[position], fx.Node):
            found.hidden = filler
            return _with_mask(found, choice[position], choice[0], position == 1)
    return None


def _with_mask(found: _Scores, value: fx.Node, mask: fx.Node, keeps: bool) -> fx.Node | Refusal:
    if found.mask is not None:
        return Refusal("two masks, {} and {}; only one is understood", found.mask.name, mask.name)
    if found.scale != 1.0:
        return Refusal("the scores are scaled after the mask {}", mask.name)
    found.mask, found.mask_keeps = mask, keeps
    return value


def _capped(graph: Graph, node: fx.Node, found: _Scores) -> fx.Node | None:
    """What is below cap * tanh(x / cap)."""
    product = read(graph, node, "mul")
    for value, constant in (product, product[::-1]) if product is not None else ():
        cap, curve = scalar_constant(graph, constant), read(graph, value, "tanh")
        if cap is None or curve is None or found.softcap:
            continue
        inside, factor = curve[0], _Scores()
        below = _scaled(graph, inside, factor)
        if below is not None and math.isclose(factor.scale * cap, 1, rel_tol=1e-5) and found.scale == 1.0:
            found.softcap = cap
            found.inner += [value, inside]
            return below
    return None


def _reaches_product(graph: Graph, node: Any) -> bool:
    """True when the node is q @ k.T below scales, masks and casts."""
    trial = _Scores()
    return isinstance(node, fx.Node) and not isinstance(_similarity(graph, node, trial), Refusal)


def _unscaled(graph: Graph, node: fx.Node, found: _Scores) -> fx.Node:
    """q or k.T below a scale of its own (torch's exporter scales both by the root)."""
    below = _scaled(graph, node, found)
    if below is None:
        return node
    found.inner.append(node)
    return below


def _untransposed(graph: Graph, node: fx.Node, found: _Scores) -> tuple[fx.Node, bool]:
    """(k, False) below a swap of the last two axes, else (k.T, True)."""
    swap = read(graph, node, "transpose")
    if swap is not None and isinstance(swap[0], fx.Node) and _swaps_last(swap[1]):
        found.inner.append(node)
        return swap[0], False
    back = read(graph, node, "reshape")
    turned = None if back is None else read(graph, back[0], "transpose")
    flat = None if turned is None or not _swaps_last(turned[1]) else read(graph, turned[0], "reshape")
    if back is None or turned is None or flat is None:
        return node, True
    k = flat[0]
    given, middle, result = (shape_of(value) for value in (k, turned[0], node))
    if given is None or middle is None or result is None or len(given) < 2 or len(middle) < 2:
        return node, True
    same = str(middle[-2:]) == str(given[-2:]) and str(result) == str((*given[:-2], given[-1], given[-2]))
    if not same:
        return node, True
    found.inner += [node, back[0], turned[0]]
    return k, False


def _swaps_last(perm: Any) -> bool:
    count = len(perm)
    return count >= 2 and tuple(perm) == (*range(count - 2), count - 1, count - 2)
