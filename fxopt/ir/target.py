"""`Target`: a piece of hardware as data, with the source of every figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True)
class SparseKernel:
    """A kernel that skips zeros of a weight.

    Attributes:
        pattern: which zeros, as `fxopt.ir.sparsity.Pattern` writes it.
        dtype: of the weight when it is multiplied.
        speedups: share of zeros, and how many times as fast as the dense kernel of the same type it is, rising.
        least_rows: the fewest rows of x for which that holds.
        custom_ops: it is one of our own, in a library beside the file: used where it is asked for.
        source: of the figures.
        kind: of the operator, "linear" or "conv" (of one group); "": of both.
        offered: such zeros are put in; else the kernel is for weights that have them.
    """

    pattern: str
    dtype: str
    speedups: tuple[tuple[float, float], ...]
    least_rows: int = 1
    custom_ops: bool = False
    source: str = ""
    kind: str = ""
    offered: bool = True

    def fits(self, kind: str) -> bool:
        """Whether it is one of this kind of operator."""
        return self.kind in ("", kind)

    def speedup(self, zeros: float) -> float:
        """How many times as fast as the dense kernel: that of the nearest smaller share which is listed, else 1."""
        return max((factor for share, factor in self.speedups if share <= zeros + _SHARE), default=1.0)


_SHARE = 0.005  # shares of zeros are whole blocks


@dataclass(frozen=True)
class Target:
    """What the cost model and the passes know about a machine.

    Units: operations and bytes per second (a multiply-add is two operations), seconds, bytes.
    """

    name: str
    kind: Literal["cpu", "cuda", "wasm"]
    arch: str  # "x86-64", "aarch64", "sm_80", "wasm32"
    backend: str  # name of the default backend
    source: str  # where the figures come from
    error: str  # what predictions were measured on and their held-out error, or "never measured"
    interval: float  # half-width of a prediction, as a factor: seconds * (1 -+ interval)
    peak: Mapping[str, float]  # per dtype ("float32", "int8", ...), whole machine; for a CPU one core
    bandwidth: float  # main memory
    launch_seconds: float  # fixed cost of one operator
    cores: int = 1
    features: frozenset[str] = frozenset()  # instruction sets: "avx2", "avx512_vnni", "neon", "dotprod", ...
    cache_bytes: int = 0  # last level
    cache_bandwidth: float = 0.0  # while data stay in the last-level cache
    efficiency: Mapping[str, float] = field(
        default_factory=lambda: MappingProxyType({})
    )  # reached share of peak, per kind
    sparse_24: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))  # peak with 2:4 weights
    sparse_kernels: tuple[SparseKernel, ...] = ()
    energy: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))  # joules per operation
    cpu: str = ""  # the processor as LLVM names it, where the target is one ("cortex-a53")
    is_host: bool = False  # the machine this process runs on

    def sparse_kernel(self, pattern: str, dtype: str, rows: int, kind: str = "linear") -> SparseKernel | None:
        """The kernel for a weight of this type with zeros of this pattern, multiplied with so many rows."""
        fitting = [
            kernel
            for kernel in self.sparse_kernels
            if (kernel.pattern, kernel.dtype) == (pattern, dtype) and kernel.fits(kind) and kernel.least_rows <= rows
        ]
        return max(fitting, key=lambda kernel: kernel.least_rows, default=None)


@dataclass(frozen=True)
class Zeros:
    """Zeros of a weight that a kernel may skip: their share by each pattern, and the rows it is multiplied with."""

    shares: tuple[tuple[str, float], ...]
    rows: int
    part: float = 1.0  # of the work, that is done with this weight
    custom_ops: bool = False  # kernels of our own may be used


@dataclass(frozen=True)
class Cost:
    """Work of one operator: arithmetic operations in `dtype` and bytes moved; `kind` selects the efficiency factor."""

    flops: float
    bytes: float
    dtype: str = "float32"
    kind: str = "elementwise"  # "linear", "conv", "attention", "norm", "elementwise", "shape", "quantize"
    launches: int = 1
    macs: float | None = None  # multiply-adds of a product, where they are not half of `flops`
    zeros: Zeros | None = None  # of the weight, where a kernel for them would be used: work and bytes count them too
    form: tuple[tuple[str, Any], ...] = ()  # operator and sizes, for backends with a prediction of their own

    def __add__(self, other: Cost) -> Cost:
        """Both, one after the other, in the terms of the larger one."""
        main = self if self.flops >= other.flops else other
        zeros, total = None, self.flops + other.flops
        for part in (self, other):
            if part.zeros is not None and (zeros is None or part is main):
                zeros = replace(part.zeros, part=part.zeros.part * part.flops / total if total else 1.0)
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            main.dtype,
            main.kind,
            self.launches + other.launches,
            self.multiply_adds + other.multiply_adds,
            zeros,
        )

    @property
    def multiply_adds(self) -> float:
        """Multiply-adds of a product."""
        return self.flops / 2 if self.macs is None else self.macs


_NARROW = 64  # products per result
_NARROW_PRODUCT = 16  # the same where the kernel is one position: a matrix product, which needs no gathering


def conv_kind(weight: Sequence[int]) -> str:
    """The kind of a convolution [out, in / groups, *kernel]: "conv.narrow" where few products make a result.

    Depthwise convolutions and those of few channels: kernels starve there (benchmarks/host_rates.py).
    """
    is_product = len(weight) > 2 and math.prod(weight[2:]) == 1 and weight[1] >= _NARROW_PRODUCT
    return "conv.narrow" if math.prod(weight[1:]) < _NARROW and not is_product else "conv"


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds with an interval, and what bounds them."""

    seconds: float
    low: float
    high: float
    bound: Literal["compute", "memory", "launch"]

    def __add__(self, other: Prediction) -> Prediction:
        bound = self.bound if self.seconds >= other.seconds else other.bound
        return Prediction(self.seconds + other.seconds, self.low + other.low, self.high + other.high, bound)
