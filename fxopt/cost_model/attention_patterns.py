"""How well attention with patterns uses a CPU, against dense attention there.

From `python -m benchmarks.attention_patterns` (results/attention_patterns.json, "fits"): the work left at which slices
in ONNX Runtime take as long as dense attention, on one thread of an AMD EPYC, Zen 5; an assumption for other CPUs.
"""

from __future__ import annotations

from fxopt.ir.target import Target

KIND = "attention.pattern"
BREAK_EVEN = 0.82


def of_dense(kind: str, target: Target) -> float:
    """The factor on the efficiency of dense attention: below 1 for work of KIND on CPUs, else 1."""
    return BREAK_EVEN if kind == KIND and target.kind == "cpu" else 1.0
