"""Seconds of a kernel from its static report: what each pipe of a multiprocessor is busy with, and the memory.

An estimate that was never compared with a clock. Rates are those of the CUDA programming guide (table of arithmetic
throughput); latencies and reached shares are assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fxopt.backends.triton.chips import Chip
from fxopt.backends.triton.static_report import StaticReport
from fxopt.cost_model.roofline import efficiency
from fxopt.ir.target import Target

_ISSUE = 128  # instructions of a thread per clock and multiprocessor, in all
_RATES = {"logic": 64, "special": 16, "half": 128, "shuffle": 32}
_MEMORY = ("global_load", "async_copy", "shared_load", "shared_store", "global_store")
_MEMORY_RATE = 32
_LATENCY = 0.6e-6  # seconds, of a loaded main memory
_SHARE = 0.9  # reached share of the bandwidth


@dataclass(frozen=True)
class Work:
    """What a launch does: programs, trips of the loop in each, and of a trip the multiply-adds of 16-bit floats.

    `moved`: bytes in all; `stages`: of the loop's pipeline.
    """

    programs: int
    trips: float
    multiply_adds: float
    moved: float
    stages: int


@dataclass(frozen=True)
class Estimate:
    """Seconds without the launch, and what bounds them."""

    seconds: float
    bound: str


def trip_cycles(report: StaticReport, chip: Chip, work: Work) -> dict[str, float]:
    """Clock cycles that a multiprocessor needs for one program's trip, pipe by pipe."""
    threads = report.warps * 32
    mix = report.loop
    cycles = {name: mix.get(name, 0) * threads / rate for name, rate in _RATES.items()}
    cycles["issue"] = report.loop_length * threads / _ISSUE
    cycles["convert"] = mix.get("convert", 0) * threads / chip.convert_rate
    cycles["float"] = (mix.get("float", 0) + mix.get("integer", 0) / 2) * threads / chip.float_rate
    cycles["memory"] = sum(mix.get(name, 0) for name in _MEMORY) * threads / _MEMORY_RATE
    cycles["tensor"] = work.multiply_adds / chip.tensor_rate
    return cycles


def estimate(report: StaticReport, chip: Chip, target: Target, work: Work) -> Estimate:
    """The time of one launch on a target."""
    cycles = trip_cycles(report, chip, work)
    busiest = max(cycles, key=lambda name: cycles[name])
    resident = max(1, report.resident(chip))
    rounds = math.ceil(work.programs / chip.multiprocessors)
    # The busiest pipe is busy for the share of the time that good kernels reach on the target.
    computing = cycles[busiest] * work.trips * rounds / chip.clock / efficiency(target, "linear")
    streaming = work.moved / (target.bandwidth * _SHARE)
    running = min(work.programs, chip.multiprocessors * resident)
    in_flight = running * max(1, work.stages - 1) * work.moved / max(1.0, work.programs * work.trips)
    waiting = work.moved * _LATENCY / max(in_flight, 1.0)
    bounds: dict[str, Any] = {busiest: computing, "bandwidth": streaming, "latency": waiting}
    bound = max(bounds, key=lambda name: bounds[name])
    return Estimate(bounds[bound], bound)
