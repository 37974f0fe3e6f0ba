"""The time of kernels of which the roofline knows nothing: linears whose weights are decoded to floats first."""

from __future__ import annotations

from dataclasses import replace

from fxopt.cost_model.roofline import predict
from fxopt.ir.target import Cost, Prediction, Target

# Work of decoding one weight, in operations at the rate of a float linear, by its bits. Counted for Arm it is 8, 8 to
# 10 and 9 to 15, timed in wasmtime 3 to 8, 4 to 10 and 6 to 11 (benchmarks/decoded_weights.py).
_DECODING = {2: 7.5, 4: 9.0, 8: 11.0}


def predicted(cost: Cost, target: Target) -> Prediction | None:
    """Of a linear with few-bit weights: each weight is decoded once, however many rows there are, then multiplied."""
    form = dict(cost.form)
    if form.get("op") != "linear_nbits":
        return None
    weights = float(form["out"] * form["in"])
    work = 2 * cost.multiply_adds + weights * _DECODING.get(form["bits"], _DECODING[8])
    return predict(replace(cost, flops=work, kind="linear"), target)
