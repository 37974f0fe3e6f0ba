"""How long attention with patterns takes, as a share of dense attention: measured on CPUs.

From `python -m benchmarks.attention_patterns` (results/attention_patterns.json, "fits"), on one thread and on two of an
AMD EPYC, Zen 5; an assumption for other CPUs. Time follows the pairs of queries and keys that are multiplied and the
number of calls, whose fixed cost does not shrink with threads: dense attention does more in the meantime. More threads
than two are extrapolated.
"""

from __future__ import annotations

from dataclasses import replace

from fxopt.ir.pattern_work import Price
from fxopt.ir.target import Cost, Target

KIND = "attention.pattern"


_MEASURED = {
    "onnxruntime": (Price(1.18, 1.05, 1.1e6), Price(1.54, 1.07, 6.2e6)),
    "eager": (Price(1.23, 1.07, 1.3e6), Price(1.46, 1.1, 2.7e6)),
}


def price(backend: str, threads: int) -> Price:
    """What slices cost in a backend on so many threads; those that were not measured count as the dearest."""
    one, two = _MEASURED.get(backend, tuple(map(_dearest, zip(*_MEASURED.values(), strict=True))))
    if threads <= 1:
        return one
    return replace(two, call=one.call + (two.call - one.call) * (threads - 1))


def _dearest(prices: tuple[Price, ...]) -> Price:
    return Price(*(max(getattr(each, name) for each in prices) for name in ("sliced", "whole", "call")))


def priced(cost: Cost, target: Target) -> Cost:
    """Attention with patterns on a CPU as so much dense attention as takes as long; every other work as it is."""
    form = dict(cost.form)
    if cost.kind != KIND or target.kind != "cpu" or "work" not in form:
        return cost
    share = price(target.backend, target.cores).over_dense(form["work"], form["dense_macs"])
    return replace(cost, flops=2.0 * form["dense_macs"] * share)
