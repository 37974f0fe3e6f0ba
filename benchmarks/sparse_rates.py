"""How much faster compiled code is for blocks of zeros: WebAssembly timed in Node, Arm counted in instructions.

    python -m benchmarks.sparse_rates [--targets wasm-simd,cortex-a53] [--run-with 'taskset -c 0']

Linears and 1x1 convolutions in floats and in 8 bits (with the rounding of their input), whose weights have blocks of
zeros, over the same layer without zeros. Of two shapes each, the smaller speed-up counts. Measured as in
`benchmarks.compiled_rates`. Writes benchmarks/results/sparse_rates.json, and its "targets" to
fxopt/cost_model/sparse_rates.json for the cost model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from benchmarks import compiled_rates
from benchmarks.common import RESULTS, write
from fxopt.cost_model.sparse_rates import PATH
from fxopt.cost_model.targets import get_target
from fxopt.frontends.torch_export import load

SHARES = (0.3, 0.5, 0.7, 0.8, 0.9)  # of zero blocks
ROWS = (1, 4, 64)
LINEARS = ((512, 512), (1024, 384))  # inputs, outputs
CONVS = ((128, 128, 28), (256, 256, 14))  # channels, outputs, size
TARGETS = ("wasm-simd", "wasm-relaxed", *compiled_rates.PACE)


@dataclass(frozen=True)
class Form:
    """What is made sparse."""

    kind: str  # "linear" or "conv"
    dtype: str
    rows: int  # of a convolution 0: its pixels
    width: int  # outputs of a block

    @property
    def name(self) -> str:
        """`linear int8 8x1, 64 rows`."""
        return f"{self.kind} {self.dtype} {self.width}x1" + (f", {self.rows} rows" if self.rows else "")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=lambda text: text.split(","), default=list(TARGETS))
    parser.add_argument("--run-with", type=str.split, default=[], help="what the timing command begins with")
    parser.add_argument("--forms", default="", help="only those that hold this text, such as 'conv int8'")
    options = parser.parse_args()
    path = RESULTS / "sparse_rates.json"
    found = json.loads(path.read_text())["targets"] if path.exists() else {}
    for name in options.targets:
        known = found.get(name, {}).get("speedups", {})
        found[name] = {"speedups": {**known, **speedups(name, options.forms, options.run_with)}}
        for form, values in found[name]["speedups"].items():
            print(f"{name:14} {form:28}", "  ".join(f"{share}: {value:5.2f}" for share, value in values.items()))
        print(write("sparse_rates", {"shares": list(SHARES), "targets": found}), flush=True)
        PATH.write_text(json.dumps({"targets": found}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def forms() -> Iterator[Form]:
    """All of them."""
    for dtype in ("float32", "int8"):
        for rows in ROWS:
            for width in (8, 4):
                yield Form("linear", dtype, rows, width)
        yield Form("conv", dtype, 0, 4)


def speedups(name: str, some: str, prefix: list[str]) -> dict[str, dict[str, float]]:
    """Of every form and share of zeros, over no zeros."""
    target, result = get_target(name), {}
    for form in (each for each in forms() if some in each.name):
        ratios: dict[float, list[float]] = {share: [] for share in SHARES}
        for size in LINEARS if form.kind == "linear" else CONVS:
            cases = {share: case(form, size, share) for share in (0.0, *SHARES)}
            if name in compiled_rates.PACE:
                times = compiled_rates.counted(list(cases.values()), target)
            else:
                times = compiled_rates.timed(list(cases.values()), target, prefix)
            for share in SHARES:
                ratios[share].append(times[cases[0.0].name] / times[cases[share].name])
        result[form.name] = {str(share): round(min(values), 2) for share, values in ratios.items()}
    return result


def case(form: Form, size: tuple[int, ...], share: float) -> compiled_rates.Case:
    """A model of the one layer."""
    inner, outputs = size[:2]
    keep = torch.from_numpy(np.random.default_rng(0).random((outputs // form.width, inner)) >= share)
    mask = keep.repeat_interleave(form.width, 0)
    plain, module = form.dtype == "float32", nn.Module()
    if form.kind == "linear":
        x = torch.rand(form.rows, inner)
        module = nn.Linear(inner, outputs) if plain else compiled_rates.Linear(inner, outputs)
    else:
        x, mask = torch.rand(1, inner, size[2], size[2]), mask[..., None, None]
        module = nn.Conv2d(inner, outputs, 1) if plain else compiled_rates.Conv(outputs, inner, 1, 1, 1)
    with torch.no_grad():
        weight = module.get_parameter("weight") if plain else module.get_buffer("codes")
        weight[weight == 0] = 1
        weight.mul_(mask)
    text = f"{form.name}, {'x'.join(map(str, size))}, {share}"
    return compiled_rates.Case(text, form.kind, False, load(module.eval(), (x,)))


if __name__ == "__main__":
    main()
