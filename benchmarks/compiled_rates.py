"""Rates of compiled code: WebAssembly timed in Node, ARM counted in instructions; fits the cost model to them.

    python -m benchmarks.compiled_rates [--targets wasm-simd,wasm-relaxed,cortex-a53,cortex-a76] [--fit-only]
        [--run-with 'taskset -c 0']

The float probes of `fxopt.cost_model.probes` and 8-bit linears and convolutions are compiled, each alone. WebAssembly
runs in the pinned Node in short bursts, on one core; a probe's time is that of its quietest one. Code for ARM runs in
qemu-aarch64, which counts instructions; seconds are these over an assumed number of instructions per second, so such
figures say how operators compare and nothing about a device. Copy the fitted figures into `fxopt/cost_model/targets/`;
a test compares them with benchmarks/results/compiled_rates.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import RESULTS, write
from benchmarks.host_rates import rounded, summary
from benchmarks.node_packages import folder as packages
from benchmarks.node_packages import node
from fxopt.backends.tvm import Tvm, qemu
from fxopt.backends.tvm.executable import TvmExecutable
from fxopt.cost_model.fit import PLAN, Measured, fit
from fxopt.cost_model.probes import Probe, probes
from fxopt.cost_model.targets import get_target
from fxopt.errors import FxoptError
from fxopt.frontends.onnx import load
from fxopt.frontends.torch_export import load as load_torch
from fxopt.ir.graph import Graph
from fxopt.ir.ops.conv_w8a8 import conv_w8a8
from fxopt.ir.ops.linear_w8a8 import linear_w8a8
from fxopt.ir.shapes import infer
from fxopt.ir.target import Target

SCRIPT = Path(__file__).with_name("compiled_rates.mjs")
FLOATS = (
    "launch",
    "gemv",
    "linear float32",
    "conv float32",
    "attention",
    "norm",
    "elementwise",
    "pool",
    "memory",
    "model",
)
LINEARS = [(m, k, n) for m in (4, 16, 128) for k, n in ((384, 384), (384, 1536), (1536, 384), (768, 768))]
CONVS = [  # outputs, inputs / groups, kernel, size, stride, groups
    *((32, 3, 3, 112, 2, 1), (96, 1, 3, 56, 1, 96), (240, 1, 5, 14, 1, 240), (64, 64, 3, 56, 1, 1)),
    *((256, 64, 1, 56, 1, 1), (64, 256, 1, 56, 1, 1), (256, 256, 3, 14, 1, 1), (512, 128, 1, 28, 1, 1)),
]
# Instructions per second of the one core: an assumption, which cancels where operators are compared.
PACE = {"cortex-a53": 1.0 * 1.4e9, "cortex-a76": 2.5 * 2.4e9}
MOVING = ("launch", "gemv", "memory")  # groups of which instructions say little
MOST_MACS = 8e7  # of a probe that is emulated


@dataclass(frozen=True)
class Case:
    """One model: with the group of a probe, for the fit."""

    name: str
    group: str
    held_out: bool
    graph: Graph


def main() -> None:
    """Measure, fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ["wasm-simd", "wasm-relaxed", *PACE]
    parser.add_argument("--targets", type=lambda text: text.split(","), default=known, help=f"of {','.join(known)}")
    parser.add_argument("--run-with", type=str.split, default=[], help="what the timing command begins with")
    parser.add_argument("--fit-only", action="store_true", help="take the times from the JSON file")
    options = parser.parse_args()
    path = RESULTS / "compiled_rates.json"
    result = json.loads(path.read_text())["targets"] if path.exists() else {}
    found = list(cases())
    for name in options.targets:
        members = [case for case in found if not (name in PACE and case.group in MOVING)]
        if not options.fit_only:
            result[name] = {"rows": measured(members, get_target(name), options.run_with)}
            write("compiled_rates", {"targets": result, "instructions_per_second": PACE})
        times = {row["name"]: row["seconds"] for row in result[name]["rows"]}
        rows = [
            (case, Measured.of(case.name, case.group, case.graph, times[case.name]))
            for case in members
            if case.name in times
        ]
        start = dataclasses.replace(get_target(name), cores=1)
        groups = {case.group for case in members}
        plan = {figure: tuple(set(shown) & groups) for figure, shown in PLAN.items() if set(shown) & groups}
        plan.pop("cache_bytes", None)
        target = rounded(fit(start, [row for case, row in rows if not case.held_out], plan))
        result[name].update(summary(target, rows))  # type: ignore[arg-type]
        show(name, result[name])
    print(write("compiled_rates", {"targets": result, "instructions_per_second": PACE}))


def show(name: str, record: dict[str, Any]) -> None:
    """Print rows, figures and errors."""
    for row in record["rows"]:
        predicted = record["predicted"][row["name"]]
        mark = "held out" if row["held_out"] else ""
        print(f"{row['name']:48} {1e6 * row['seconds']:10.1f} us  predicted {predicted / row['seconds']:5.2f}x  {mark}")
    print(name, json.dumps({key: record[key] for key in record if key not in ("rows", "predicted")}, indent=1))


# ---- what is measured


def cases() -> Iterator[Case]:
    """The probes in floats, then 8-bit layers; every second one is held out."""
    for probe in probes():
        if probe.group in FLOATS and "int8" not in probe.name and "fused" not in probe.name:
            yield _case(probe)
    layers: list[tuple[str, str, nn.Module, torch.Tensor]] = []
    for m, k, n in LINEARS:
        layers.append(("linear int8", f"{m}x{k}x{n}", Linear(k, n), torch.rand(m, k)))
    for outputs, inner, kernel, size, stride, groups in CONVS:
        convolution = Conv(outputs, inner, kernel, stride, groups)
        text = "x".join(map(str, (outputs, inner, kernel, size, stride, groups)))
        layers.append(("conv int8", text, convolution, torch.rand(1, inner * groups, size, size)))
    for index, (group, text, module, x) in enumerate(layers):
        yield Case(f"{group}: {text}", group, index % 2 == 1, load_torch(module.eval(), (x,)))


def _case(probe: Probe) -> Case:
    graph = load(probe.model)
    infer(graph)
    return Case(probe.name, probe.group, probe.held_out, graph)


class Linear(nn.Module):
    """An 8-bit linear with static levels."""

    def __init__(self, inner: int, outputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("codes", torch.randint(-63, 64, (outputs, inner), generator=generator, dtype=torch.int8))
        self.register_buffer("scales", torch.full((outputs,), 0.01))
        self.register_buffer("bias", torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [rows, outputs]."""
        return linear_w8a8.target(x, self.codes, self.scales, self.bias, 1 / 127, 0)  # type: ignore[no-any-return]


class Conv(nn.Module):
    """An 8-bit convolution with static levels."""

    def __init__(self, outputs: int, inner: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shape = (outputs, inner, kernel, kernel)
        self.register_buffer("codes", torch.randint(-63, 64, shape, generator=generator, dtype=torch.int8))
        self.register_buffer("scales", torch.full((outputs,), 0.01))
        self.how = ([stride] * 2, [kernel // 2] * 4, [1, 1], groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [N, outputs, height, width]."""
        return conv_w8a8.target(x, self.codes, self.scales, None, 1 / 127, 0, 0.05, 0, *self.how)  # type: ignore[no-any-return]


# ---- measuring


def measured(found: list[Case], target: Target, prefix: list[str]) -> list[dict[str, Any]]:
    """Seconds of every case that compiles."""
    rows = []
    for group in dict.fromkeys(case.group for case in found):
        members = [case for case in found if case.group == group]
        times = counted(members, target) if target.name in PACE else timed(members, target, prefix)
        for case in members:
            if case.name in times:
                seconds = float(f"{times[case.name]:.4g}")
                rows.append({"name": case.name, "held_out": case.held_out, "seconds": seconds})
        print(f"{target.name}: {group}, {len(members)} cases", flush=True)
    return rows


def compiled(case: Case, target: Target) -> TvmExecutable | None:
    """The case; None where an operator has no kernel."""
    try:
        made = Tvm().compile(case.graph, target)
    except FxoptError as error:
        print(f"left out: {case.name}: {error}")
        return None
    assert isinstance(made, TvmExecutable)
    return made


def timed(found: list[Case], target: Target, prefix: list[str]) -> dict[str, float]:
    """Of the quietest burst in Node."""
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for index, case in enumerate(found):
            made = compiled(case, target)
            if made is not None:
                made.save(Path(scratch) / f"case{index}")
                made.close()
                jobs.append({"name": case.name, "folder": f"case{index}"})
        job = Path(scratch) / "job.json"
        build = "relaxed" if target.name == "wasm-relaxed" else "simd128"
        job.write_text(json.dumps({"build": build, "jobs": jobs}), encoding="utf-8")
        command = [*prefix, str(node(packages())), str(SCRIPT), str(job)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=True)
    times: dict[str, float] = json.loads(done.stdout)
    return times


def counted(found: list[Case], target: Target) -> dict[str, float]:
    """Executed instructions over the assumed pace."""
    times = {}
    for case in found:
        if _macs(case) > MOST_MACS:
            continue
        made = compiled(case, target)
        if made is None:
            continue
        build = made.package.builds[0]
        entry = build.entries[0]
        inputs = [torch.rand(port.shape).numpy() for port in entry.inputs]
        with tempfile.TemporaryDirectory() as scratch:
            counts = qemu.run_entry(build, entry, inputs, Path(scratch), count=True)[1]
        times[case.name] = sum(counts.values()) / PACE[target.name]
        made.close()
    return times


def _macs(case: Case) -> float:
    return sum(found.cost.multiply_adds for found in Measured.of(case.name, case.group, case.graph, 1.0).nodes)


if __name__ == "__main__":
    main()
