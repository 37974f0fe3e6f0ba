"""What the rules of lowering share: graph, chip, verdicts, and a check that a kernel compiles for a node's shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.backends.triton import library
from fxopt.backends.triton.chips import Chip
from fxopt.backends.triton.configs import LINEAR_ROWS
from fxopt.backends.triton.launch import Launch, recorded
from fxopt.backends.triton.offline import compiled
from fxopt.backends.triton.ops.registry import KernelOp
from fxopt.backends.triton.static_report import StaticReport, report_on
from fxopt.errors import Unsupported
from fxopt.ir.graph import Graph, hint, label, tensor_value
from fxopt.ir.ledger import Verdict
from fxopt.ir.target import Target

NAME = "triton"


@dataclass
class Kernels:
    """Kernels that were compiled for a chip, by launch; a launch that fails or spills has a reason instead."""

    chip: Chip
    compiled: dict[str, Any] = field(default_factory=dict)
    reports: dict[str, StaticReport] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def refusal(self, launch: Launch) -> str:
        """Why a launch's kernel is not used; "" when it is. Compiled once."""
        key = _identity(launch)
        if key not in self.compiled and key not in self.refused:
            try:
                kernel = compiled(launch, self.chip)
                report = report_on(kernel)
                self.compiled[key], self.reports[key] = kernel, report
                reason = report.refusal(self.chip)
            except Unsupported as error:
                reason = str(error)
            if reason:
                self.refused[key] = reason
        return self.refused.get(key, "")


def _identity(launch: Launch) -> str:
    """What Triton compiles a kernel for."""
    signs = []
    for argument in launch.arguments:
        base = getattr(argument, "base", argument)
        if isinstance(base, Tensor):
            signs.append(f"{base.dtype}{'d' if base is not argument else ''}")
        else:
            signs.append(f"{type(argument).__name__}{argument == 1}{isinstance(argument, int) and argument % 16 == 0}")
    return f"{launch} {' '.join(signs)}"


@dataclass
class Job:
    """One lowering: `graph` is changed in place."""

    graph: Graph
    target: Target
    kernels: Kernels
    verdicts: list[Verdict] = field(default_factory=list)

    def kernel(self, node: fx.Node, reason: str) -> None:
        """A node runs in a kernel."""
        self.verdicts.append(Verdict(NAME, label(node), "applied", reason))

    def refused(self, node: fx.Node, reason: str, instead: str) -> None:
        """A node has no kernel, and runs in something else."""
        self.verdicts.append(Verdict(NAME, label(node), "refused", f"{reason}; it runs in {instead}"))

    def constant(self, value: Tensor, node: fx.Node, what: str) -> fx.Node:
        """A new constant that belongs to a node."""
        made = self.graph.add_constant(value, f"{label(node)}_{what}", (label(node), NAME))
        made.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="meta")
        return made

    def call(self, target: Callable[..., Any], arguments: tuple[Any, ...], node: fx.Node) -> fx.Node:
        """A new call before a node, of the node's type."""
        return self.graph.call(target, arguments, before=node, made_by=NAME, like=node)

    def substitute(self, node: fx.Node, made: fx.Node) -> None:
        """Put a call in a node's place; it has the same type."""
        for key in ("val", "probe"):
            if key in node.meta:
                made.meta[key] = node.meta[key]
        self.graph.replace(node, made)

    def uncompilable(self, operator: KernelOp[...], arguments: Sequence[Any], rows: int | None = None) -> str:
        """Why the operator's kernels do not compile for these arguments (nodes and numbers); "" when they do.

        Args:
            rows: position of a tensor whose first axis counts rows; where its number is dynamic, every height of a tile
                is compiled.
        """
        if library.interprets():
            return ""
        for shapes in self._shapes(arguments, rows):
            with recorded(self.kernels.chip) as launches:
                try:
                    operator.kernels(*shapes)
                except Unsupported as error:
                    return str(error)
            for launch in launches:
                reason = self.kernels.refusal(launch)
                if reason:
                    return reason
        return ""

    def _shapes(self, arguments: Sequence[Any], rows: int | None) -> list[list[Any]]:
        plain = [_meta(argument) for argument in arguments]
        if rows is None or not _is_dynamic(arguments[rows]):
            return [plain]
        tensor = plain[rows]
        every = []
        for count in (hint(tensor.shape[0]), *LINEAR_ROWS):
            shaped = list(plain)
            shaped[rows] = torch.empty(count, tensor.shape[-1], dtype=tensor.dtype, device="meta")
            for index, other in enumerate(plain):
                same = isinstance(other, Tensor) and index != rows and other.shape[:-1] == tensor.shape[:-1]
                if same and other.dim() > 1:
                    shaped[index] = torch.empty(count, other.shape[-1], dtype=other.dtype, device="meta")
            every.append(shaped)
        return every


def _meta(argument: Any) -> Any:
    """A node's value as a tensor without memory, at the sizes for which costs are computed."""
    if isinstance(argument, (tuple, list)):
        return [_meta(item) for item in argument]
    if not isinstance(argument, fx.Node):
        return argument
    value = argument.meta.get("val")
    if not isinstance(value, Tensor):
        raise Unsupported(f"the type of {label(argument)} is not known")
    sizes, strides = tuple(map(hint, value.shape)), tuple(map(hint, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


def _is_dynamic(argument: Any) -> bool:
    value = tensor_value(argument)
    if value is None or not isinstance(argument, fx.Node):
        return False
    probe = argument.meta.get("probe", value)
    return any(not isinstance(dim, int) for dim in value.shape) or tuple(probe.shape) != tuple(value.shape)


def rows_of(node: object) -> int:
    """The number of rows of a value [..., features], at the sizes for which costs are computed."""
    value = tensor_value(node)
    count = 1
    for dim in () if value is None else value.shape[:-1]:
        count *= hint(dim)
    return count
