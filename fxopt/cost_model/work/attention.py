"""The work of the fused attention operators: `Attention` of ONNX and those of `com.microsoft`."""

from __future__ import annotations

from collections.abc import Callable

from fxopt.cost_model.work import products
from fxopt.cost_model.work.call import Call, count
from fxopt.ir.target import Cost


def _attention(call: Call) -> Cost:
    """ONNX opset 23, [B, S, heads * D] or [B, heads, S, D]; or `com.microsoft.Attention`, which projects too."""
    if call.node.target.domain == "com.microsoft":  # type: ignore[union-attr]
        return _projecting(call)
    query, key, value, past = call.shape(0), call.shape(1), call.shape(2), call.shape(4)
    if query is None or key is None or value is None:
        return call.cost(0.0, "attention")
    if len(query) == 4:
        batch, heads, queries, depth = query
        keys, value_depth = key[2], value[3]
    else:
        heads = int(call.attribute("q_num_heads", 1))
        batch, queries, hidden = query
        depth, keys = hidden // heads, key[1]
        value_depth = value[2] // int(call.attribute("kv_num_heads", heads))
    keys += past[2] if past is not None else 0
    return call.cost(products.attention(batch, heads, queries, keys, depth, value_depth), "attention")


def _projecting(call: Call, weight: int = 1) -> Cost:
    """x [B, S, in], weights [in, 3 * hidden]: the projection and the attention over it."""
    x, w = call.shape(0), call.shape(weight)
    if x is None or w is None:
        return call.cost(0.0, "attention")
    batch, length, _ = x
    heads = max(1, int(call.attribute("num_heads", 1)))
    depth = w[1] // 3 // heads
    inner = products.attention(batch, heads, length, length, depth, depth)
    return call.cost(products.matmul(x, w) + inner, "attention")


def _multi_head(call: Call) -> Cost:
    """`com.microsoft.MultiHeadAttention`: query [B, S, hidden], key and value [B, L, hidden] or [B, heads, L, D]."""
    query, key, value = call.shape(0), call.shape(1), call.shape(2)
    if query is None or key is None or value is None or len(query) != 3:
        return _packed(call)
    batch, queries, hidden = query
    heads = max(1, int(call.attribute("num_heads", 1)))
    keys = key[2] if len(key) == 4 else key[1]
    value_depth = value[3] if len(value) == 4 else value[2] // heads
    past = call.shape(6)
    keys += past[2] if past is not None else 0
    return call.cost(products.attention(batch, heads, queries, keys, hidden // heads, value_depth), "attention")


def _packed(call: Call) -> Cost:
    """Query, key and value in one [B, S, heads, 3, D] operand."""
    packed = call.shape(0)
    if packed is None or len(packed) != 5:
        return call.cost(0.0, "attention")
    batch, length, heads, _, depth = packed
    return call.cost(products.attention(batch, heads, length, length, depth, depth), "attention")


def _grouped(call: Call) -> Cost:
    """`com.microsoft.GroupQueryAttention`: query [B, S, heads * D] and the past [B, kv_heads, P, D]."""
    query, past = call.shape(0), call.shape(3)
    if query is None:
        return call.cost(0.0, "attention")
    batch, length, width = query
    heads = max(1, int(call.attribute("num_heads", 1)))
    shared = max(1, int(call.attribute("kv_num_heads", heads)))
    packed = call.tensor(1) is None
    depth = width // (heads + 2 * shared) if packed else width // heads
    keys = length + (past[2] if past is not None else 0)
    return call.cost(products.attention(batch, heads, length, keys, depth, depth), "attention")


def _rotary(call: Call) -> Cost:
    return call.cost(3.0 * count(call.output), "elementwise")


ATTENTION: dict[str, Callable[[Call], Cost]] = {
    "Attention": _attention,
    "QAttention": _projecting,
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _grouped,
    "RotaryEmbedding": _rotary,
}
