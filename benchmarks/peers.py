"""What fxopt is compared with: the stock quantisers of ONNX Runtime, and OpenVINO with NNCF in a process of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bursts import Burst
from benchmarks.common import machine
from benchmarks.models import Feed, Model

FP32, DYNAMIC, STATIC = "onnxruntime_fp32", "onnxruntime_quantize_dynamic", "onnxruntime_quantize_static"
OPENVINO = "openvino_nncf"
_WORKER = Path(__file__).parent / "openvino_worker.py"
_PROVIDER_WORKER = Path(__file__).parent / "provider_worker.py"


def quantize_dynamic(source: Path, path: Path) -> None:
    """ONNX Runtime's dynamic quantiser, with int8 weights per channel."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    with _Quiet():
        quantize(
            source, path, per_channel=True, weight_type=QuantType.QInt8, extra_options={"DefaultTensorType": 1}
        )  # fmt: skip


def quantize_static(source: Path, path: Path, model: Model, feeds: Sequence[Feed]) -> None:
    """ONNX Runtime's static quantiser (QDQ, int8 weights per channel, uint8 activations, ranges of `feeds`).

    Of transformers only MatMul and Gemm are quantised: everything costs accuracy and gains nothing. Weights have seven
    bits where the CPU lacks VNNI, as its documentation advises.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.feeds, None)

    prepared = path.with_suffix(".prepared")
    with _Quiet():
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize(
            prepared, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=not has_vnni(),
            op_types_to_quantize=["MatMul", "Gemm"] if model.is_transformer else None,
            extra_options={"DefaultTensorType": 1},
        )  # fmt: skip
    prepared.unlink()


def has_vnni() -> bool:
    """Whether this CPU has 8-bit dot products."""
    return bool({"avx512_vnni", "avx_vnni"} & set(machine()["instruction_sets"]))


class _Quiet:
    """The stock quantisers ask for preprocessing at every call."""

    def __enter__(self) -> None:
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)


class Worker:
    """A competitor in a process of its own; `folder` is where samples and results are exchanged."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.folder = folder
        self.stem = f"{folder}/{Path(command[1]).stem}"
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions: dict[str, str] = self._answer()["versions"]

    def compile(self, threads: int, feed: Feed) -> Burst:
        """Compile for a number of threads; bursts run on `feed`."""
        _store(Path(f"{self.stem}_feed.npz"), [feed])
        self._ask("compile", threads, f"{self.stem}_feed.npz")

        def burst(dropped: int, timed: int) -> list[float]:
            times: list[float] = self._ask("burst", dropped, timed)["seconds"]
            return times

        return burst

    def results(self, feeds: Sequence[Feed]) -> list[Any]:
        """The first output for each feed."""
        source, target = Path(f"{self.stem}_inputs.npz"), Path(f"{self.stem}_outputs.npz")
        _store(source, feeds)
        self._ask("run", str(source), str(target))
        stored = np.load(target)
        return [stored[str(index)] for index in range(len(feeds))]

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()

    def _ask(self, *command: object) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        """The next line that is an answer; libraries print too."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError(f"the process ended with code {self.process.wait()}")


def openvino(python: str, model: Path, is_transformer: bool, calibration: Sequence[Feed]) -> Worker:
    """OpenVINO with NNCF's 8-bit quantisation, in the process of a Python that has both packages."""
    samples = model.parent / "openvino_calibration.npz"
    _store(samples, calibration)
    kind = "transformer" if is_transformer else "plain"
    return Worker(model.parent, python, str(_WORKER), str(model), str(samples), kind)


def provider(python: str, model: Path) -> Worker:
    """A file in ONNX Runtime's OpenVINO provider, in the process of a Python that has onnxruntime-openvino."""
    return Worker(model.parent, python, str(_PROVIDER_WORKER), "OpenVINOExecutionProvider", str(model))


def openvino_python(given: str | None) -> tuple[str, str]:
    """A Python that has openvino and nncf, else "" and the reason."""
    python = given or sys.executable
    tried = subprocess.run([python, "-c", "import openvino, nncf"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return python, ""
    last = (tried.stderr.strip().splitlines() or ["it failed"])[-1]
    return "", f"{last}; pip install openvino nncf, or give --openvino-python"


def _store(path: Path, feeds: Sequence[Feed]) -> None:
    arrays: dict[str, Any] = {
        f"{index}/{name}": value for index, feed in enumerate(feeds) for name, value in feed.items()
    }
    np.savez(path, **arrays)
