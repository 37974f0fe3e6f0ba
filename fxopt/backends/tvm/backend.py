"""The TVM backend: a model as C functions without TVM's runtime, for CPUs and WebAssembly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from fxopt.backends.base import Backend, Executable
from fxopt.backends.tvm.buckets import Buckets, checked_buckets, combinations, dimensions, guessed_sizes, parse_buckets
from fxopt.backends.tvm.machine import KNOWN, Machine, machine_for, machines_for
from fxopt.errors import Unsupported, unknown
from fxopt.ir.graph import Graph, label, provenance
from fxopt.ir.onnx.op import OnnxOp
from fxopt.ir.sparsity import Pattern
from fxopt.ir.target import Cost, Prediction, Target

PLACES = ("embedded", "external")  # of weights: in the library, or in a file beside it

_ATTENTION = ("scaled_dot_product_attention", "Attention")  # one kernel; the ONNX operator is lowered to torch's


class Tvm(Backend):
    """TVM as code generator for CPUs and WebAssembly.

    Args:
        buckets: sizes of the named dimensions, an entry point for each combination; as text "batch=1,4;length=128".
        weights: "embedded" in the library, or "external" in a file beside it.
        features: instruction sets beside those of the target, as text "dotprod,...".
    """

    needs = ("tvm", "ziglang", "wasmtime")
    extra = "tvm"
    cores = 1
    is_compiler = True
    options = ("buckets", "weights", "features")

    def __init__(
        self,
        buckets: Mapping[str, int | Sequence[int]] | str | None = None,
        weights: str = "embedded",
        features: str = "",
        name: str = "",
    ) -> None:
        self.buckets: Buckets = (
            parse_buckets(buckets.split(";")) if isinstance(buckets, str) else checked_buckets(buckets or {})
        )
        if weights not in PLACES:
            raise unknown("place of weights", weights, PLACES)
        self.weights = weights
        self.features = frozenset(filter(None, re.split(r"[,+ ]+", features)))
        for feature in self.features:
            if feature not in KNOWN:
                raise unknown("instruction set", feature, KNOWN)
        self._model = name

    @property
    def name(self) -> str:
        """The name on the command line."""
        return "tvm"

    def with_sizes(self, sizes: Mapping[str, int], name: str) -> Tvm:
        """The same with more buckets; those that were given win."""
        fixed = {dim: (size,) for dim, size in sizes.items()}
        return Tvm({**fixed, **self.buckets}, self.weights, ",".join(self.features), name)

    def check(self, graph: Graph, target: Target) -> None:
        """Every dimension must have sizes, but on this machine; the processor must have its instruction sets."""
        from fxopt.backends.tvm.lower import check_processor

        if not target.is_host:
            combinations(graph, self.buckets)
        for machine in machines_for(self._featured(target)):
            check_processor(machine)

    def _featured(self, target: Target) -> Target:
        return replace(target, features=target.features | self.features) if self.features else target

    def refuses(self, node: fx.Node, target: Target) -> str:
        """The reason why the node has no kernel: found by lowering it alone, at the sizes of its fake tensors."""
        from fxopt.backends.tvm.trial import refusal

        return refusal(node)

    def supports(self, op: str, dtype: str, pattern: str = "") -> str:
        """The operators that have a kernel; sparsity needs none, for weights are looked at."""
        from fxopt.backends.tvm.rules import RULES

        if op in _ATTENTION:
            return "" if dtype == "float32" else f"the tvm backend's kernel of attention takes float32, not {dtype}"
        if op == "linear_nbits" and "activations=int8" in pattern:
            return "codes of few bits are multiplied as floats; rounding the input gains nothing: use activations=float"
        return "" if op in RULES else f"operator {op} has no kernel in the tvm backend"

    def predicted(self, cost: Cost, target: Target) -> Prediction | None:
        """Of linears whose weights are decoded."""
        from fxopt.backends.tvm.prices import predicted

        return predicted(cost, target)

    def skips_zeros(self, target: Target, dtype: str, pattern: str, shape: tuple[int, int] | None = None) -> str:
        """Blocks of at least a vector of outputs."""
        found, machine = Pattern.parse(pattern), machine_for(target)
        if found.is_counted or found.outputs % machine.lanes:
            return (
                f"{pattern} gives no time on {target.name}: kernels skip blocks of outputs, a multiple of "
                f"{machine.lanes} (such as {machine.columns}x1)"
            )
        return "" if dtype in ("float32", "int8") else f"kernels that skip zeros take float32 and int8, not {dtype}"

    def compile(self, graph: Graph, target: Target, *, threads: int | None = None) -> Executable:
        """Compile the graph for each bucket; on this machine, what has no kernel runs in torch.

        Without buckets, dimensions stay open on this machine: other sizes are compiled when they come, and there is
        nothing to save.

        Raises:
            Unsupported: a dimension has no sizes; operators have no kernel (all are named), or no aten form; the
                target's processor lacks one of its instruction sets.
        """
        self.require()
        from fxopt.backends.tvm.executable import TvmExecutable
        from fxopt.backends.tvm.expand import settled
        from fxopt.backends.tvm.lower import check_processor
        from fxopt.backends.tvm.mixed import MixedExecutable
        from fxopt.backends.tvm.package import Package
        from fxopt.backends.tvm.source import identifier, source_at, sources

        target = self._featured(target)
        machines = machines_for(target)
        for machine in machines:
            check_processor(machine)
        runner = machines[-1] if runs_here(target) else _host_machine()
        name = identifier(self._model or graph.name)
        open_ = not self.buckets and bool(dimensions(graph)) and runner in machines and runner.family != "wasm"
        made = [source_at(graph, guessed_sizes(graph), name, name)] if open_ else sources(graph, self.buckets, name)
        found = [settled(source, runner) for source in made]
        made, reasons = [source for source, _ in found], found[0][1]
        refused = _by_name(graph, reasons)
        if not refused:
            embedded = self.weights == "embedded"
            package = Package(name, {name: graph.copy()}, made, target, machines, runner, embedded=embedded)
            return TvmExecutable(package, is_open=open_)
        if runner not in machines or runner.family == "wasm":
            shown = "; ".join(f"{place}: {reason}" for place, reason in refused.items())
            count = f"{len(refused)} operators have" if len(refused) > 1 else "1 operator has"
            raise Unsupported(f"{count} no kernel for {target.name}: {shown}")
        return MixedExecutable(made[0], target, runner, lambda node: reasons.get(node, ""))


def _by_name(graph: Graph, reasons: Mapping[fx.Node, str]) -> dict[str, str]:
    """The first reason of each operator of the model; ONNX operators with the attributes that they were lowered by."""
    if graph.origin == "torch":
        return {label(node): reason for node, reason in reasons.items()}
    nodes = {label(node): node for node in graph.calls()}
    found: dict[str, str] = {}
    for lowered, reason in reasons.items():
        name = provenance(lowered)[0]
        found.setdefault(f"{name}{_attributes(nodes.get(name))}", reason)
    return found


def _attributes(node: fx.Node | None) -> str:
    """ " (Attention, softcap=2.0)"."""
    if node is None or not isinstance(node.target, OnnxOp):
        return ""
    simple = [f"{key}={value!r}" for key, value in node.kwargs.items() if isinstance(value, (int, float, str))]
    return f" ({', '.join([node.target.op_type, *(item for item in simple if not item.startswith('_'))])})"


def _host_machine() -> Machine:
    from fxopt.cost_model.targets import get_target

    return machine_for(get_target("host"))


def runs_here(target: Target) -> bool:
    """Whether code for the target runs here: in wasmtime, or because this machine has its instruction sets."""
    from fxopt.cost_model.targets import get_target

    if target.kind == "wasm":
        return True
    host = get_target("host")
    return target.arch == host.arch and target.features <= host.features
