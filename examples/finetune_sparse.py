"""Prune the byte-level model to 70 % zeros in 4x1 blocks, fine-tune what is left, and store only that.

`python examples/finetune_sparse.py` takes about ten minutes on two cores; the result is written to `out/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import fxopt
from examples.calibration import calibration_inputs
from examples.data import byte_windows, python_sources
from examples.evaluate import byte_lm_bits
from fxopt.cli.progress import ProgressReporter

MODEL = Path(__file__).parent / "models" / "byte-lm.onnx"
PATTERN = "pattern=4x1,sparsity=0.7"
BATCH, LENGTH, SEED = 16, 256, 3


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(bytes, the bytes that follow) of Python's sources, one batch per step."""
    windows = torch.from_numpy(byte_windows(python_sources(), LENGTH + 1, steps * BATCH, SEED))
    return [(part[:, :-1], part[:, 1:]) for part in windows.split(BATCH)]


def tell(name: str, model: fxopt.Optimized) -> None:
    """Print the size of the weights and what the model costs on Python's documentation."""
    size = model.graph.size_bytes() / 1e6
    print(f"{name:12} {-byte_lm_bits(model):.3f} bits per byte, {size:.2f} MB of weights", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the result (default: out)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    calibration = [{"tokens": row[None]} for row in calibration_inputs("byte-lm")["tokens"]]

    dense = fxopt.optimize(MODEL, passes=[f"rearrange-channels{{{PATTERN}}}"], force=True)
    tell("dense", dense)
    with ProgressReporter() as progress:
        sparse = fxopt.optimize(
            dense, passes=[f"sparsify{{{PATTERN}}}"], calibration=calibration, budget=None, objective="size",
            force=True, progress=progress,
        )  # fmt: skip
    tell("pruned", sparse)
    state = options.out / f"finetune-{options.steps}"  # a run that was cut off goes on from there
    tuned = fxopt.finetune(
        sparse, batches(options.steps), teacher=dense, learning_rate=3e-3, checkpoint=state, resume=True
    )
    tell("fine-tuned", tuned)
    small = fxopt.optimize(tuned, passes=["pack-sparse"], objective="size", force=True)
    tell("packed", small)
    small.save(options.out / "byte-lm.sparse.onnx")
    print(f"written: {options.out / 'byte-lm.sparse.onnx'}")


if __name__ == "__main__":
    main()
