"""The ONNX form of pattern-sparse attention: dense attention over slices, in operators of the standard.

What no query of a slice sees is not in the file's work at all, so that every runtime skips it; no own kernel is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.errors import Unsupported
from fxopt.ir.graph import tensor_value
from fxopt.ir.onnx.export import Emitter, Forms
from fxopt.ir.ops.attention_pattern import attention_pattern
from fxopt.ir.sliced_attention import HeadGroup, Piece, slices

_HEADS, _TOKENS = 1, 2  # axes


def _attention(emitter: Emitter, node: fx.Node) -> str:
    """Slice, MatMul, Softmax and MatMul per piece; heads and pieces are joined again."""
    arguments: Any = node.args
    q, k, v, patterns, scale, *blocks = arguments
    value = tensor_value(q)
    if value is None or not isinstance(value.shape[2], int):
        raise Unsupported("attention_pattern has an ONNX form for lengths that are fixed only")
    listed = emitter.graph.constant(blocks[0]) if blocks and blocks[0] is not None else None
    groups = slices(patterns, value.shape[2], listed)
    writer = _Writer(emitter, emitter.output(node), scale, int(value.shape[2]), value.dtype)
    taken = [emitter.value(x) for x in (q, k, v)]
    results = [writer.heads(taken, group, whole=len(groups) == 1) for group in groups]
    return writer.joined(results, _HEADS, writer.result)


class _Writer:
    """The operators of one attention."""

    def __init__(self, emitter: Emitter, result: str, scale: float, length: int, dtype: torch.dtype) -> None:
        self.emitter = emitter
        self.result = result
        self.scale = scale
        self.length = length
        self.dtype = dtype

    def step(self, op_type: str, inputs: list[str], result: str = "", **attributes: Any) -> str:
        name = result or self.emitter.fresh(f"{self.result}_{op_type.lower()}")
        self.emitter.node(op_type, inputs, [name], **attributes)
        return name

    def constant(self, key: object, value: torch.Tensor, hint: str) -> str:
        """One initializer for all attentions that take the same."""
        shared = self.emitter.shared
        if ("pattern", key) not in shared:
            shared["pattern", key] = self.emitter.initializer(value, hint)
        return str(shared["pattern", key])

    def number(self, value: int) -> str:
        return self.constant(value, torch.tensor([value]), f"number_{value}")

    def part(self, x: str, axis: int, low: int, high: int) -> str:
        return self.step("Slice", [x, self.number(low), self.number(high), self.number(axis)])

    def joined(self, parts: list[str], axis: int, result: str = "") -> str:
        if len(parts) == 1:
            return parts[0] if not result else self.step("Identity", parts, result)
        return self.step("Concat", parts, result, axis=axis)

    def heads(self, taken: list[str], group: HeadGroup, whole: bool) -> str:
        """[batch, heads of the group, length, width]."""
        if not whole:
            taken = [self.part(x, _HEADS, group.start, group.stop) for x in taken]
        if group.order is not None:
            order = self.constant(("order", tuple(group.order.tolist())), group.order, "order")
            taken = [self.step("Gather", [x, order], axis=_TOKENS) for x in taken]
        made, done = [], 0
        for piece in group.pieces:
            if piece.start > done:
                made.append(self.nothing(taken[0], done, piece.start))
            made.append(self.piece(taken, piece))
            done = piece.stop
        if done < self.length:
            made.append(self.nothing(taken[0], done, self.length))
        result = self.joined(made, _TOKENS)
        if group.order is None:
            return result
        back = torch.argsort(group.order)
        places = self.constant(("order", tuple(back.tolist())), back, "order")
        return self.step("Gather", [result, places], axis=_TOKENS)

    def nothing(self, q: str, start: int, stop: int) -> str:
        """Zeros for queries that see no key."""
        rows = self.part(q, _TOKENS, start, stop)
        return self.step("Sub", [rows, rows])

    def piece(self, taken: list[str], piece: Piece) -> str:
        q, k, v = taken
        if piece.stop - piece.start < self.length:
            q = self.part(q, _TOKENS, piece.start, piece.stop)
        if piece.ranges != ((0, self.length),):
            k, v = (
                self.joined([self.part(x, _TOKENS, low, high) for low, high in piece.ranges], _TOKENS) for x in (k, v)
            )
        scale = self.constant(("scale", self.scale, self.dtype), torch.tensor(self.scale, dtype=self.dtype), "scale")
        scores = self.step("MatMul", [self.step("Mul", [q, scale]), self.step("Transpose", [k], perm=[0, 1, 3, 2])])
        if piece.mask is not None:
            hidden = piece.mask.added(self.dtype)
            scores = self.step("Add", [scores, self.constant(_key(piece.mask.seen), hidden, "pattern_mask")])
        made = self.step("MatMul", [self.step("Softmax", [scores], axis=-1), v])
        if piece.empty is not None:
            seen = ~piece.empty
            made = self.step("Mul", [made, self.constant(_key(seen), seen.to(self.dtype), "rows_with_keys")])
        return made


def _key(mask: torch.Tensor) -> object:
    return tuple(mask.shape), mask.contiguous().numpy().tobytes()


ATTENTION_FORMS: Forms = {attention_pattern.target: _attention}
