"""`Target`: a piece of hardware as data, with the source of every figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


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
    energy: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))  # joules per operation
    is_host: bool = False  # the machine this process runs on


@dataclass(frozen=True)
class Cost:
    """Work of one operator: arithmetic operations in `dtype` and bytes moved; `kind` selects the efficiency factor."""

    flops: float
    bytes: float
    dtype: str = "float32"
    kind: str = "elementwise"  # "linear", "conv", "attention", "norm", "elementwise", "shape", "quantize"
    launches: int = 1

    def __add__(self, other: Cost) -> Cost:
        """Both, one after the other, in the terms of the larger one."""
        main = self if self.flops >= other.flops else other
        return Cost(
            self.flops + other.flops, self.bytes + other.bytes, main.dtype, main.kind, self.launches + other.launches
        )


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
