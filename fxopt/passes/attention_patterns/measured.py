"""How long attention with patterns takes, as a share of dense attention: measured.

From `python -m benchmarks.attention_patterns` (results/attention_patterns.json, "densities"): share = fixed + slope *
work, where `work` is the share of pairs of queries and keys that the slices multiply. The larger values of all
lengths that were measured.
"""

from __future__ import annotations

# Backend -> (fixed, slope).
_SHARES = {"onnxruntime": (0.05, 1.1), "eager": (0.05, 1.1), "tvm": (0.05, 1.1)}
_ELSEWHERE = (0.05, 1.1)


def time_share(backend: str, work: float) -> float:
    """Of the time of dense attention."""
    fixed, slope = _SHARES.get(backend, _ELSEWHERE)
    return fixed + slope * work


def break_even(backend: str) -> float:
    """The share of work from which on dense attention is as fast."""
    fixed, slope = _SHARES.get(backend, _ELSEWHERE)
    return (1 - fixed) / slope
