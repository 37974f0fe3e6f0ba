"""`fxopt optimize` on a model with 6 GB of external weights: peak of the memory that no file backs.

    python -m benchmarks.onnx_large [--layers 96] [--pass 'quantize-linear{bits=4,method=rtn,activations=float}']
    python -m benchmarks.onnx_large --convert    # the same of `fxopt convert`, from opset 10 to 23, verified

Needs 14 GB of free disk in the folder for temporary files (TMPDIR); skips, with the reason, when there is less.
The child may use 4 GB (FXOPT_MEMORY), so the model counts as one that cannot be loaded whole: one change of each
operator, shape and type is measured for all of its kind, and the ledger must say so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from fxopt.ir.onnx.external_writer import refer

WIDTH = 4096
FREE = 14 << 30
BOUND = 2 << 30
SAMPLED = re.compile(r"note: (sampled, \d+ of \d+ changes)")
CONVERTED = re.compile(r"(\d+ nodes rewritten; verified, noise to signal \S+)")
_OLD, _NEW = 10, 23


def generate(path: Path, layers: int, opset: int = 20) -> int:
    """A chain of square linears with ReLU, streamed to disk layer by layer; returns the bytes of the weights.

    Before opset 11 the ReLU is written as Clip, whose bound was an attribute then.
    """
    rng = np.random.default_rng(0)
    nodes, weights, data = [], [], Path(f"{path}.data")
    size = 4 * WIDTH * WIDTH
    block = (rng.standard_normal((WIDTH, WIDTH), np.float32) / np.sqrt(WIDTH / 2)).astype(np.float32)
    with data.open("wb") as file:
        for index in range(layers):
            tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[WIDTH, WIDTH])
            refer(tensor, data.name, file.tell(), size)
            file.write(np.roll(block, index * 17 + 1, axis=index % 2).tobytes())
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"h{index}", f"w{index}"], [f"a{index}"], name=f"matmul{index}"))
            how: dict[str, Any] = {"op_type": "Clip", "min": 0.0} if opset < 11 else {"op_type": "Relu"}
            nodes.append(helper.make_node(inputs=[f"a{index}"], outputs=[f"h{index + 1}"], name=f"relu{index}", **how))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("h0", f"h{layers}")]
    body = helper.make_graph(nodes, "large", values[:1], values[1:])
    body.initializer.extend(weights)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return data.stat().st_size


def memory_of(process: int) -> tuple[int, int]:
    """Bytes of the process that no file backs now (RssAnon + RssShmem), and the most that were resident (VmHWM)."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    sizes = {name: int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem", "VmHWM") if name in fields}
    return sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0), sizes.get("VmHWM", 0)


@dataclass
class Watched:
    """A command that has run: bytes at the peak without and with file-backed pages, and what it printed."""

    code: int
    peak: int
    resident: int
    seconds: float
    output: str


def watched(command: list[str], environment: dict[str, str]) -> Watched:
    """Run a command; its memory is looked at every 10 ms."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        peak = resident = 0
        while child.poll() is None:
            now, most = memory_of(child.pid)
            peak, resident = max(peak, now), max(resident, most)
            time.sleep(0.01)
        output.seek(0)
        return Watched(child.returncode, peak, resident, time.perf_counter() - begin, output.read())


def main() -> None:
    """Generate, optimise or convert, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=96, help=f"of {4 * WIDTH * WIDTH >> 20} MiB each")
    parser.add_argument("--pass", dest="step", default="quantize-linear{bits=4,method=rtn,activations=float}")
    parser.add_argument("--memory", default="4G")
    parser.add_argument("--convert", action="store_true", help="measure `fxopt convert`")
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args()
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < FREE:
        print(f"skipped: {free / 1e9:.1f} GB of disk are free, {FREE / 1e9:.1f} GB are needed")
        return
    with tempfile.TemporaryDirectory(prefix="fxopt-large-") as folder:
        source, target = Path(folder) / "large.onnx", Path(folder) / "out.onnx"
        size = generate(source, options.layers, _OLD if options.convert else 20)
        print(f"{size / 1e9:.2f} GB of weights, the largest has {4 * WIDTH * WIDTH / 1e6:.0f} MB", flush=True)
        command = [sys.executable, "-m", "fxopt", "convert" if options.convert else "optimize", str(source)]
        command += ["-o", str(target)]
        if options.convert:
            command += ["--opset", str(_NEW)]
        else:
            command += ["-p", options.step, "--calibration", "random", "--budget", "1000", "-t", "host"]
        ran = watched(command, {**os.environ, "FXOPT_MEMORY": options.memory, "TMPDIR": folder})
        written = sum(path.stat().st_size for path in Path(folder).glob("out.onnx*"))
    output = ran.output
    print("\n".join(output.splitlines()[:1]) if options.convert else output[-1500:])
    bound = BOUND + 4 * WIDTH * WIDTH
    print(
        f"exit {ran.code}, {ran.seconds:.0f} s, peak {ran.peak / 1e9:.2f} GB without file-backed pages "
        f"(bound {bound / 1e9:.2f})"
    )
    found = (CONVERTED if options.convert else SAMPLED).search(output)
    print(f"written: {written / 1e9:.2f} GB; said: {found[1] if found else 'not what was expected'}")
    if not options.no_result and ran.code == 0 and found:
        from benchmarks.common import write

        result: dict[str, Any] = {
            "bytes": size, "largest_tensor": 4 * WIDTH * WIDTH, "peak": ran.peak, "bound": bound,
            "seconds": ran.seconds, "written": written, "memory": options.memory, "ledger": found[1],
        }  # fmt: skip
        if options.convert:
            write("onnx_convert", {**result, "opsets": [_OLD, _NEW]})
        else:
            write("onnx_large", {**result, "pass": options.step})
    raise SystemExit(0 if ran.code == 0 and ran.peak < bound and found else 1)


if __name__ == "__main__":
    main()
