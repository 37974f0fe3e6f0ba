"""Rates of this CPU in ONNX Runtime, one thread: measures operators, fits the cost model, states its held-out error.

    python -m benchmarks.host_rates [--rounds 20] [--json benchmarks/results/host_rates.json]

The probes of `fxopt.cost_model.probes` are measured interleaved, in bursts of which the first calls are dropped. The
clock is the processor time of the one thread that computes, so that other load on the machine does not count (what it
takes from caches, memory and clock rates does). A probe's time is the median of its quietest burst, less the time of
calling a model that does nothing. Copy the printed figures into the file of the machine's class in
`fxopt/cost_model/targets/`; a test compares them with the JSON file. `--fit-only` fits the times in that file again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto

from fxopt.cost_model.fit import Measured, fit
from fxopt.cost_model.host import available_cores, host_class, instruction_sets
from fxopt.cost_model.probes import Probe, probes
from fxopt.cost_model.probes.build import Build
from fxopt.cost_model.targets import get_target
from fxopt.frontends.onnx import load
from fxopt.ir.shapes import infer
from fxopt.ir.target import Target

DEFAULT = Path(__file__).parent / "results" / "host_rates.json"
CALLS, DROPPED = 8, 3
_DTYPES = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8, "tensor(int32)": np.int32}


def main() -> None:
    """Measure, fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="bursts per probe")
    parser.add_argument("--json", type=Path, default=DEFAULT, help="where to write; other classes in it are kept")
    parser.add_argument("--fit-only", action="store_true", help="take the times from the JSON file")
    options = parser.parse_args()
    name = host_class(platform.machine().lower(), instruction_sets())
    written = json.loads(options.json.read_text()) if options.json.exists() else {}
    found = list(probes())
    record: dict[str, Any]
    record = written[name] if options.fit_only else {"machine": machine(), "rows": timed(found, options.rounds)}
    times = {row["name"]: row["seconds"] for row in record["rows"]}
    measured = [(probe, _measured(probe, times[probe.name])) for probe in found if probe.name in times]
    start = dataclasses.replace(get_target(name), cores=1)
    target = rounded(fit(start, [row for probe, row in measured if not probe.held_out]))
    record.update(summary(target, measured))
    report(target, record)
    written[name] = record
    options.json.write_text(json.dumps(written, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What was measured, and with what."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
        facts = {key.strip(): value.strip() for key, _, value in pairs}
        model = f"{facts.get('model name')}, family {facts.get('cpu family')}, model {facts.get('model')}"
    return {
        "cpu": model,
        "cores": available_cores(),
        "threads": 1,
        "load": round(os.getloadavg()[1], 1) if hasattr(os, "getloadavg") else None,
        "clock": "processor time of the thread",
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in ("onnxruntime", "onnx", "torch", "numpy")},
    }


# ---- timing


def timed(found: Sequence[Probe], rounds: int) -> list[dict[str, Any]]:
    """Seconds per run of every probe: its quietest burst, and the median over bursts."""
    nothing = Build()
    calls = {"": _call(nothing.model(nothing.op("Relu", nothing.input(1, 1))))}
    calls.update((probe.name, _call(probe.model)) for probe in found)
    bursts: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            bursts[name].append(_burst(call))
        print(f"round {turn + 1} of {rounds}", flush=True)
    overhead = min(bursts.pop(""))
    return [
        {
            "name": probe.name,
            "held_out": probe.held_out,
            "seconds": float(f"{max(min(bursts[probe.name]) - overhead, 1e-8):.4g}"),
            "median": float(f"{max(statistics.median(bursts[probe.name]) - overhead, 1e-8):.4g}"),
        }
        for probe in found
    ]


def _call(model: ModelProto) -> Callable[[], None]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    random = np.random.default_rng(1)
    for value in session.get_inputs():
        dtype = _DTYPES[value.type]
        data = random.standard_normal(value.shape) if dtype is np.float32 else random.integers(0, 100, value.shape)
        binding.bind_ortvalue_input(value.name, ort.OrtValue.ortvalue_from_numpy(np.asarray(data).astype(dtype)))
    for value in session.get_outputs():
        empty = np.zeros(value.shape, _DTYPES[value.type])  # pages are touched before the clock runs
        binding.bind_ortvalue_output(value.name, ort.OrtValue.ortvalue_from_numpy(empty))
    return lambda: session.run_with_iobinding(binding)


def _burst(call: Callable[[], None]) -> float:
    """Median seconds of one burst; short calls are repeated within a clock reading."""
    begin = time.thread_time()
    call()
    repeats = max(1, int(2e-4 / max(time.thread_time() - begin, 1e-7)))
    times = []
    for _ in range(CALLS):
        begin = time.thread_time()
        for _ in range(repeats):
            call()
        times.append((time.thread_time() - begin) / repeats)
    return statistics.median(times[DROPPED:])


# ---- fit


def _measured(probe: Probe, seconds: float) -> Measured:
    graph = load(probe.model)
    infer(graph)
    return Measured.of(probe.name, probe.group, graph, seconds)


def rounded(target: Target) -> Target:
    """The figures with the digits that a target file states."""
    return dataclasses.replace(
        target,
        launch_seconds=float(f"{target.launch_seconds:.2g}"),
        bandwidth=float(f"{target.bandwidth:.2g}"),
        cache_bandwidth=float(f"{target.cache_bandwidth:.2g}"),
        efficiency={name: float(f"{value:.2g}") for name, value in target.efficiency.items()},
    )


def summary(target: Target, measured: Sequence[tuple[Probe, Measured]]) -> dict[str, Any]:
    """The fitted figures, and the errors over fitted and held-out rows and per group."""
    groups: dict[str, list[float]] = {}
    for probe, row in measured:
        key = f"{probe.group}{', held out' if probe.held_out else ''}"
        groups.setdefault(key, []).append(abs(row.error(target)))
    held = sorted(abs(row.error(target)) for probe, row in measured if probe.held_out)
    models = [abs(row.error(target)) for probe, row in measured if probe.group == "model"]
    fitted = [abs(row.error(target)) for probe, row in measured if not probe.held_out]
    return {
        "fitted": {
            "launch_seconds": target.launch_seconds,
            "bandwidth": target.bandwidth,
            "cache_bandwidth": target.cache_bandwidth,
            "cache_bytes": target.cache_bytes,
            "efficiency": dict(target.efficiency),
        },
        "fit_error": _digits(statistics.mean(fitted)),
        "held_out_error": _digits(statistics.mean(held)),
        "held_out_rows": len(held),
        "held_out_90_percent": _digits(held[int(0.9 * len(held))]),
        "model_error": _digits(statistics.mean(models)) if models else None,
        "group_error": {name: _digits(statistics.mean(values)) for name, values in groups.items()},
        "predicted": {row.name: float(f"{row.predicted(target):.4g}") for _, row in measured},
    }


def _digits(value: float) -> float:
    return round(value, 3)


def report(target: Target, record: dict[str, Any]) -> None:
    """Print rows, figures and errors."""
    for row in record["rows"]:
        predicted = record["predicted"].get(row["name"])
        if predicted is not None:
            mark = "held out" if row["held_out"] else ""
            print(
                f"{row['name']:52} {row['seconds'] * 1e6:10.1f} us (median {row['median'] * 1e6:10.1f})"
                f"  predicted {predicted * 1e6:10.1f}  {predicted / row['seconds']:5.2f}x  {mark}"
            )
    for name, error in record["group_error"].items():
        print(f"mean absolute relative error, {name:32} {100 * error:5.1f} %")
    print(json.dumps(record["fitted"], indent=1))
    print(
        f"{target.name}: fit {100 * record['fit_error']:.0f} %, held out {100 * record['held_out_error']:.0f} % over"
        f" {record['held_out_rows']} rows (90 % of them within {100 * record['held_out_90_percent']:.0f} %),"
        f" whole models {100 * record['model_error']:.0f} %"
    )


if __name__ == "__main__":
    main()
