"""Declare an operator of the backend: `torch.ops.fxopt_triton.NAME`.

The reference is what CPU tensors run, the fake rule and what kernels are compared with; `kernels` is what CUDA tensors
run. The operators are opaque to `torch.compile`, and trace, export and save without a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Generic, ParamSpec

import torch
from torch import Tensor
from torch._ops import OpOverload

from fxopt.backends.triton.chips import Chip
from fxopt.backends.triton.configs import Choice, choice_of
from fxopt.errors import Unsupported

P = ParamSpec("P")
_LIBRARY: Any = torch.library.Library("fxopt_triton", "FRAGMENT")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


class KernelOp(Generic[P]):
    """An operator with its two implementations."""

    def __init__(self, name: str, reference: Callable[P, Any], kernels: Callable[..., Any]) -> None:
        self.name = name
        self.reference = reference
        self.kernels = kernels
        self.disabled: set[Any] = set()  # shapes for which a kernel failed
        schema = torch.library.infer_schema(reference, mutates_args=())
        _LIBRARY.define(f"{self.name}{schema}", tags=_TAGS)
        _LIBRARY.impl(self.name, reference, "CPU")
        _LIBRARY.impl(self.name, self.on_cuda, "CUDA")
        torch.library.register_fake(f"fxopt_triton::{self.name}", reference, lib=_LIBRARY)
        self.target: OpOverload[..., Any] = getattr(torch.ops.fxopt_triton, self.name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self.target(*args, **kwargs)

    def on_cuda(self, *args: Any) -> Any:
        """The kernels; where one does not compile, or spills, for these shapes, from then on the reference."""
        shapes = tuple((tuple(value.shape), value.dtype) for value in args if isinstance(value, Tensor))
        if shapes not in self.disabled:
            try:
                return self.kernels(*args)
            except Exception as error:
                if not isinstance(error, Unsupported) and not type(error).__module__.startswith("triton"):
                    raise
                self.disabled.add(shapes)
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                warnings.warn(f"fxopt: {self.name} runs in the reference: {reason}", stacklevel=2)
        return self.reference(*args)  # type: ignore[call-arg]


def contiguous_rows(x: Tensor, columns: int) -> Tensor:
    """x [..., columns] as a matrix whose rows are contiguous; a copy only where it must be."""
    rows = x.reshape(-1, columns)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def usable(chip: Chip, key: str) -> Choice:
    """The tiles of a kernel.

    Raises:
        Unsupported: the kernel is not to be used on this chip.
    """
    choice = choice_of(chip, key)
    if choice is None:
        raise Unsupported(f"{key} has no configuration for {chip.sm} that compiles without spills")
    return choice
