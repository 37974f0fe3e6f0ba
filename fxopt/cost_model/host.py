"""Which target the present machine is: cores and instruction sets, and the data file of its class."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path

from fxopt.cost_model.targets import get_target
from fxopt.ir.target import Target

_ARM = ("aarch64", "arm64")
# Instruction sets as Linux names them in /proc/cpuinfo -> our names.
_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "sve",
}
# What `torch.backends.cpu.get_cpu_capability()` implies, where there is no /proc/cpuinfo.
_CAPABILITIES = {
    "AVX2": ("avx2", "fma"),
    "AVX512": ("avx2", "fma", "avx512f", "avx512bw"),
    "SVE256": ("neon", "dotprod", "sve"),
}


def detect_host(threads: int | None = None) -> Target:
    """The target `host`: the figures of its class, with this machine's cores and instruction sets.

    Args:
        threads: how many cores to use at most; all that the process may use when None.
    """
    features = instruction_sets()
    arch = platform.machine().lower()
    known = get_target(host_class(arch, features))
    cores = available_cores()
    peak = dict(known.peak)
    if arch in _ARM and "dotprod" not in features:
        peak.pop("int8", None)  # 8-bit products at the rate of floats
    return dataclasses.replace(
        known,
        name="host",
        is_host=True,
        cores=cores if threads is None else max(1, min(threads, cores)),
        features=features or known.features,
        peak=peak,
        source=f"class {known.name}: {known.source}",
        error=f"class {known.name}: {known.error}",
    )


def host_class(arch: str, features: frozenset[str]) -> str:
    """The name of the data file for a CPU with these instruction sets; the plainest of its family when none fits."""
    if arch in _ARM:
        return "aarch64"
    if "avx512_vnni" in features:
        return "x86-avx512-vnni"
    if "avx_vnni" in features:
        return "x86-avx-vnni"
    return "x86-avx512" if "avx512bw" in features else "x86-avx2"


def available_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The instruction sets that matter here; empty when they cannot be found out."""
    flags = _linux_flags(cpuinfo)
    if flags:
        return frozenset(ours for theirs, ours in _FLAGS.items() if theirs in flags)
    if platform.machine().lower() in _ARM and platform.system() == "Darwin":
        return frozenset({"neon", "dotprod"})  # every Apple processor for Macs has them
    import torch

    return frozenset(_CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ()))


def _linux_flags(cpuinfo: Path) -> set[str]:
    """The flags of the first processor."""
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
