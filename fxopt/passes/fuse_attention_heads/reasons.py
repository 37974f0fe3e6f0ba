"""The ledger's rows of what is not fused: on the softmax, and on the products around it."""

from __future__ import annotations

from torch import fx

from fxopt.ir.graph import label, provenance
from fxopt.ir.ledger import Outcome, Refusal, Verdict
from fxopt.ir.views.attention import Attention, NotAttention
from fxopt.passes.base import Context


def explain(ctx: Context, pass_name: str, found: NotAttention) -> None:
    """Why a softmax is not understood as attention; without a product around it, it does not look like one."""
    outcome: Outcome = "refused" if found.is_candidate else "no-match"
    reason = str(found.reason) if found.is_candidate else f"a softmax that is no attention: {found.reason}"
    _add(ctx, Verdict(pass_name, label(found.node), outcome, reason))
    _around(ctx, pass_name, found.node, found.products, outcome, reason)


def refuse(ctx: Context, pass_name: str, view: Attention, reason: Refusal) -> None:
    """Why an attention is left as it is."""
    if view.softmax is None:
        _add(ctx, Verdict(pass_name, label(view.node), "refused", str(reason)))
        return
    _add(ctx, Verdict(pass_name, label(view.softmax), "refused", str(reason)))
    _around(ctx, pass_name, view.softmax, (view.node,), "refused", str(reason))


def whole(ctx: Context, pass_name: str, view: Attention) -> None:
    """What is one operator already, unless this pass made it."""
    if pass_name not in provenance(view.node)[1:]:
        _add(ctx, Verdict(pass_name, label(view.node), "no-match", "it is one operator already"))


def _around(
    ctx: Context, pass_name: str, softmax: fx.Node, products: tuple[fx.Node, ...], outcome: Outcome, reason: str
) -> None:
    for node in products:
        if node is not softmax:
            _add(ctx, Verdict(pass_name, label(node), outcome, f"a product around {label(softmax)}: {reason}"))


def _add(ctx: Context, verdict: Verdict) -> None:
    if verdict not in ctx.ledger.verdicts:
        ctx.ledger.add(verdict)
