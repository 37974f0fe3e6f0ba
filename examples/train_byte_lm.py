"""Train ByteLM on Python's standard library sources and export it: 8 to 10 minutes on two free cores."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.data import byte_windows, python_documentation, python_sources
from examples.evaluate import byte_lm_bits
from examples.export import export_onnx, write_record
from examples.models import ByteLM

SEED = 0
BATCH = 16
THREADS = 2  # fixed: it changes how sums round
LEARNING_RATE = 3e-3
NAME = "byte-lm"


def train(model: ByteLM, steps: int) -> None:
    """Train `model` in place on `steps` batches of windows of Python sources: AdamW, one-cycle rate with warm-up."""
    windows = byte_windows(python_sources(), model.context + 1, steps * BATCH, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for step, batch in enumerate(torch.split(torch.from_numpy(windows), BATCH), start=1):
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {steps}: training loss {loss.item():.3f} nats per byte", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)

    torch.manual_seed(SEED)
    model = ByteLM()
    started = time.process_time()
    train(model, options.steps)
    seconds = time.process_time() - started
    tokens = torch.from_numpy(byte_windows(python_documentation(), model.context, 4, SEED))
    export_onnx(
        model,
        "tokens",
        [tokens[:2, :100], tokens, tokens[:1, :1]],
        {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=model.context)},
        options.out / f"{NAME}.onnx",
    )
    record = {
        "model": NAME,
        "data": "trained on the standard library's sources, evaluated on pydoc_data.topics (64 windows of 256 bytes)",
        "bits_per_byte": round(-byte_lm_bits(model), 4),
        "seed": SEED,
        "steps": options.steps,
        "training_cpu_seconds": round(seconds),
        "command": f"python examples/train_byte_lm.py --steps {options.steps}",
    }
    write_record(options.out / f"{NAME}.json", record, model)
    print(f"{NAME}: {record['bits_per_byte']} bits per byte, trained in {seconds:.0f} s of CPU time")


if __name__ == "__main__":
    main()
