"""Attention in all its spellings, as one operator or spelled out, in both dialects.

`attentions` gives a view of each, and for each softmax that is none the first condition that failed. A view is a
description: what it can be rewritten to, and whether that pays, is for passes to say.
"""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.ir.graph import Graph
from fxopt.ir.ledger import Refusal
from fxopt.ir.views.attention.masks import mask_kind, seen
from fxopt.ir.views.attention.operators import one_operator
from fxopt.ir.views.attention.seen import Seen
from fxopt.ir.views.attention.softmax import softmax
from fxopt.ir.views.attention.spelled import normalised, spelled_out
from fxopt.ir.views.attention.view import Attention, NotAttention, Operand, Rotary, Term

__all__ = ["Attention", "NotAttention", "Operand", "Rotary", "Seen", "Term", "attentions", "mask_kind", "seen"]


def attentions(graph: Graph) -> Iterator[Attention | NotAttention]:
    """Every attention of the graph in the order of execution, and every softmax that is none, with the reason."""
    for node in list(graph.calls()):
        whole = one_operator(graph, node)
        if isinstance(whole, Attention) and whole.heads is None:
            whole = normalised(graph, whole)
        if isinstance(whole, Refusal):
            yield NotAttention(node, whole, (node,))
        elif whole is not None:
            yield whole
        else:
            found = softmax(graph, node)
            if found is not None:
                yield spelled_out(graph, found)
