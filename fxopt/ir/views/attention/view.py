"""What attention is: softmax(softcap(q @ k.T * scale) + terms) @ v over heads that may share keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from fxopt.ir.graph import shape_of
from fxopt.ir.ledger import Refusal

Kind = Literal["sdpa", "onnx", "contrib", "fxopt", "spelled-out"]
Form = Literal["added", "keeps", "hides"]
HIDDEN_BELOW = -1e4  # a boolean mask puts at most this where it hides


@dataclass(frozen=True)
class Operand:
    """A value as attention takes it: `node` with its axes in the order `perm` (None: as they are).

    Behind it, `replay` are the nodes between it and the product that only move elements; they are made again on
    `node`, in this order, before the axes are turned.
    """

    node: fx.Node
    perm: tuple[int, ...] | None = None
    replay: tuple[fx.Node, ...] = ()

    @property
    def shape(self) -> tuple[Any, ...] | None:
        """The shape as attention takes it; None when it is unknown."""
        known = shape_of(self.replay[-1] if self.replay else self.node)
        return known if known is None or self.perm is None else tuple(known[axis] for axis in self.perm)


@dataclass(frozen=True)
class Term:
    """A mask or bias: `node` is added to the scores, or says (boolean) where they are kept or hidden.

    Attributes:
        factor: of an added one.
        hidden: the score that a boolean one puts where it hides.
        frame: the shape of the scores that it meets, in which it broadcasts; None when it is unknown.
    """

    node: fx.Node
    form: Form
    factor: float = 1.0
    hidden: float = -math.inf
    frame: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Rotary:
    """What turns pairs of features by angles: `x` is the value before it, `width` how many features are turned."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool
    width: Any
    inner: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Attention:
    """q [..., heads, queries, width], k and v [..., heads, keys, width]; `node` is the result.

    With `heads` set (of q, and of k and v), q, k and v are [batch, length, heads * width] instead. k and v may have
    fewer heads, each for `groups` heads of q in a row.

    Attributes:
        scale: of the scores; None means 1 / sqrt(width).
        softcap: c, where scores become c * tanh(scores / c); 0: they do not.
        terms: in the order in which they meet the scores.
        left, right: how far before and after its own position a query sees; None: to the end. `right` 0 is causal.
        sink: one more score per head, of a key without a value; a constant may repeat it: [batch, heads, queries, 1].
        empty_rows_are_zero: what a query without any key gives: zeros, else NaN.
        result_perm: `node` has the axes of the result in this order.
        inner: the nodes that are nothing but parts of it.
    """

    node: fx.Node
    q: Operand
    k: Operand
    v: Operand
    kind: Kind
    scale: float | None = None
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    left: int | None = None
    right: int | None = None
    heads: tuple[int, int] | None = None
    groups: int = 1
    sink: fx.Node | None = None
    rotary: tuple[Rotary | None, Rotary | None] = (None, None)
    empty_rows_are_zero: bool = True
    result_perm: tuple[int, ...] | None = None
    softmax: fx.Node | None = None
    inner: tuple[fx.Node, ...] = ()

    @property
    def factor(self) -> float | None:
        """The scale as a number; None when the width is unknown."""
        if self.scale is not None:
            return self.scale
        shape = self.q.shape
        if shape is None or not isinstance(shape[-1], int):
            return None
        return 1 / math.sqrt(shape[-1] // (self.heads[0] if self.heads else 1))


@dataclass(frozen=True)
class NotAttention:
    """A softmax, or a fused operator, that is not understood as attention, and the first condition that failed.

    `products` are the matrix products around it, `is_candidate` whether there is any.
    """

    node: fx.Node
    reason: Refusal
    products: tuple[fx.Node, ...] = field(default=())

    @property
    def is_candidate(self) -> bool:
        """Whether it looked like attention: there is a product on one side at least, or it is a fused operator."""
        return bool(self.products)
