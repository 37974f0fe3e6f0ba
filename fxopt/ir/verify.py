"""Is the graph well formed, and does it still compute what it did?

Structure (of bodies too): topology, constants that exist, types re-derived for the changed neighbourhood only. Numbers:
an exact pass may be no further from float64 than the graph before it was.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from fxopt.errors import VerificationError
from fxopt.ir.fake_values import UNKNOWN, same_type
from fxopt.ir.graph import Graph, ValueSpec, label
from fxopt.ir.interpreter import Evaluator
from fxopt.ir.onnx.dtypes import from_numpy
from fxopt.ir.onnx.lane import is_host, to_tensor
from fxopt.ir.shapes import update
from fxopt.ir.subgraphs import CAPTURED, CAPTURED_NAMES, Subgraph

Snapshot = dict[fx.Node, tuple[Any, Any, Any]]
_SAMPLE_ELEMENTS = 1 << 28  # larger inputs are not made up
_SLACK = 16  # units in the last place of the largest element that an exact rewrite may add


def snapshot(graph: Graph) -> Snapshot:
    """What each node calls with which arguments; compared by `changed_nodes`."""
    return {node: (node.target, node.args, node.kwargs) for node in graph.fx.nodes}


def changed_nodes(graph: Graph, before: Snapshot) -> list[fx.Node]:
    """Nodes that are new or call something else than at the snapshot; linear in the number of nodes."""
    changed = []
    for node in graph.fx.nodes:
        old = before.get(node)
        if old is None:
            changed.append(node)
            continue
        target, args, kwargs = old
        same = target is node.target and args is node.args and kwargs is node.kwargs
        if not same and old != (node.target, node.args, node.kwargs):
            changed.append(node)
    return changed


def verify_structure(
    graph: Graph, changed: Iterable[fx.Node] | None = None, before: Iterable[fx.Node] | None = None
) -> None:
    """Check the graph, and derive the types of `changed` nodes and of what follows from them anew.

    Args:
        before: the nodes as they were, erased ones too: no more of them may fail on fake tensors than did then.

    Raises:
        VerificationError: a node uses a value that is not computed before it, a constant is missing, an operator is
            not callable or does not take its inputs, the signature changed, or an output has another type than before.
    """
    seen: set[fx.Node] = set()
    outputs = 0
    for node in graph.fx.nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                raise VerificationError(f"node {label(node)!r} uses {label(used)!r}, which is not computed before it")
        seen.add(node)
        outputs += node.op == "output"
        _check_node(graph, node)
    if outputs != 1:
        raise VerificationError(f"the graph has {outputs} output nodes; expected one")
    if len(graph.placeholders) != len(graph.inputs):
        raise VerificationError(f"{len(graph.placeholders)} input nodes; the signature has {len(graph.inputs)}")
    if len(graph.result_nodes) != len(graph.outputs):
        raise VerificationError(f"{len(graph.result_nodes)} outputs; the signature has {len(graph.outputs)}")
    for found in graph.subgraphs(recursive=False):
        _check_body(found)
    if changed is None:
        return
    results = set(graph.result_nodes)
    failed = None if before is None else {node for node in before if "failure" in node.meta}
    for node, old, new in update(graph, changed):
        if node in results and new is not UNKNOWN and not _same_output(old, new):
            raise VerificationError(f"output {label(node)!r} was {_shown(old)} and became {_shown(new)}")
    _check_dimensions(graph)
    if failed is not None:
        _check_failures(graph, failed)


def _check_body(found: Subgraph) -> None:
    """A body is well formed, and its owner gives it every value that it captures."""
    names: Any = found.owner.kwargs.get(CAPTURED_NAMES, ())
    values: Any = found.owner.kwargs.get(CAPTURED, ())
    if len(names) != len(values):
        raise VerificationError(f"{found.path}: {len(values)} captured values have {len(names)} names")
    missing = [name for name in found.graph.captures if name not in names]
    if missing:
        raise VerificationError(f"{found.path}: the body captures {missing}, which node {label(found.owner)!r} lacks")
    try:
        verify_structure(found.graph)
    except VerificationError as error:
        raise VerificationError(f"{found.path}: {error}") from error


def _check_dimensions(graph: Graph) -> None:
    """Symbolic sizes stay symbolic: torch fixes one silently when an operator needs it fixed."""
    for node, spec in zip(graph.placeholders, graph.inputs, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or spec.shape is None:
            continue
        for name, size in zip(spec.shape, value.shape, strict=True):
            if isinstance(name, str) and isinstance(size, torch.SymInt) and size.node.expr.is_number:
                raise VerificationError(f"dimension {name!r} of input {spec.name!r} was dynamic and became {size}")


def _check_failures(graph: Graph, before: set[fx.Node]) -> None:
    """A rewrite may move an operator that fails, but not add one."""
    now = [node for node in graph.fx.nodes if "failure" in node.meta]
    if len(now) <= len(before):
        return
    node = next(node for node in now if node not in before)
    raise VerificationError(f"node {label(node)!r} {node.meta['failure']}")


def output_types(graph: Graph) -> list[Any]:
    """The fake values of the outputs (None where unknown), to be compared after a pass."""
    return [node.meta.get("val") if isinstance(node, fx.Node) else None for node in graph.result_nodes]


def check_output_types(graph: Graph, before: Sequence[Any]) -> None:
    """Raise when an output whose type was and is known has another one."""
    for spec, old, new in zip(graph.outputs, before, output_types(graph), strict=True):
        if old is not None and new is not None and not _same_output(old, new):
            raise VerificationError(f"output {spec.name!r} was {_shown(old)} and became {_shown(new)}")


def _same_output(old: Any, new: Any) -> bool:
    """Whether the type is the same; a small int64 constant in the place of a tensor is in the host lane."""
    if isinstance(old, torch.Tensor) == isinstance(new, torch.Tensor):
        return same_type(old, new)
    tensor, host = (old, new) if isinstance(old, torch.Tensor) else (new, old)
    if not is_host(host):
        return False
    dtype = torch.int64 if host.dtype == object else from_numpy(np.zeros((), host.dtype)).dtype
    return same_type(tensor, torch.empty(host.shape, dtype=dtype, device="meta"))


def _check_node(graph: Graph, node: fx.Node) -> None:
    if node.op in ("placeholder", "output"):
        return
    if node.op == "get_attr":
        try:
            graph.attribute(str(node.target))
        except AttributeError:
            raise VerificationError(
                f"node {label(node)!r} refers to the constant {node.target!r}, which is gone"
            ) from None
    elif node.op != "call_function" or not callable(node.target):
        raise VerificationError(
            f"node {label(node)!r} is a {node.op} of {node.target!r}; expected a call of an operator"
        )


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{[str(dim) for dim in value.shape]}"
    return "unknown" if value is None else type(value).__name__


# ---- numbers


def synthetic_sample(inputs: Sequence[ValueSpec], sizes: dict[str, int], seed: int = 0) -> list[torch.Tensor] | None:
    """Inputs for verification when the user gave none: normal floats, integers 0 and 1; None when types are unknown
    or an input is huge."""
    generator = torch.Generator().manual_seed(seed)
    sample = []
    for spec in inputs:
        if spec.dtype is None or spec.shape is None or any(dim is None for dim in spec.shape):
            return None
        shape = [sizes.get(dim, 2) if isinstance(dim, str) else int(dim or 0) for dim in spec.shape]
        if math.prod(shape) > _SAMPLE_ELEMENTS:
            return None
        if spec.dtype.is_floating_point:
            sample.append(torch.randn(shape, generator=generator).to(spec.dtype))
        else:
            sample.append(torch.randint(0, 2, shape, generator=generator).to(spec.dtype))
    return sample


@dataclass
class NumericCheck:
    """Compares graphs with the original on one sample: `reference` in float64, `before` in the model's own types."""

    sample: Sequence[Any]
    reference: list[Any]
    before: list[Any]
    evaluator: Evaluator | None

    @classmethod
    def of(cls, graph: Graph, sample: Sequence[Any], evaluator: Evaluator | None = None) -> NumericCheck:
        """Run the original graph twice."""
        return cls(
            sample,
            graph.run(sample, evaluator=evaluator, widen=True),
            graph.run(sample, evaluator=evaluator),
            evaluator,
        )

    def difference(self, graph: Graph, specs: Sequence[ValueSpec] | None = None) -> str:
        """ "" when the graph is no further from float64 than twice the original, else what differs and by how much."""
        now = graph.run(self.sample, evaluator=self.evaluator)
        for spec, exact, before, after in zip(graph.outputs, self.reference, self.before, now, strict=True):
            found = _differs(exact, before, after)
            if found:
                return f"output {spec.name!r}: {found}"
        return ""


_COMPARED: tuple[Any, ...] = (torch.Tensor, np.ndarray, dict, (list, tuple))


def _differs(exact: Any, before: Any, after: Any) -> str:
    """`_worse` for every value of a run: sequences and maps item by item, strings and small numbers exactly."""
    exact, before, after = map(to_tensor, (exact, before, after))
    kind = next((kind for kind in _COMPARED if isinstance(before, kind)), None)
    if kind is None:
        return ""
    if not isinstance(after, kind):
        return f"was {_shown(before)} and became {_shown(after)}"
    if isinstance(before, torch.Tensor):
        return _worse(exact, before, after)
    if isinstance(before, np.ndarray):
        same = before.dtype == after.dtype and np.array_equal(before, after)
        return "" if same else f"an array of {before.dtype} has other elements than before"
    if isinstance(before, dict):
        if before.keys() != after.keys():
            return "a map has other keys than before"
        exact, before, after = ([torch.tensor(map_[key]) for key in before] for map_ in (exact, before, after))
    if len(before) != len(after):
        return f"had {len(before)} items and has {len(after)}"
    return next(filter(None, map(_differs, exact, before, after)), "")


def _worse(exact: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> str:
    if before.shape != after.shape or before.dtype != after.dtype:
        return f"was {_shown(before)} and became {_shown(after)}"
    if before.numel() == 0:
        return ""
    if not before.dtype.is_floating_point:
        wrong = int((before != after).sum())
        return f"{wrong} of {before.numel()} elements differ" if wrong else ""
    exact, wide_before, wide_after = exact.double(), before.double(), after.double()
    if not torch.equal(torch.isfinite(wide_before), torch.isfinite(wide_after)):
        return "other elements are infinite or NaN than before"
    finite = torch.isfinite(exact) & torch.isfinite(wide_before)
    if not bool(finite.any()):
        return ""
    error_before = (wide_before - exact)[finite].abs().max().item()
    error_after = (wide_after - exact)[finite].abs().max().item()
    allowed = 2 * error_before + _SLACK * torch.finfo(before.dtype).eps * exact[finite].abs().max().item()
    if error_after <= allowed:
        return ""
    return f"largest error against float64 {error_after:.3g}, was {error_before:.3g} (allowed {allowed:.3g})"


def first_divergence(before: Graph, after: Graph, sample: Sequence[Any], evaluator: Evaluator | None = None) -> str:
    """The name of the first node, by label, whose value differs between the graphs; "" when none does."""
    values: dict[str, Any] = {}
    before.run(sample, evaluator=evaluator, observer=lambda node, value: values.setdefault(label(node), value))
    found: list[str] = []

    def compare(node: fx.Node, value: Any) -> None:
        old = values.get(label(node))
        if found or node.target is operator.getitem or not isinstance(old, torch.Tensor):
            return
        if isinstance(value, torch.Tensor) and (
            old.shape != value.shape
            or not torch.allclose(old.double(), value.double(), rtol=1e-4, atol=1e-5, equal_nan=True)
        ):
            found.append(label(node))

    after.run(sample, evaluator=evaluator, observer=compare)
    return found[0] if found else ""
