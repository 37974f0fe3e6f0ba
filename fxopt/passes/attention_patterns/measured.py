"""How long attention with patterns takes, as a share of dense attention: measured on a CPU.

From `python -m benchmarks.attention_patterns` (results/attention_patterns.json, "fits"): time is proportional to the
share of pairs of queries and keys that the slices multiply. A backend may know a smaller break-even by itself.
"""

from __future__ import annotations

_BREAK_EVEN = {"onnxruntime": 0.82, "eager": 0.76}
_ELSEWHERE = 0.67  # not measured


def break_even(backend: str) -> float:
    """The share of the work that is left at which dense attention is as fast."""
    return _BREAK_EVEN.get(backend, _ELSEWHERE)
