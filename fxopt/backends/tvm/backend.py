"""The TVM backend: ahead-of-time compilation to one C function, without TVM's runtime."""

from __future__ import annotations

from torch import fx

from fxopt.backends.base import Backend, Executable
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph
from fxopt.ir.target import Target


class Tvm(Backend):
    """TVM as code generator for CPUs and WebAssembly."""

    needs = ("tvm", "ziglang")
    extra = "tvm"

    @property
    def name(self) -> str:
        """The name on the command line."""
        return "tvm"

    def refuses(self, node: fx.Node, target: Target) -> str:
        """Operators without a kernel."""
        return f"{node.target} has no kernel"

    def supports(self, op: str, dtype: str, pattern: str = "") -> str:
        """The fxopt operators that have a kernel."""
        return f"operator {op} has no kernel"

    def compile(self, graph: Graph, target: Target, *, threads: int | None = None) -> Executable:
        """Compile the graph."""
        raise Unsupported("the tvm backend compiles no whole models yet")
