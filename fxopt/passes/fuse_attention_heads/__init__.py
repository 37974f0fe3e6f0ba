"""Find every attention, write it as the one operator that the backend runs faster, and say why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.ir.graph import Graph, label, tensor_value
from fxopt.ir.ledger import Refusal
from fxopt.ir.views.attention import Attention, attentions
from fxopt.passes.base import Context, ExactPass
from fxopt.passes.fuse_attention_heads.onnx_form import OPSETS, Masks, fuse_onnx, onnx_refusal, simplifies_onnx
from fxopt.passes.fuse_attention_heads.plan import Plan, planned
from fxopt.passes.fuse_attention_heads.qkv import merge, projections
from fxopt.passes.fuse_attention_heads.reasons import explain, refuse, stay, whole
from fxopt.passes.fuse_attention_heads.torch_form import fuse_torch, needs_fxopt, simplifies_torch, torch_refusal

__all__ = ["FuseAttentionHeads"]


@dataclass(frozen=True)
class FuseAttentionHeads(ExactPass):
    """Write attention in all its spellings as the one operator that the backend runs faster."""

    enters_bodies: ClassVar[bool] = True

    def opset(self, graph: Graph, ctx: Context) -> int:
        """The version of the ONNX standard that fusing needs."""
        if graph.origin != "onnx" or _opset(graph) >= OPSETS[0]:
            return 0
        graphs = (graph, *(found.graph for found in graph.subgraphs()))
        return OPSETS[0] if any(_can_fuse(each, ctx) for each in graphs) else 0

    def run(self, graph: Graph, ctx: Context) -> int:
        """Returns how many attentions were fused."""
        changes = 0
        masks: Masks = {}
        for view in list(attentions(graph)):
            if not isinstance(view, Attention):
                explain(ctx, self.name, view)
                continue
            plan = _planned(graph, view, ctx)
            if plan is None:
                whole(ctx, self.name, view)
                continue
            if isinstance(plan, Plan) and graph.origin == "onnx" and _opset(graph) not in OPSETS:
                plan = Refusal("Attention has a fast kernel at opsets 23 and 24; the model has {}", _opset(graph))
            if isinstance(plan, Refusal):
                refuse(ctx, self.name, view, plan)
                continue
            if graph.origin == "onnx":
                fuse_onnx(graph, plan, masks, _opset(graph), self.name)
            else:
                fuse_torch(graph, plan, masks, self.name)
            changes += 1
        changes += self._project(graph, ctx)
        if changes:
            graph.prune()
        return changes

    def _project(self, graph: Graph, ctx: Context) -> int:
        """Queries, keys and values of one input as one linear, where the backend is faster then."""
        changes = 0
        for view in list(attentions(graph)):
            parts = projections(graph, view, ctx) if isinstance(view, Attention) else None
            if isinstance(parts, Refusal) and isinstance(view, Attention):
                stay(ctx, self.name, view, parts)
            elif isinstance(parts, tuple):
                merge(graph, parts, self.name)
                changes += 1
        return changes


def _can_fuse(graph: Graph, ctx: Context) -> bool:
    """Whether some attention that is spelled out would be fused."""
    spelled = (view for view in attentions(graph) if isinstance(view, Attention) and view.kind == "spelled-out")
    return any(isinstance(_planned(graph, view, ctx), Plan) for view in spelled)


def _planned(graph: Graph, view: Attention, ctx: Context) -> Plan | Refusal | None:
    """How an attention is fused for the backend, or why it is not; None where it is one operator that says all."""
    excluded = _excluded(ctx, view)
    if excluded is not None:
        return excluded
    value = tensor_value(view.q.node)
    if value is None:
        return Refusal("the type of its query is unknown") if view.kind == "spelled-out" else None
    is_torch = graph.origin != "onnx"
    bands = is_torch and needs_fxopt(view)
    plan = planned(graph, view, bands)
    if view.kind != "spelled-out":
        if isinstance(plan, Refusal) or (not is_torch and _opset(graph) not in OPSETS):
            return None
        return plan if (simplifies_torch if is_torch else simplifies_onnx)(graph, plan) else None
    operator = "attention" if bands else "scaled_dot_product_attention" if is_torch else "Attention"
    if view.softcap and not is_torch:
        operator = "Attention with a soft cap"
    unsupported = ctx.supports(operator, str(value.dtype).removeprefix("torch."))
    if unsupported:
        return Refusal(unsupported)
    if isinstance(plan, Refusal):
        return plan
    return (torch_refusal(plan) if is_torch else onnx_refusal(plan)) or plan


def _excluded(ctx: Context, view: Attention) -> Refusal | None:
    """The refusal of an attention that the user left out by the name of its softmax or of its result."""
    names = [label(node) for node in (view.node, view.softmax) if node is not None]
    refused = [refusal for refusal in map(ctx.excluded, names) if refusal is not None]
    is_included = ctx.exclude is None and len(refused) < len(names)
    return refused[0] if refused and not is_included else None


def _opset(graph: Graph) -> int:
    return 0 if graph.model is None else int(graph.model.opsets.get("", 0))
