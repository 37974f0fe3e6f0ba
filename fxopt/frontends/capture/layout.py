"""Make a program independent of memory layouts, for torch's exporter, which derives them anew and then finds others.

A trace holds `view` where `forward` says `reshape`, because the layout that an attention kernel gave allowed it. The
exporter decomposes that attention otherwise, its result lies otherwise, and the view fails (T5, Swin).
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def is_about_layout(error: BaseException) -> bool:
    """Whether an export failed because a value lies otherwise than in the trace."""
    return "Cannot view a tensor" in str(error)


def free_of_layouts(exported: ExportedProgram) -> None:
    """Views become reshapes, and results of attention are laid out in order; the values stay the same."""
    graph = exported.graph
    for node in list(graph.nodes):
        if node.target in _VIEWS:
            node.target = aten.reshape.default
        if node.target is aten.scaled_dot_product_attention.default:
            with graph.inserting_after(node):
                ordered = graph.call_function(
                    aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
            ordered.meta = {**node.meta, "val": node.meta["val"].contiguous()}
            node.replace_all_uses_with(ordered, lambda user, ordered=ordered: user is not ordered)
