"""An attention whose heads may get patterns: its operands, sizes, and the linears around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.ir.builder import Builder
from fxopt.ir.graph import Graph, label, shape_of, tensor_value
from fxopt.ir.ledger import Refusal
from fxopt.ir.neutral import read
from fxopt.ir.ops.attention_pattern import BLOCK
from fxopt.ir.views.attention import Attention, Operand, attentions
from fxopt.ir.views.common import only_user
from fxopt.ir.views.linear import Linear, linear
from fxopt.passes.fuse_attention_heads.plan import HEADS_FIRST, is_flat, materialised

LEAST_BLOCKS = 4
MOST = 16384  # tokens: the search looks at all pairs of them, some rows at a time
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rows:
    """Outputs `start` to `stop` of a linear, which are the value of `node`."""

    linear: Linear
    node: fx.Node
    start: int
    stop: int


@dataclass(frozen=True)
class Site:
    """Attention of `heads` heads of `width` over `length` tokens.

    Attributes:
        inputs: the linears that make q, k and v and nothing else; None where there are none such.
        output: the linear that takes the result, and nothing else does; None where there is none.
        joined: the result as [batch, length, heads * width]; None where it is not brought into this form.
    """

    view: Attention
    heads: int
    length: int
    width: int
    inputs: tuple[Rows, Rows, Rows] | None
    joined: fx.Node | None
    output: Linear | None

    @property
    def folds(self) -> bool:
        """Whether an order of heads can be folded into the linears around it."""
        return self.inputs is not None and self.output is not None

    @property
    def dtype(self) -> torch.dtype:
        """The type of its operands."""
        value = tensor_value(self.view.q.node)
        assert value is not None, "site_of() has looked"
        return value.dtype

    @property
    def observed(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """What statistics are wanted of."""
        q, k, v = (operand.replay[-1] if operand.replay else operand.node for operand in self.operands)
        return q, k, v

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        """Of q, k and v."""
        return self.view.q, self.view.k, self.view.v

    def heads_first(self, value: Tensor, operand: Operand) -> Tensor:
        """[batch, heads, length, width] of a value of an observed node."""
        if self.view.heads:
            return value.reshape(-1, self.length, self.heads, self.width).transpose(1, 2)
        return value if operand.perm is None else value.permute(operand.perm)

    def projection(self, graph: Graph) -> Tensor | None:
        """The weight [out, heads * width] that takes the heads' results."""
        return None if self.output is None else self.output.weight(graph)


def site_of(graph: Graph, view: Attention) -> Site | Refusal:
    """The site of an attention, or why its heads cannot get patterns."""
    sizes = _sizes(view)
    if isinstance(sizes, Refusal):
        return sizes
    heads, length, width = sizes
    refused = _more(graph, view)
    if refused is not None:
        return refused
    if length < LEAST_BLOCKS * BLOCK:
        return Refusal("its {} tokens are fewer than {} blocks of {}", length, LEAST_BLOCKS, BLOCK)
    if length > MOST:
        text = "its {} tokens are more than {}: looking at all pairs of them would take hours; give a shorter sequence"
        return Refusal(text, length, MOST)
    value = tensor_value(view.q.node)
    if value is None or value.dtype not in FLOATS:
        dtype = "unknown" if value is None else value.dtype
        return Refusal("its type is {}; expected floats of at most 32 bits", dtype)
    inputs = _inputs(graph, view, heads * width)
    joined = _joined(graph, view, (length, heads * width))
    return Site(view, heads, length, width, inputs, joined, None if joined is None else _taker(graph, joined))


def find_site(graph: Graph, name: str) -> Site:
    """The site whose result is the node of this name."""
    for view in attentions(graph):
        if isinstance(view, Attention) and view.node.name == name:
            found = site_of(graph, view)
            assert isinstance(found, Site), f"{name} was a candidate"
            return found
    raise AssertionError(f"{name} is no attention of the graph")


def _sizes(view: Attention) -> tuple[int, int, int] | Refusal:
    q, k, v = (operand.shape for operand in (view.q, view.k, view.v))
    if q is None or k is None or v is None or len(q) != (3 if view.heads else 4):
        return Refusal("its operands are not of the form [batch, heads, length, width]")
    if view.groups > 1 or (view.heads and view.heads[0] != view.heads[1]):
        return Refusal("its heads share keys and values, which patterns of single heads would take apart")
    if not all(isinstance(size, int) for size in (*q[1:], *k[1:])):
        return Refusal("its length or width is known at run time only; patterns are for one fixed length")
    heads, channels = (view.heads[0], q[2]) if view.heads else (q[1], q[1] * q[3])
    if channels % heads:
        return Refusal("its {} channels are not a multiple of its {} heads", channels, heads)
    length, keys = q[-2], k[-2]
    if length != keys:
        return Refusal("it has {} queries and {} keys; patterns are for a sequence that sees itself", length, keys)
    if v[-1] != k[-1]:
        return Refusal("its values are {} wide, its keys {}", v[-1], k[-1])
    return heads, length, channels // heads


def _more(graph: Graph, view: Attention) -> Refusal | None:
    """What attention with patterns has not."""
    for term in view.terms:
        if graph.constant(term.node) is None:
            return Refusal("its mask {} depends on the data, patterns do not", label(term.node))
        return Refusal("its scores have a mask or bias of their own, {}", label(term.node))
    if view.left is not None or view.right is not None:
        return Refusal("it is causal or has a window already")
    if view.softcap or view.sink is not None:
        return Refusal("its scores have a soft cap or sinks, which attention with patterns has not")
    if view.factor is None:
        return Refusal("its scale is unknown")
    return None


def _inputs(graph: Graph, view: Attention, channels: int) -> tuple[Rows, Rows, Rows] | None:
    found = []
    for operand in (view.q, view.k, view.v):
        flat = operand.node if view.heads and not operand.replay else is_flat(graph, operand)
        made = None if flat is None else _rows(graph, flat)
        if made is None or made.stop - made.start != channels or len(shape_of(made.linear.x) or ()) != 3:
            return None
        found.append(made)
    return found[0], found[1], found[2]


def _rows(graph: Graph, node: fx.Node) -> Rows | None:
    """A linear, or a slice of one: queries, keys and values may have been made one."""
    whole = linear(graph, node)
    if isinstance(whole, Linear):
        return Rows(whole, node, 0, whole.features(graph)[0])
    part = read(graph, node, "slice")
    whole = None if part is None or not isinstance(part[0], fx.Node) else linear(graph, part[0])
    if part is None or not isinstance(whole, Linear):
        return None
    _, starts, ends, axes, steps = part
    lists = [list(each) if isinstance(each, (list, tuple)) else [] for each in (starts, ends, axes, steps)]
    if not all(len(each) == 1 and isinstance(each[0], int) for each in lists) or lists[2] != [2] or lists[3] != [1]:
        return None
    outputs = whole.features(graph)[0]
    start, stop, _ = slice(lists[0][0], lists[1][0]).indices(outputs)
    return Rows(whole, node, start, stop)


def _joined(graph: Graph, view: Attention, sizes: tuple[int, int]) -> fx.Node | None:
    """The result's value as [batch, length, heads * width], on the way to which nothing else takes it."""
    if view.heads:
        return view.node
    node, turned = view.node, view.result_perm == HEADS_FIRST
    if view.result_perm is not None and not turned:
        return None
    while True:
        user = only_user(node)
        if user is None:
            return None
        turn = read(graph, user, "transpose")
        if turn is not None and not turned and tuple(turn[1]) == HEADS_FIRST:
            turned = True
        elif turned and read(graph, user, "reshape") is not None:
            shape = shape_of(user) or ()
            return user if len(shape) == 3 and tuple(shape[1:]) == sizes else None
        elif read(graph, user, "identity") is None:
            return None
        node = user


def _taker(graph: Graph, joined: fx.Node) -> Linear | None:
    user = only_user(joined)
    found = None if user is None else linear(graph, user)
    return found if isinstance(found, Linear) and found.x is joined else None


def split(b: Builder, site: Site, x: fx.Node, heads: int) -> fx.Node:
    """[batch, heads, length, width] of [batch, length, heads * width]."""
    return b.transpose(b.reshape(x, [-1, site.length, heads, site.width]), HEADS_FIRST)


def join(b: Builder, site: Site, x: fx.Node, heads: int) -> fx.Node:
    """[batch, length, heads * width] of [batch, heads, length, width]."""
    return b.reshape(b.transpose(x, HEADS_FIRST), [-1, site.length, heads * site.width])


def operand_nodes(b: Builder, site: Site) -> list[Any]:
    """q, k and v as [batch, heads, length, width]."""
    if site.view.heads:
        return [split(b, site, operand.node, site.heads) for operand in site.operands]
    return [materialised(b, operand) for operand in site.operands]
