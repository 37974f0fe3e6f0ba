"""What fewer bits cost: the byte-level language model of the repository with round-to-nearest and GPTQ.

    python -m benchmarks.byte_lm_bits

Calibrated on windows of Python's sources, evaluated on Python's documentation, always against float32 in the same run.
Errors of layers are tr(D H D') / tr(W H W') with D the change of the weight and H the second moments of its inputs.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

import fxopt
from benchmarks.common import write
from examples.calibration import calibration_inputs
from examples.evaluate import byte_lm_bits
from fxopt.ir.shapes import infer
from fxopt.ir.views.linear import Linear, linears
from fxopt.passes.quantize_linear.gptq import gptq, nearest
from fxopt.passes.quantize_linear.grids import group_grid
from fxopt.passes.sequential import SequentialRun

MODEL = Path(__file__).parent.parent / "examples" / "models" / "byte-lm.onnx"
GROUP = 64
METHODS = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq", "act_order": False},
    "gptq, act-order": {"method": "gptq", "act_order": True},
}


def samples() -> list[list[torch.Tensor]]:
    """Calibration windows, one per sample."""
    return [[torch.from_numpy(row[None])] for row in calibration_inputs("byte-lm")["tokens"]]


def layer_errors(bits: int) -> dict[str, dict[str, float]]:
    """Relative output error of each linear by method, on the moments of the float model."""
    graph = fxopt.capture(MODEL)
    infer(graph, {})
    walk = SequentialRun(graph, samples())
    found: dict[str, dict[str, float]] = {}
    for view in linears(graph):
        if not isinstance(view, Linear):
            continue
        weight, moments = view.weight(graph).float(), walk.moments(view.x)
        grid = group_grid(weight, bits, GROUP, symmetric=True)
        codes = {
            "rtn": nearest(weight, grid),
            "gptq": gptq(weight, moments, grid, act_order=False).codes,
            "gptq, act-order": gptq(weight, moments, grid, act_order=True).codes,
        }
        signal = float((weight.double() @ moments).mul(weight).sum())
        changes = {
            name: (grid.values(code.float(), grid.groups(weight.shape[1])) - weight).double()
            for name, code in codes.items()
        }
        found[view.node.name] = {
            name: float((change @ moments).mul(change).sum()) / signal for name, change in changes.items()
        }
    return found


def optimised(text: str) -> Any:
    """The model with this pass everywhere, whatever it costs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxopt.optimize(
            MODEL, "host", calibration=[{"tokens": row[0]} for row in samples()], budget=None, objective="size",
            force=True, passes=[text],
        )  # fmt: skip


def main() -> None:
    """Measure and write benchmarks/results/byte_lm_bits.json."""
    logging.disable(logging.WARNING)
    before = -byte_lm_bits(fxopt.optimize(MODEL, "host", passes=[]))
    result: dict[str, Any] = {"float32": before, "group": GROUP, "bits_per_byte": {}, "layers": {}}
    for bits in (3, 4):
        result["layers"][str(bits)] = errors = layer_errors(bits)
        mean = {name: sum(row[name] for row in errors.values()) / len(errors) for name in METHODS}
        below = sum(row["gptq"] < row["rtn"] for row in errors.values())
        ordered = sum(row["gptq, act-order"] < row["gptq"] for row in errors.values())
        print(f"{bits} bits: mean layer error", {name: f"{value:.3e}" for name, value in mean.items()})
        print(f"  gptq under rtn in {below}, act-order under plain in {ordered} of {len(errors)} layers")
        for name, options in METHODS.items():
            text = ",".join(f"{key}={value}" for key, value in {"bits": bits, "group": GROUP, **options}.items())
            found = -byte_lm_bits(optimised(f"quantize-linear{{{text},activations=float}}"))
            result["bits_per_byte"][f"{bits} bits, {name}"] = found
            print(f"  {name}: {found:.4f} bits per byte, {found - before:+.4f}")
    for kind in ("dynamic", "static"):
        found = -byte_lm_bits(optimised(f"quantize-linear{{activations={kind}}}"))
        result["bits_per_byte"][f"8 bits, {kind} activations"] = found
        print(f"8 bits, {kind} activations: {found:.4f} bits per byte, {found - before:+.4f}")
    print(f"written: {write('byte_lm_bits', result)}")


if __name__ == "__main__":
    main()
