"""How long attention with patterns takes, as a share of dense attention: measured, but for GPUs.

From `python -m benchmarks.attention_patterns` (results/attention_patterns.json, "fits"): share = slope * work, where
`work` is the share of pairs of queries and keys that the slices multiply. The kernel of the triton backend was not
measured; dense attention reaches 1.5 times as much of the peak as one written in Triton (see its `worth.py`).
"""

from __future__ import annotations

_SLOPES = {"onnxruntime": 1.21, "eager": 1.33, "triton": 1.5}
_ELSEWHERE = 1.5


def time_share(backend: str, work: float) -> float:
    """Of the time of dense attention."""
    return _SLOPES.get(backend, _ELSEWHERE) * work


def break_even(backend: str) -> float:
    """The share of work from which on dense attention is as fast."""
    return 1 / _SLOPES.get(backend, _ELSEWHERE)
