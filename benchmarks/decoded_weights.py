"""What decoding weights of few bits costs: linears on them over linears on floats, in instructions and in wasmtime.

    python -m benchmarks.decoded_weights [--targets cortex-a53,cortex-a76,wasm-simd]

Code for Arm is counted in qemu-aarch64: these are no times. Writes benchmarks/results/decoded_weights.json, with the
work of decoding one weight in operations (two of a multiply-add) at the rate of the float linear of 64 rows.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bursts import local, race
from benchmarks.common import write
from fxopt.backends.tvm import Tvm
from fxopt.backends.tvm.qemu import run_entry
from fxopt.cost_model.targets import get_target
from fxopt.frontends.torch_export import load
from fxopt.ir.graph import Graph
from fxopt.ir.ops.linear_nbits import linear_nbits
from fxopt.ir.packing import pack

SHAPES = [(1, 1024, 1024), (8, 512, 512), (64, 512, 512)]  # rows, inputs, outputs
GROUP = 32
SECONDS = 2.0  # of each race


class Decoded(nn.Module):
    """A linear on packed weights."""

    packed: Tensor
    scales: Tensor

    def __init__(self, inner: int, outputs: int, bits: int) -> None:
        super().__init__()
        codes = torch.randint(0, 1 << bits, (outputs, inner), dtype=torch.uint8)
        self.inner, self.bits = inner, bits
        self.register_buffer("packed", pack(codes, bits))
        self.register_buffer("scales", torch.rand(outputs, inner // GROUP) / inner)

    def forward(self, x: Tensor) -> Any:
        """[rows, inputs] -> [rows, outputs]."""
        return linear_nbits.target(x, self.packed, self.scales, None, None, self.inner, self.bits, GROUP, 16)


def graphs(inner: int, outputs: int, x: Tensor) -> dict[str, Graph]:
    """The float linear, and those of 2, 4 and 8 bits."""
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {"float32": nn.Linear(inner, outputs)}
    modules |= {f"{bits} bits": Decoded(inner, outputs, bits) for bits in (2, 4, 8)}
    return {name: load(module.eval(), (x,)) for name, module in modules.items()}


def amounts(target: str, shape: tuple[int, int, int]) -> dict[str, float]:
    """Instructions of one call on Arm, seconds elsewhere."""
    rows, inner, outputs = shape
    x = torch.randn(rows, inner, generator=torch.Generator().manual_seed(0))
    compiled = {name: Tvm().compile(graph, get_target(target)) for name, graph in graphs(inner, outputs, x).items()}
    made: dict[str, Any] = compiled
    if get_target(target).kind == "wasm":
        calls = {name: local(lambda run=each.run: run([x])) for name, each in made.items()}
        return {name: row["milliseconds"] / 1e3 for name, row in race(calls, "float32", SECONDS).items()}
    found = {}
    for name, each in made.items():
        build = each.package.built(each.package.machines[0])
        with tempfile.TemporaryDirectory() as folder:
            _, counts = run_entry(build, build.entries[0], [x.numpy()], Path(folder), count=True)
        found[name] = float(sum(counts.values()))
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["cortex-a53", "cortex-a76", "wasm-simd"]
    parser.add_argument("--targets", type=lambda text: text.split(","), default=known)
    result: dict[str, Any] = {}
    for target in parser.parse_args().targets:
        found = {shape: amounts(target, shape) for shape in SHAPES}
        rows, inner, outputs = SHAPES[-1]
        operation = found[SHAPES[-1]]["float32"] / (2 * rows * inner * outputs)
        for shape, each in found.items():
            plain, weights = each["float32"], shape[1] * shape[2]
            decoding = {name: (each[name] - plain) / weights / operation for name in each if name != "float32"}
            shown = "x".join(map(str, shape))
            result.setdefault(target, {})[shown] = {"amounts": each, "operations_per_weight": decoding}
            texts = [f"{name} {each[name] / plain:.2f}x, {cost:.1f} a weight" for name, cost in decoding.items()]
            print(f"{target:12} {shown:14} {'; '.join(texts)}")
    print(write("decoded_weights", {"unit": "instructions; WebAssembly: seconds", "targets": result}))


if __name__ == "__main__":
    main()
