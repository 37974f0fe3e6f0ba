"""Attention that is one operator already."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.ir.graph import Graph, label, shape_of, tensor_value
from fxopt.ir.ledger import Refusal
from fxopt.ir.ops.attention import attention as fxopt_attention
from fxopt.ir.views.attention.view import Attention, Kind, Operand, Term
from fxopt.ir.views.common import argument, aten, is_aten, is_onnx

_CAUSAL = 0  # keys after a query's own position that it sees
_ONNX_INPUTS = ("q", "k", "v", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
_CONTRIB_INPUTS = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias", "past_key", "past_value")
_PACKED = ("Attention", "GroupQueryAttention", "PackedMultiHeadAttention", "PackedAttention", "QAttention",
           "DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "LongformerAttention", "SparseAttention",
           "PagedAttention")  # fmt: skip


def one_operator(graph: Graph, node: fx.Node) -> Attention | Refusal | None:
    """The attention that the operator computes; None when it is another operator."""
    if is_aten(node, aten.scaled_dot_product_attention.default):
        return _sdpa(node)
    if is_aten(node, fxopt_attention.target):
        return _fxopt(node)
    if is_onnx(node, "Attention"):
        return _onnx(node)
    if is_onnx(node, "MultiHeadAttention", domain="com.microsoft"):
        return _multi_head(node)
    if is_onnx(node, *_PACKED, domain="com.microsoft"):
        return Refusal("com.microsoft::{} is a fused form with packed weights or a cache", _op_type(node))
    if is_onnx(node, "FlexAttention") or getattr(node.target, "__name__", "") == "flex_attention":
        return Refusal("{} changes its scores by a function of its own", label(node))
    return None


def _op_type(node: fx.Node) -> str:
    return str(getattr(node.target, "op_type", node.target))


def _mask(mask: Any) -> tuple[Term, ...]:
    """A mask operand: boolean ones keep."""
    if mask is None:
        return ()
    value = tensor_value(mask)
    boolean = value is not None and value.dtype == torch.bool
    return (Term(mask, "keeps" if boolean else "added"),)


def _groups(q: Any, k: Any) -> int | Refusal:
    """How many heads of q share one of k."""
    shapes = [shape_of(value) for value in (q, k)]
    heads = [shape[-3] if shape is not None and len(shape) > 2 else None for shape in shapes]
    if not all(isinstance(count, int) for count in heads):
        return 1 if heads[0] is None or str(heads[0]) == str(heads[1]) else Refusal("its heads are known at run time")
    queries, keys = heads
    if queries == keys or not keys:
        return 1
    if queries % keys:
        return Refusal("{} heads of q cannot share {} of k and v evenly", queries, keys)
    return int(queries // keys)


def _sdpa(node: fx.Node) -> Attention | Refusal:
    q, k, v = node.args[:3]
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    if dropout:
        return Refusal("dropout_p={}; attention with dropout is for training", dropout)
    grouped: Any = argument(node, 7, "enable_gqa", False)
    groups = _groups(q, k) if grouped else 1
    if isinstance(groups, Refusal):
        return groups
    scale: Any = argument(node, 6, "scale")
    right = _CAUSAL if argument(node, 5, "is_causal", False) else None
    return _view(node, q, k, v, "sdpa", _mask(mask), scale, right=right, groups=groups)


def _view(
    node: fx.Node, q: Any, k: Any, v: Any, kind: Kind, terms: tuple[Term, ...], scale: Any, **more: Any
) -> Attention:
    return Attention(node, Operand(q), Operand(k), Operand(v), kind, scale, terms=terms, **more)


def _fxopt(node: fx.Node) -> Attention | Refusal:
    arguments: Any = node.args
    q, k, v, mask, sink, scale, softcap, left, right = arguments
    groups = _groups(q, k)
    if isinstance(groups, Refusal):
        return groups
    sides = {"left": None if left < 0 else left, "right": None if right < 0 else right}
    return _view(node, q, k, v, "fxopt", _mask(mask), scale, softcap=softcap, sink=sink, groups=groups, **sides)


def _onnx(node: fx.Node) -> Attention | Refusal:
    options: Any = node.kwargs
    if options.get("_outputs", 1) != 1:
        return Refusal("it also returns the updated cache or the scores")
    for name, given in zip(_ONNX_INPUTS[4:], node.args[4:]):
        if given is not None:
            return Refusal("it takes {}", name)
    q, k, v = node.args[:3]
    heads = (options["q_num_heads"], options["kv_num_heads"]) if options.get("q_num_heads") else None
    groups = heads[0] // heads[1] if heads else _groups(q, k)
    if isinstance(groups, Refusal):
        return groups
    left, right = (options.get(f"{side}_window_size", -1) for side in ("left", "right"))
    sides = {"left": None if left < 0 else left, "right": None if right < 0 else right}
    if options.get("is_causal"):
        sides["right"] = _CAUSAL
    more: dict[str, Any] = {"softcap": float(options.get("softcap", 0.0)), "heads": heads, "groups": groups}
    return _view(node, q, k, v, "onnx", _mask(argument(node, 3)), options.get("scale"), **more, **sides)


def _multi_head(node: fx.Node) -> Attention | Refusal:
    options: Any = node.kwargs
    if options.get("_outputs", 1) != 1:
        return Refusal("it also returns the updated cache or the scores")
    for index, given in enumerate(node.args[3:], 3):
        if given is not None and index != 5:
            return Refusal("it takes {}", _CONTRIB_INPUTS[index] if index < len(_CONTRIB_INPUTS) else "a cache")
    q, k, v = (argument(node, index) for index in range(3))
    if k is None or v is None:
        return Refusal("query, key and value are packed in one input")
    heads, right = (options["num_heads"],) * 2, _CAUSAL if options.get("unidirectional", 0) else None
    mask = _mask(argument(node, 5))
    return _view(node, q, k, v, "contrib", mask, options.get("scale") or None, heads=heads, right=right)
