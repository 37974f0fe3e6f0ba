"""The TVM backend: a model as one C function, without TVM's runtime; what has no kernel runs in torch, and says so."""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import fx

from fxopt.backends.base import Backend, Executable
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, hint, label
from fxopt.ir.sparsity import Pattern
from fxopt.ir.target import Target


class Tvm(Backend):
    """TVM as code generator for CPUs and WebAssembly."""

    needs = ("tvm", "ziglang", "wasmtime")
    extra = "tvm"

    @property
    def name(self) -> str:
        """The name on the command line."""
        return "tvm"

    def refuses(self, node: fx.Node, target: Target) -> str:
        """The reason why the node has no kernel: found by lowering it alone, at the sizes of its fake tensors."""
        from fxopt.backends.tvm.trial import refusal

        return refusal(node)

    def supports(self, op: str, dtype: str, pattern: str = "") -> str:
        """The fxopt operators that have a kernel: none yet; sparsity needs no operator."""
        from fxopt.backends.tvm.rules import RULES

        return "" if op in RULES else f"operator {op} has no kernel in the tvm backend"

    def skips_zeros(self, target: Target, dtype: str, pattern: str, shape: tuple[int, int] | None = None) -> str:
        """Blocks of at least a vector of outputs, in floats."""
        from fxopt.backends.tvm.machine import machine_for

        found, machine = Pattern.parse(pattern), machine_for(target)
        if found.is_counted or found.outputs % machine.lanes:
            return (
                f"{pattern} gives no time on {target.name}: kernels skip blocks of outputs, a multiple of "
                f"{machine.lanes} (such as {machine.columns}x1)"
            )
        return "" if dtype == "float32" else f"kernels that skip zeros take float32, not {dtype}"

    def compile(self, graph: Graph, target: Target, *, threads: int | None = None) -> Executable:
        """Compile the whole graph, or what of it has kernels.

        Named dimensions take the sizes that the graph was captured with; on this machine, other sizes are compiled
        when they come.

        Raises:
            Unsupported: the graph is of ONNX operators, or a part has no kernel and the target is not this machine.
        """
        self.require()
        from fxopt.backends.tvm.executable import TvmExecutable
        from fxopt.backends.tvm.machine import machine_for
        from fxopt.backends.tvm.mixed import MixedExecutable
        from fxopt.backends.tvm.trial import refusals

        if graph.origin != "torch":
            raise Unsupported("the tvm backend takes graphs of aten operators; load the model from PyTorch")
        machine = machine_for(target)
        runner = machine if machine.family in ("wasm", _family()) and _runs(target) else _host_machine()
        refused = {label(node): reason for node, reason in refusals(graph).items()}
        if not refused:
            return TvmExecutable(graph.copy(), machine, runner, _shapes(graph))
        if runner != machine or machine.family == "wasm":
            shown = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise Unsupported(f"{len(refused)} operators have no kernel, and torch is not on {target.name}: {shown}")
        return MixedExecutable(graph.copy(), machine, lambda node: self.refuses(node, target))


def _shapes(graph: Graph) -> tuple[tuple[int, ...], ...]:
    shapes = []
    for node, spec in zip(graph.placeholders, graph.inputs, strict=True):
        value: Any = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            raise Unsupported(f"input {spec.name!r} is no tensor of a known shape")
        shapes.append(tuple(int(hint(dim)) for dim in value.shape))
    return tuple(shapes)


def _family() -> str:
    return {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}.get(platform.machine().lower(), "")


def _host_machine() -> Any:
    from fxopt.backends.tvm.machine import machine_for
    from fxopt.cost_model.targets import get_target

    return machine_for(get_target("host"))


def _runs(target: Target) -> bool:
    """Whether code for the target runs here: this machine has its instruction sets."""
    from fxopt.cost_model.targets import get_target

    return target.kind == "wasm" or target.features <= get_target("host").features


__all__ = ["Tvm"]
