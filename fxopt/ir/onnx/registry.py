"""Which ONNX operators have a torch reference, by (domain, operator type).

Each file of `references/` holds one operator family and one module-level `operators = Operators(domain)`; nothing
registers by being imported. A reference is a plain torch function

    @operators.reference("Softmax")
    def softmax(call: Call, x: Tensor, axis: int | None = None) -> Tensor: ...

that computes the operator's specification: inputs are positional (None = omitted), attributes are keywords with the
specification's defaults, `call.version` is the since-version in force and `call.outputs` the number of outputs wanted
(one output is returned bare, several as a tuple). It must be composite and out of place, so that fake tensors and
`torch.export` go through it. An operator that shapes pass through also has a host implementation (see `lane`), which
may return NotImplemented to fall back to the tensor lane.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """What a reference may know about the node beside its inputs and attributes."""

    version: int  # since-version of the operator schema in force
    outputs: int = 1


@dataclass(frozen=True)
class Reference:
    """The implementations of one operator; `raw` keeps host arrays as they are in the tensor implementation."""

    torch: Function
    host: Function | None = None
    raw: bool = False


class Operators:
    """The operators that one file implements."""

    def __init__(self, domain: str = "") -> None:
        self.domain = domain
        self.tensor: dict[str, tuple[Function, bool]] = {}
        self.hosts: dict[str, Function] = {}

    def reference(self, *op_types: str, raw: bool = False) -> Callable[[Function], Function]:
        """Declare the torch function of `op_types`; with `raw`, shape operands arrive as host arrays."""

        def declare(function: Function) -> Function:
            for op_type in op_types:
                if op_type in self.tensor:
                    raise ValueError(f"operator {op_type!r} is declared twice in one file")
                self.tensor[op_type] = (function, raw)
            return function

        return declare

    def host(self, *op_types: str) -> Callable[[Function], Function]:
        """Declare the host-lane function of `op_types`."""

        def declare(function: Function) -> Function:
            self.hosts.update(dict.fromkeys(op_types, function))
            return function

        return declare


@cache
def table() -> dict[tuple[str, str], Reference]:
    """All references, read once from the files of `references/`."""
    from fxopt.ir.onnx import references

    found: dict[tuple[str, str], Reference] = {}
    for info in pkgutil.iter_modules(references.__path__):
        module = importlib.import_module(f"{references.__name__}.{info.name}")
        operators: Operators = module.operators
        for op_type, (function, raw) in operators.tensor.items():
            key = (operators.domain, op_type)
            if key in found:
                raise ValueError(f"{info.name}.py declares {key}, which another file declares too")
            found[key] = Reference(function, operators.hosts.get(op_type), raw)
    return found


def lookup(domain: str, op_type: str) -> Reference | None:
    """The reference of an operator; None when there is none."""
    return table().get((domain, op_type))
