"""Train DigitsViT and DigitsCNN on scikit-learn's digits and export them: about two minutes on one core."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.data import digits
from examples.evaluate import digits_accuracy
from examples.export import export_onnx, write_record
from examples.models import DigitsCNN, DigitsViT

SEED = 0
BATCH = 64
THREADS = 1  # fixed: it changes how sums round
MODELS: dict[str, type[nn.Module]] = {"digits-vit": DigitsViT, "digits-cnn": DigitsCNN}


def train(model: nn.Module, epochs: int) -> None:
    """Train `model` in place on the digits training images: AdamW, one-cycle rate, label smoothing."""
    train_x, train_y, _, _ = digits()
    images, labels = torch.from_numpy(train_x), torch.from_numpy(train_y)
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images))[: steps * BATCH].view(steps, BATCH):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)

    images = torch.from_numpy(digits()[2])
    for name in options.models:
        torch.manual_seed(SEED)
        model = MODELS[name]()
        started = time.process_time()
        train(model, options.epochs)
        seconds = time.process_time() - started
        export_onnx(
            model,
            "image",
            [images[:4], images[:1], images],
            {0: torch.export.Dim("batch")},
            options.out / f"{name}.onnx",
            fold_batch_norm=name != "digits-cnn",  # there it is left for the compiler to fold
        )
        record = {
            "model": name,
            "data": "scikit-learn digits, 1347 training and 450 test images",
            "test_accuracy_percent": round(digits_accuracy(model), 2),
            "seed": SEED,
            "epochs": options.epochs,
            "training_cpu_seconds": round(seconds),
            "command": f"python examples/train_digits.py --models {name} --epochs {options.epochs}",
        }
        write_record(options.out / f"{name}.json", record, model)
        print(f"{name}: {record['test_accuracy_percent']} % correct, trained in {seconds:.0f} s of CPU time")


if __name__ == "__main__":
    main()
