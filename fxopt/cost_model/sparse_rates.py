"""Kernels of compiled code that skip blocks of zeros: how much faster they are, by target, as measured.

`sparse_rates.json` is written by `python -m benchmarks.sparse_rates`: WebAssembly was timed, code for Arm counted in
instructions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from fxopt.ir.target import SparseKernel

PATH = Path(__file__).with_name("sparse_rates.json")
_FORM = re.compile(r"(?P<kind>\w+) (?P<dtype>\w+) (?P<pattern>\d+x1)(, (?P<rows>\d+) rows)?")
# What is put in: of blocks with the same effect on time, those that change the least; in floats, where most are known.
_OFFERED = {("linear", "8x1"), ("conv", "4x1")}


def measured_kernels(target: str) -> tuple[SparseKernel, ...]:
    """The kernels of a target, by its name."""
    found = json.loads(PATH.read_text(encoding="utf-8"))["targets"][target]["speedups"]
    return tuple(_kernel(form, speedups, target) for form, speedups in found.items())


def _kernel(form: str, speedups: dict[str, float], target: str) -> SparseKernel:
    match = _FORM.fullmatch(form)
    assert match is not None, form
    kind, pattern = match["kind"], match["pattern"]
    how = "timed in Node" if target.startswith("wasm") else "instructions, counted"
    return SparseKernel(
        pattern,
        match["dtype"],
        tuple((float(share), factor) for share, factor in speedups.items()),
        least_rows=int(match["rows"] or 1),
        source=f"benchmarks/sparse_rates.py, {how}",
        kind=kind,
        offered=match["dtype"] == "float32" and (kind, pattern) in _OFFERED,
    )
