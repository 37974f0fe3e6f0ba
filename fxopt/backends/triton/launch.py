"""Launch a kernel, or write down the launch: for compiling where no GPU is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fxopt.backends.triton.chips import PRETENDED, Chip
from fxopt.errors import Unsupported


@dataclass(frozen=True)
class Launch:
    """One launch: tensors (of the device, or "meta") and numbers, constants of the kernel, and how it is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any] = field(hash=False)
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.kernel.__name__)

    def __str__(self) -> str:
        chosen = " ".join(f"{key}={value}" for key, value in self.constants.items())
        return f"{self.name}[{chosen} warps={self.warps} stages={self.stages}]"


_RECORD: ContextVar[list[Launch] | None] = ContextVar("fxopt_triton_record", default=None)


@contextmanager
def recorded(chip: Chip) -> Iterator[list[Launch]]:
    """Inside, kernels are not run: their launches for this chip are collected."""
    launches: list[Launch] = []
    tokens = _RECORD.set(launches), PRETENDED.set(chip)
    try:
        yield launches
    finally:
        _RECORD.reset(tokens[0])
        PRETENDED.reset(tokens[1])


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int
) -> None:
    """Run the kernel on the device of its tensors; nothing for an empty grid.

    Raises:
        Unsupported: it ran, but spills registers: something else is faster.
    """
    if 0 in grid:
        return
    record = _RECORD.get()
    if record is not None:
        record.append(Launch(kernel, grid, arguments, constants, warps, stages))
        return
    device = next((value.device for value in arguments if isinstance(value, Tensor) and value.is_cuda), None)
    with nullcontext() if device is None else torch.cuda.device(device):
        made = kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)
    if getattr(made, "n_spills", 0):
        raise Unsupported(f"{Launch(kernel, grid, (), constants, warps, stages)} spills registers")
