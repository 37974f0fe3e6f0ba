"""Three linears of one input that become the heads of attention: one product, norm and rotary embedding behind it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt.backends.triton.lower.job import Job, rows_of
from fxopt.backends.triton.lower.linears import coded, packed_arguments
from fxopt.backends.triton.ops.qkv_packed import qkv_packed
from fxopt.ir.graph import hint, label, tensor_value
from fxopt.ir.ops.linear_nbits import linear_nbits
from fxopt.ir.views.norm import Norm, norm

_ATEN = torch.ops.aten
_MOST_ROWS = 64  # of more, partial sums in float32 cost more than launches
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default)


@dataclass(frozen=True)
class Heads:
    """One of the three: the linear, its value as [batch, heads, length, width], and what the kernel gives for it."""

    linear: fx.Node
    heads: fx.Node
    result: fx.Node
    cos: fx.Node | None = None
    sin: fx.Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[batch, heads, length, width]."""
        value = tensor_value(self.heads)
        assert value is not None
        return tuple(map(hint, value.shape))


def fuse(job: Job) -> None:
    """All groups of the graph."""
    for group in list(_groups(job)):
        _fuse(job, group)


def _groups(job: Job) -> Iterator[tuple[Heads, Heads, Heads]]:
    """Queries, keys and values of one input with weights of one form."""
    found: dict[Any, list[Heads]] = {}
    for node in job.graph.calls():
        heads = _heads(node) if node.target is linear_nbits.target else None
        if heads is not None:
            x, columns, bits, group, rounded = (node.args[index] for index in (0, 5, 6, 7, 8))
            found.setdefault((x, columns, bits, group, rounded), []).append(heads)
    for members in found.values():
        if len(members) != 3 or any((item.cos is None) != (members[0].cos is None) for item in members[:2]):
            continue
        q, k, v = members
        alike = k.shape == v.shape and q.shape[2:] == k.shape[2:] and _same(q.cos, k.cos) and _same(q.sin, k.sin)
        if v.cos is None and alike:
            yield q, k, v


def _same(a: fx.Node | None, b: fx.Node | None) -> bool:
    """One node, or the same call twice."""
    if a is None or b is None or a is b:
        return a is b
    return a.op == b.op == "call_function" and (a.target, a.args, a.kwargs) == (b.target, b.args, b.kwargs)


def _heads(node: fx.Node) -> Heads | None:
    """linear -> view [batch, length, heads, width] -> transpose(1, 2), and the rotary embedding behind it."""
    view = _only_user(node)
    if view is None or view.target not in _VIEWS:
        return None
    turned = _only_user(view)
    if turned is None or turned.target is not _ATEN.transpose.int or sorted(turned.args[1:]) != [1, 2]:  # type: ignore[type-var]
        return None
    value = tensor_value(turned)
    if value is None or value.dim() != 4 or hint(value.shape[-1]) % 2:
        return None
    rotated = _rotated(turned)
    return Heads(node, turned, turned) if rotated is None else Heads(node, turned, *rotated)


def _rotated(t: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """t * cos + cat([-t[..., half:], t[..., :half]]) * sin: the sum, and the nodes of cos and sin."""
    plain = [user for user in t.users if user.target is _ATEN.mul.Tensor]
    slices = [user for user in t.users if user.target is _ATEN.slice.Tensor]
    if len(plain) != 1 or len(slices) != 2 or len(t.users) != 3:
        return None
    joined = [user for part in slices for user in part.users if user.target is _ATEN.cat.default]
    joined += [user for part in slices for neg in part.users if neg.target is _ATEN.neg.default for user in neg.users]
    if len(joined) != 2 or joined[0] is not joined[1] or not _turns_half(joined[0], t):
        return None
    times_sin, total = _only_user(joined[0]), _only_user(plain[0])
    if times_sin is None or times_sin.target is not _ATEN.mul.Tensor or total is None:
        return None
    if total.target is not _ATEN.add.Tensor or total.kwargs or not _adds(total, plain[0], times_sin):
        return None
    cos, sin = _other(plain[0], t), _other(times_sin, joined[0])
    return (total, cos, sin) if isinstance(cos, fx.Node) and isinstance(sin, fx.Node) else None


def _adds(total: fx.Node, a: fx.Node, b: fx.Node) -> bool:
    return list(total.args) in ([a, b], [b, a])


def _turns_half(cat: fx.Node, t: fx.Node) -> bool:
    value = tensor_value(t)
    assert value is not None
    half = hint(value.shape[-1]) // 2
    parts: Any = cat.args[0]
    if len(parts) != 2 or cat.args[1:] not in ((-1,), (3,)) or parts[0].target is not _ATEN.neg.default:
        return False
    return _slice(parts[0].args[0], t) == (half, None) and _slice(parts[1], t) == (0, half)


def _slice(node: Any, t: fx.Node) -> tuple[int, int | None] | None:
    """Begin and end of a slice of the last axis; the end is None where it is that of the axis."""
    value = tensor_value(t)
    if not isinstance(node, fx.Node) or node.target is not _ATEN.slice.Tensor or node.args[0] is not t or value is None:
        return None
    axis, begin, end = [*node.args[1:], 0, None, None][:3]
    width = hint(value.shape[-1])
    if axis not in (3, -1) or not isinstance(begin, int) or (end is not None and not isinstance(end, int)):
        return None
    return begin, None if end is None or end >= width else end


def _other(product: fx.Node, one: fx.Node) -> Any:
    first, second = product.args[:2]
    return second if first is one else first


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _has_angles(item: Heads) -> bool:
    """Whether cos and sin are the same for all heads: [batch, 1, length, width]."""
    values = [tensor_value(item.cos), tensor_value(item.sin)]
    return all(value is not None and value.dim() == 4 and value.shape[1] == 1 for value in values)


def _angles(job: Job, node: fx.Node | None, place: fx.Node) -> fx.Node | None:
    """cos or sin as [batch, length, width]."""
    if node is None:
        return None
    value = tensor_value(node)
    assert value is not None
    made = job.call(_ATEN.squeeze.dim, (node, 1), place)
    sizes = tuple(map(hint, (value.shape[0], *value.shape[2:])))
    made.meta["val"] = torch.empty(sizes, dtype=value.dtype, device="meta")
    return made


def _fuse(job: Job, group: tuple[Heads, Heads, Heads]) -> None:
    q, k, v = group
    if rows_of(q.linear.args[0]) > _MOST_ROWS or (q.cos is not None and not _has_angles(q)):
        return
    every = [coded(job.graph, item.linear) for item in group]
    weights = [item for item in every if item is not None and item.zeros is None and not item.refusal]
    place = _place(job, group) if len(weights) == 3 else None
    biases = [job.graph.constant(item.bias) for item in weights]
    present = [bias for bias in biases if bias is not None]
    if place is None or len(present) != sum(item.bias is not None for item in weights) or len(present) not in (0, 3):
        return
    codes = torch.cat([item.codes for item in weights])
    packed = replace(weights[0], codes=codes, scales=torch.cat([item.scales for item in weights])).packed()
    bias = job.constant(torch.cat(present), q.linear, "bias") if present else None
    x, eps = _input(job, q.linear.args[0])
    arguments = (
        x, *packed_arguments(job, q.linear, packed), bias, _angles(job, q.cos, place), _angles(job, q.sin, place),
        str(packed.layout), packed.outputs, packed.columns, packed.group, q.shape[1], k.shape[1], eps,
    )  # fmt: skip
    reason = job.uncompilable(qkv_packed, arguments)
    if reason:
        job.refused(q.linear, f"queries, keys and values at once: {reason}", "three products")
        return
    behind = "".join((", norm" if eps is not None else "", ", rotary embedding" if q.cos is not None else ""))
    sizes = f"{packed.outputs} x {packed.columns}"
    job.kernel(q.linear, f"queries, keys and values at once: {packed.layout} of {sizes}{behind}")
    for item in (k, v):
        job.kernel(item.linear, f"part of {label(q.linear)}")
    made = job.call(qkv_packed.target, arguments, place)
    parts = [job.call(operator.getitem, (made, index), place) for index in range(len(group))]
    for item, part in zip(group, parts, strict=True):
        job.substitute(item.result, part)


def _place(job: Job, group: tuple[Heads, ...]) -> fx.Node | None:
    """The first user of the three, when their operands come before it; None: there is no place for all three."""
    order = {node: index for index, node in enumerate(job.graph.nodes)}
    first = min((user for item in group for user in item.result.users), key=order.__getitem__, default=None)
    operands = (group[0].linear.args[0], group[0].cos, group[0].sin)
    late = [node for node in operands if isinstance(node, fx.Node) and first and order[node] >= order[first]]
    if first is None or any(node.op != "get_attr" for node in late):
        return None
    for node in dict.fromkeys(late):
        first.prepend(node)
    return first


def _input(job: Job, x: Any) -> tuple[fx.Node, float | None]:
    """What is multiplied: the input of a root-mean-square norm without weight that only they use, and its eps."""
    found = norm(job.graph, x)
    if not isinstance(found, Norm) or found.kind != "rms" or found.axes != 1 or found.weight_node is not None:
        return x, None
    before, after = tensor_value(found.x), tensor_value(x)
    if len(x.users) != 3 or before is None or after is None or before.dtype != after.dtype:
        return x, None
    return found.x, found.eps
