"""Declare an fxopt operator: one torch function is definition, fake rule, fallback and oracle.

    @op
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    @rms_norm.cost
    def _(x: Tensor, weight: Tensor, eps: float) -> Cost: ...

    @rms_norm.samples
    def _(make: Make) -> Iterator[tuple[Any, ...]]: ...

The function becomes `torch.ops.fxopt.rms_norm`, so `torch.compile`, `torch.export` and saving know it.
One file of `fxopt/ir/ops/` declares one operator, or one family of variants.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch._ops import OpOverload

from fxopt.ir.target import Cost

P = ParamSpec("P")
R = TypeVar("R")
Samples = Callable[[], Iterator[tuple[Any, ...]]]

_LIBRARY: Any = torch.library.Library("fxopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_DECLARED: dict[OpOverload[..., Any], Op[..., Any]] = {}


class Op(Generic[P, R]):
    """A declared operator; `target` is what fx nodes call."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = function
        self.name = function.__name__
        self.__doc__ = function.__doc__
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(f"{self.name}{schema}")
        _LIBRARY.impl(self.name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fxopt::{self.name}", function, lib=_LIBRARY)
        self.target: OpOverload[..., Any] = getattr(torch.ops.fxopt, self.name).default
        self._cost: Callable[P, Cost] | None = None
        self._samples: Samples | None = None
        _DECLARED[self.target] = self

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.target(*args, **kwargs)  # type: ignore[no-any-return]

    def cost(self, function: Callable[P, Cost]) -> Callable[P, Cost]:
        """Declare the operator's work, from (fake) arguments."""
        self._cost = function
        return function

    def samples(self, function: Samples) -> Samples:
        """Declare argument tuples over which every backend's kernel is compared with the definition."""
        self._samples = function
        return function

    def cost_of(self, *args: P.args, **kwargs: P.kwargs) -> Cost:
        """The work of one call."""
        assert self._cost is not None, f"{self.name} declares no cost"
        return self._cost(*args, **kwargs)

    def sample_arguments(self) -> Iterator[tuple[Any, ...]]:
        """The declared samples."""
        assert self._samples is not None, f"{self.name} declares no samples"
        return self._samples()

    def __repr__(self) -> str:
        return f"Op({self.name})"


def op(function: Callable[P, R]) -> Op[P, R]:
    """Declare `function` as an fxopt operator."""
    return Op(function)


def declaration(target: object) -> Op[..., Any] | None:
    """The declaration behind an fx target; None for other operators."""
    return _DECLARED.get(target) if isinstance(target, OpOverload) else None


@cache
def all_ops() -> dict[str, Op[..., Any]]:
    """Every declared operator by name; imports the files of `fxopt/ir/ops/`."""
    from fxopt.ir import ops

    for info in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{info.name}")
    return {declared.name: declared for declared in _DECLARED.values()}
