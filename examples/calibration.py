"""Write calibration inputs of an example model, from its training data, to an .npz file.

`python examples/calibration.py byte-lm out.npz` stores one array per model input, keyed by the input's name, with
samples along axis 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.data import byte_windows, digits, python_sources

DIGITS_SAMPLES = 64
LM_SAMPLES = 16
LM_LENGTH = 256
SEED = 2
MODELS = ("digits-vit", "digits-cnn", "byte-lm")


def calibration_inputs(model: str) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs for one of `MODELS`: "image" [64, 1, 8, 8] float32 or "tokens" [16, 256] int64."""
    if model == "byte-lm":
        return {"tokens": byte_windows(python_sources(), LM_LENGTH, LM_SAMPLES, SEED)}
    train_x, _, _, _ = digits()
    return {"image": train_x[:DIGITS_SAMPLES]}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("output", type=Path, help="the .npz file to write")
    options = parser.parse_args(arguments)
    with options.output.open("wb") as file:
        np.savez(file, allow_pickle=False, **calibration_inputs(options.model))


if __name__ == "__main__":
    main()
