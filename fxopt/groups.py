"""Which kinds of rewritten operator are slower than what they replaced: one representative of each, timed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from fxopt.guard import measure
from fxopt.ir.graph import Graph, ValueSpec, hint, provenance, shape_of
from fxopt.passes.base import Candidate
from fxopt.passes.stats import Stats

_SECONDS = 0.4  # per representative, at most
Compiled = Callable[[Graph, str], Callable[[], object] | None]


def slow_groups(
    exact: Graph, rewritten: Graph, chosen: Sequence[Candidate], representative: Compiled, seconds: float = 10.0
) -> dict[str, str]:
    """Groups whose representative is not faster than what it replaced, with the reason; within about `seconds`."""
    ratios = group_ratios(exact, rewritten, chosen, representative, seconds)
    return {
        group: f"measured alone, {group} runs at {ratio:.2f}x: slower than what it replaces"
        for group, ratio in ratios.items()
        if ratio < 1.0
    }


def group_ratios(
    exact: Graph, rewritten: Graph, chosen: Sequence[Candidate], representative: Compiled, seconds: float = 10.0
) -> dict[str, float]:
    """How many times as fast one representative of each group is as what it replaced; those that can be cut out."""
    ratios: dict[str, float] = {}
    groups: dict[str, Candidate] = {}
    for candidate in chosen:
        groups.setdefault(candidate.group, candidate)
    share = min(_SECONDS, seconds / len(groups))
    for group, candidate in groups.items():
        old = exact.find(candidate.node)
        new = None if old is None else _made_of(rewritten, provenance(old)[0], candidate.pass_name)
        if new is None:
            continue
        before = representative(exact, new.meta.get("stands_for", candidate.node))
        after = representative(rewritten, new.name)
        if before is None or after is None:
            continue
        ratios[group] = measure(before, after, share).ratio
    return ratios


def _made_of(rewritten: Graph, source: str, pass_name: str) -> fx.Node | None:
    """The last node that the pass made of the one named `source`."""
    found = None
    for node in rewritten.calls():
        first, *passes = provenance(node)
        if first == source and pass_name in passes:
            found = node
    return found


def cut_out(graph: Graph, node_name: str, stats: Stats) -> tuple[Graph, list[torch.Tensor]] | None:
    """The operator (with what the view swallows) as a graph of its own, and an input of the observed range.

    The graph is cut where exactly one computed value enters.
    """
    node = graph.find(node_name)
    if node is None:
        return None
    inner = [node]
    entry = _entries(inner)
    while len(entry) == 1 and entry[0] not in stats and entry[0].op == "call_function":
        inner.insert(0, entry[0])
        entry = _entries(inner)
    if len(entry) != 1:
        return None
    shape = shape_of(entry[0])
    value = entry[0].meta.get("val")
    if shape is None or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return None
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn([hint(dim) for dim in shape], generator=generator).to(value.dtype)
    return _graph_of(graph, entry[0], inner, value.dtype, len(shape)), [sample]


def _entries(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(nodes)
    found = {
        used: None for node in nodes for used in node.all_input_nodes if used not in inside and used.op != "get_attr"
    }
    return list(found)


def _graph_of(graph: Graph, entry: fx.Node, inner: Sequence[fx.Node], dtype: torch.dtype, rank: int) -> Graph:
    import onnx

    from fxopt.ir.onnx.dtypes import FROM_TORCH
    from fxopt.ir.onnx.records import InputRecord, ModelRecord

    fresh = fx.Graph()
    placeholder = fresh.placeholder("x")
    placeholder.meta["onnx"] = InputRecord("x")
    mapping: dict[fx.Node, fx.Node] = {entry: placeholder}
    for node in inner:
        for used in node.all_input_nodes:
            if used.op == "get_attr" and used not in mapping:
                mapping[used] = fresh.node_copy(used, mapping.__getitem__)
                mapping[used].meta = dict(used.meta)
        mapping[node] = fresh.node_copy(node, mapping.__getitem__)
    result = mapping[inner[-1]]
    fresh.output((result,))
    spec_in = ValueSpec("x", dtype, (None,) * rank)
    spec_out = ValueSpec("y", dtype, None)
    record = None
    if graph.model is not None:
        proto = onnx.ModelProto.FromString(graph.model.proto.SerializeToString())
        proto.ClearField("graph")
        proto.graph.name = "part"
        proto.graph.input.append(onnx.helper.make_tensor_value_info("x", FROM_TORCH[dtype], [None] * rank))
        proto.graph.output.append(onnx.helper.make_tensor_value_info("y", FROM_TORCH[dtype], None))
        record = ModelRecord(proto)
    return Graph(fresh, graph.root, graph.origin, (spec_in,), (spec_out,), "part", record)
