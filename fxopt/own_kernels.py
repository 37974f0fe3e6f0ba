"""Own kernels behind a finished plan: 8-bit linears with what follows them, where that is measured to be faster.

They are operators of a library that lies beside the `.onnx` file and that its session must register, so they are used
when asked for (`custom_ops`), never by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx

from fxopt import own_attention, own_sparse
from fxopt.backends.base import Backend
from fxopt.errors import InvalidOption, MissingDependency
from fxopt.guard import Timing, measure
from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Verdict
from fxopt.ir.masks import marks, verify_masks
from fxopt.ir.shapes import infer
from fxopt.ir.target import Target
from fxopt.passes.fuse_int8 import FuseInt8
from fxopt.passes.stats import collect
from fxopt.request import Lossy, Sample
from fxopt.rewriting import keeping_masks

if TYPE_CHECKING:
    from fxopt.engine import Optimizer

_NEEDS = ("tvm", "ziglang")


def require_own_kernels(backend: Backend, target: Target) -> None:
    """Raise when own kernels cannot be made for the backend on the target.

    Raises:
        InvalidOption: the backend takes none, or the target is not this machine or not an x86-64 CPU.
        MissingDependency: a package that compiles them is not installed.
    """
    if backend.name != "onnxruntime":
        raise InvalidOption(f"custom_ops: backend {backend.name} takes no custom operators; expected onnxruntime")
    if not target.is_host or not target.arch.startswith("x86") or "avx2" not in target.features:
        raise InvalidOption(
            f"custom_ops: own kernels are made for and measured on this machine, an x86-64 CPU with AVX2; "
            f"the target is {target.name} ({target.arch})"
        )
    import importlib.util

    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"custom_ops needs {', '.join(missing)} to compile kernels; install: pip install 'fxopt[tvm]'"
        )


def with_own_kernels(job: Optimizer, lossy: Lossy, sample: Sample | None, seconds: float) -> Lossy:
    """The result on own kernels where they are faster and within the budget, else the one that was given.

    Args:
        sample: what both are timed on; None: not timed, own kernels are taken.
    """
    name = FuseInt8().name
    graph = lossy.graph.copy()
    nodes = [label(node) for node in graph.calls() if "linear_w8a8" in str(node.target)]
    with job.stage("own kernels"):
        changes = keeping_masks(FuseInt8(), graph, job.context)
    if not changes:
        job.ledger.note("custom_ops: no 8-bit linear with a calibrated range is there to be computed by own kernels")
        return lossy
    with job.stage("own kernels"):
        fused = job.measured(graph, lossy.plan)
    refused = {verdict.node for verdict in job.ledger.select(pass_name=name, outcome="refused")}
    done = {node: "" for node in nodes if node not in refused}
    trial = _tried(job, lossy, replace(fused, plan=lossy.plan), sample, seconds)
    if trial.is_better:
        _record(job, name, done, trial)
        found = _with_attention(job, trial.best, sample, seconds)
        return _with_sparse(job, found, found.graph, sample, seconds)
    found = _with_sparse(job, lossy, graph, sample, seconds)  # the dense kernels are slower, the sparse ones may not be
    if found is not lossy:
        trial = replace(trial, is_better=True, why=f"in the same library as sparse kernels ({trial.why})")
    _record(job, name, done, trial)
    return found


def _with_attention(job: Optimizer, lossy: Lossy, sample: Sample | None, seconds: float) -> Lossy:
    """The same with attention on bytes, under the same conditions."""
    graph = lossy.graph.copy()
    infer(graph, lossy.graph.sizes)
    for node in graph.nodes:
        node.meta.pop("stands_for", None)  # statistics are collected on this graph
    found = own_attention.places(graph, job.context)
    if not found:
        return lossy
    nodes = {label(place.node): "" for place in found}
    with job.stage("own kernels"):
        linears = [linear for place in found for linear in place.linears]
        stats = collect(graph, job.calibration, linears, evaluator=job.evaluator)
        scores: dict[fx.Node, fx.Node] = {}
        for place in found:
            own_attention.on_bytes(graph, place, stats, scores)
        verify_masks(graph, marks(lossy.graph))
        graph.prune()
        fused = job.measured(graph, lossy.plan)
    return _chosen(job, own_attention.NAME, nodes, lossy, fused, sample, seconds)


def _with_sparse(job: Optimizer, lossy: Lossy, base: Graph, sample: Sample | None, seconds: float) -> Lossy:
    """`base` with kernels that leave out zero blocks of weights, where there are enough of them, if it is faster."""
    graph = base.copy()
    infer(graph, lossy.graph.sizes)
    found = own_sparse.places(graph, job.context)
    if not found:
        return lossy
    nodes = {place.name: place.reason for place in found}
    with job.stage("own kernels"):
        for place in found:
            own_sparse.without_zeros(graph, place)
        verify_masks(graph, marks(lossy.graph))
        graph.prune()
        sparse = job.measured(graph, lossy.plan)
    return _chosen(job, own_sparse.NAME, nodes, lossy, sparse, sample, seconds)


@dataclass(frozen=True)
class _Trial:
    """Which of two results goes on, and why; the other one is closed."""

    best: Lossy
    is_better: bool  # the second one is it
    why: str


def _chosen(
    job: Optimizer,
    name: str,
    nodes: Mapping[str, str],
    lossy: Lossy,
    fused: Lossy,
    sample: Sample | None,
    seconds: float,
) -> Lossy:
    """`fused` where it is within the budget and faster, else `lossy`; the other one is closed.

    Args:
        nodes: what the verdicts are about, and what their reasons begin with.
    """
    trial = _tried(job, lossy, fused, sample, seconds)
    _record(job, name, nodes, trial)
    return trial.best


def _tried(job: Optimizer, lossy: Lossy, fused: Lossy, sample: Sample | None, seconds: float) -> _Trial:
    budget = job.request.budget
    why = "not measured (--force)"
    is_better = True
    if budget is not None and not fused.loss <= budget:
        why, is_better = f"over budget: measured loss {fused.loss:.3g}", False
    elif sample is not None:
        timing = _compared(lossy, fused, sample, seconds)
        why = f"measured {timing.ratio:.2f}x ({timing.low:.2f} to {timing.high:.2f}) over what it replaces"
        if timing.low < 1.0:
            why, is_better = f"{why}: not surely faster", False
    (lossy if is_better else fused).executable.close()
    return _Trial(fused if is_better else lossy, is_better, why)


def _record(job: Optimizer, name: str, nodes: Mapping[str, str], trial: _Trial) -> None:
    for node, reason in nodes.items():
        text = "; ".join(part for part in (reason, trial.why) if part)
        job.ledger.add(Verdict(name, node, "applied" if trial.is_better else "rolled-back", text))


def _compared(lossy: Lossy, fused: Lossy, sample: Sample, seconds: float) -> Timing:
    def running(one: Lossy) -> Callable[[], object]:
        return lambda: one.executable.run(sample)

    return measure(running(lossy), running(fused), seconds)
