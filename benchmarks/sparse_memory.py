"""`fxopt optimize` with SparseGPT at 2:4 on a Llama of 1.1 billion parameters: peak memory, to stay below the size of
the model plus 3 GB.

    python -m benchmarks.sparse_memory [--layers 22] [--samples 16] [--length 128]

Random weights in the shape of TinyLlama, exported to ONNX by another process; nothing is downloaded. All linears but
the head, each calibrated on what the sparse ones before it give, then stored without their zeros. The command is told
to stay below the bound (FXOPT_MEMORY), so weights are mapped, and what it makes of them goes to files. Two peaks are
given: that of the memory that no file backs, which the bound is about, and that of all resident pages, of which the
kernel takes back those of mapped files when it needs them. Needs Linux and 20 GB of free disk (TMPDIR).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import write
from benchmarks.onnx_large import watched
from fxopt.frontends.onnx import load
from fxopt.ir.masks import marks, stale

VOCABULARY = 32000
ALLOWED = 3_000_000_000  # bytes beside the model
STEP = "sparsify{pattern=2:4,method=sparsegpt}"


def export(path: Path, layers: int, length: int) -> None:
    """Write the model: tokens [1, length] -> logits, with its weights beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(input_ids=tokens, use_cache=False).logits
            return logits

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=VOCABULARY, max_position_embeddings=2048, dtype=torch.float32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Logits(LlamaForCausalLM._from_config(config)).eval()
    program = torch.onnx.export(
        model, (torch.zeros(1, length, dtype=torch.int64),), dynamo=True, opset_version=20, verbose=False,
        input_names=["tokens"], output_names=["logits"], external_data=True,
    )  # fmt: skip
    assert program is not None
    program.save(path, external_data=True)


def optimize(folder: Path, source: Path, samples: int, length: int) -> dict[str, Any]:
    """Run the command on twice the samples, half of which calibrate; what it took and what came out."""
    size = sum(path.stat().st_size for path in folder.glob(f"{source.name}*"))
    bound, data, target = size + ALLOWED, folder / "tokens.npz", folder / "sparse.onnx"
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2 * samples, length))
    np.savez(data, tokens=tokens)
    command = [sys.executable, "-m", "fxopt", "optimize", str(source), "-o", str(target), "-p", STEP, "-t", "host"]
    command += ["--calibration", str(data), "--objective", "size", "--budget", "1000"]
    ran = watched(command, {**os.environ, "FXOPT_MEMORY": str(bound), "TMPDIR": str(folder)})
    print(ran.output[-3000:])
    result: dict[str, Any] = {
        "bytes": size, "bound": bound, "code": ran.code, "peak": ran.peak, "resident": ran.resident,
        "seconds": ran.seconds,
    }  # fmt: skip
    if ran.code == 0:
        graph = load(target)
        result["written"] = sum(path.stat().st_size for path in folder.glob(f"{target.name}*"))
        result["linears"], result["broken"] = len(marks(graph)), stale(graph)
    return result


def main() -> None:
    """Export, sparsify, check, and write benchmarks/results/sparse_memory.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--samples", type=int, default=16, help="that calibrate")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--export", type=Path, help="write the model to this file, and nothing else")
    parser.add_argument("--no-result", action="store_true", help="print only")
    options = parser.parse_args()
    if options.export is not None:
        export(options.export, options.layers, options.length)
        return
    with tempfile.TemporaryDirectory(prefix="fxopt-sparse-") as folder:
        source = Path(folder) / "llama.onnx"
        sizes = ["--layers", str(options.layers), "--length", str(options.length)]
        subprocess.run([sys.executable, "-m", "benchmarks.sparse_memory", *sizes, "--export", str(source)], check=True)
        print(f"{source.with_name('llama.onnx.data').stat().st_size / 1e9:.2f} GB of weights", flush=True)
        result = optimize(Path(folder), source, options.samples, options.length)
    beside = result["peak"] - result["bytes"]
    print(f"{result.get('linears', 0)} linears with the pattern; broken: {result.get('broken', 'nothing was written')}")
    print(f"peak {result['peak'] / 1e9:.2f} GB that no file backs, {beside / 1e9:+.2f} GB beside the model")
    print(f"resident, with the pages of mapped files: {result['resident'] / 1e9:.2f} GB; {result['seconds']:.0f} s")
    passed = result["code"] == 0 and result["peak"] < result["bound"] and not result["broken"]
    if not options.no_result and result["code"] == 0:
        sizes_of = {"layers": options.layers, "samples": options.samples, "length": options.length}
        print(f"written: {write('sparse_memory', {**result, **sizes_of})}")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
