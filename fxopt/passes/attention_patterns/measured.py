"""How long attention with patterns takes, as a share of dense attention: measured on a CPU.

From `python -m benchmarks.attention_patterns` (results/attention_patterns.json, "densities"): time is nearly
proportional to the share of pairs of queries and keys that the slices multiply. The figure of torch is that of the
length with the lower break-even. A backend may know a smaller one by itself.
"""

from __future__ import annotations

_BREAK_EVEN = {"onnxruntime": 0.82, "eager": 0.64}
_ELSEWHERE = 0.67  # not measured


def break_even(backend: str) -> float:
    """The share of the work that is left at which dense attention is as fast."""
    return _BREAK_EVEN.get(backend, _ELSEWHERE)
