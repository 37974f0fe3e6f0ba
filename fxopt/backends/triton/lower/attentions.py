"""Attention: few queries over many keys, and pattern-sparse attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt.backends.triton.asked import attention_tile
from fxopt.backends.triton.block_plan import may_renumber
from fxopt.backends.triton.lower.job import Job
from fxopt.backends.triton.ops import decode_attention as decode
from fxopt.backends.triton.ops import pattern_attention as pattern
from fxopt.backends.triton.worth import density_refusal
from fxopt.ir.graph import hint, tensor_value
from fxopt.ir.ops.attention_pattern import NUMBERS, attention_pattern, dense, patterns_of
from fxopt.ir.pattern_work import work_of
from fxopt.ir.views.common import argument

_ATEN = torch.ops.aten
_SDPA = _ATEN.scaled_dot_product_attention.default
_COPIES = (_ATEN.clone.default, _ATEN.contiguous.default)
_RESHAPES = (_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default)
_LEAST_KEYS = 512  # of fewer, one program per head is enough


def sdpa(job: Job, node: fx.Node) -> None:
    """`scaled_dot_product_attention`: torch's own, unless few queries leave most of the chip without work."""
    q, k, v = node.args[:3]
    mask, causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", False))
    keys, values = ungrouped(k), ungrouped(v)
    shapes = [tensor_value(value) for value in (q, keys, values)]
    if any(value is None or value.dim() != 4 for value in shapes) or argument(node, 4, "dropout_p", 0.0):
        return
    query, key = shapes[0], shapes[1]
    assert query is not None and key is not None
    batch, heads, queries, width = map(hint, query.shape)
    kv_heads, length = hint(key.shape[1]), hint(key.shape[2])
    if queries > 8 or length < _LEAST_KEYS:
        return
    pairs = batch * kv_heads
    reason = "it is causal" if causal else decode.refusal(queries, heads, kv_heads, width, query.dtype)
    if not reason and heads % kv_heads:
        reason = f"{heads} heads do not share {kv_heads} key heads evenly"
    if not reason and pairs >= job.kernels.chip.multiprocessors:
        reason = f"{pairs} key heads are enough work for {job.kernels.chip.multiprocessors} multiprocessors"
    scale = node.kwargs.get("scale")
    arguments = (q, keys, values, mask, width**-0.5 if scale is None else scale)
    reason = reason or job.uncompilable(decode.decode_attention, arguments)
    if reason:
        job.refused(node, reason, "torch's attention")
        return
    job.kernel(node, f"{queries} queries over {length} keys, which are split")
    job.substitute(node, job.call(decode.decode_attention.target, arguments, node))


def ungrouped(node: Any) -> Any:
    """Keys or values before they were repeated for the heads that share them: reshape(expand(unsqueeze(x, 2)))."""
    inner = node
    if not isinstance(inner, fx.Node) or inner.target not in _RESHAPES:
        return node
    inner = inner.args[0]
    while isinstance(inner, fx.Node) and inner.target in _COPIES:
        inner = inner.args[0]
    if not isinstance(inner, fx.Node) or inner.target is not _ATEN.expand.default:
        return node
    raised = inner.args[0]
    if not isinstance(raised, fx.Node) or raised.target is not _ATEN.unsqueeze.default or raised.args[1] != 2:
        return node
    before, after = tensor_value(raised.args[0]), tensor_value(node)
    wide = tensor_value(inner)
    if before is None or after is None or wide is None or before.dim() != 4 or after.dim() != 4:
        return node
    grown = tuple(wide.shape)
    whole = grown[:2] == tuple(before.shape[:2]) and grown[3:] == tuple(before.shape[2:])
    merged = tuple(after.shape) == (before.shape[0], grown[1] * grown[2], *before.shape[2:])
    return raised.args[0] if whole and merged else node


def patterned(job: Job, node: fx.Node) -> None:
    """`attention_pattern`."""
    q, k, v, patterns, scale, *blocks = node.args
    if any(given is not None for given in blocks):
        job.refused(node, "its heads have lists of blocks, which the kernel does not take", "the reference")
        return
    value = tensor_value(q)
    if value is None:
        job.refused(node, "the type of its queries is not known", "the reference")
        return
    _, heads, length, width = map(hint, value.shape)
    numbers = tuple(int(number) for number in patterns)  # type: ignore[union-attr, arg-type]
    every = patterns_of(numbers)
    if all(found[1:] == dense()[1:] or found[3] >= found[2] for found in every):
        job.refused(node, "every head sees every key", "torch's attention")
        made = job.call(_SDPA, (q, k, v), node)
        made.kwargs = {"scale": scale}
        job.substitute(node, made)
        return
    renumbered = may_renumber(numbers, length)
    tile = attention_tile(job.target, str(value.dtype).removeprefix("torch."), width, renumbered)
    seen = work_of(numbers, length, tile=tile).share
    arguments = (q, k, v, list(numbers), scale)
    reason = pattern.refusal(width, value.dtype) or job.uncompilable(pattern.pattern_attention, arguments)
    if reason:
        job.refused(node, reason, "the reference")
        return
    doubt = density_refusal(job.target, seen, heads, length, width, value.dtype, renumbered)
    text = f"{len(numbers) // NUMBERS} heads in one launch, {seen:.2f} of the tiles of {tile}"
    job.kernel(node, f"{text}{doubt and f'; {doubt}'}")
    job.substitute(node, job.call(pattern.pattern_attention.target, arguments, node))


RULES: dict[Any, Callable[[Job, fx.Node], None]] = {_SDPA: sdpa, attention_pattern.target: patterned}
