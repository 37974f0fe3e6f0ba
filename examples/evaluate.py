"""Quality of the example models, for `fxopt --evaluate examples/evaluate.py:digits_accuracy` and the like.

Each function takes the model as a callable from one input tensor to its logits (or a sequence that starts with them)
and returns a number of which higher is better.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.data import byte_windows, digits, python_documentation

Model = Callable[[Tensor], "Tensor | Sequence[Tensor]"]

DIGITS_BATCH = 50
LM_BATCH = 8
LM_WINDOWS = 64
LM_LENGTH = 256
LM_SEED = 1


def _logits(model: Model, batch: Tensor) -> Tensor:
    """Run the model on one batch and return its first output as float32 on the CPU."""
    with torch.no_grad():
        output = model(batch)
    first = output[0] if isinstance(output, (list, tuple)) else output
    return torch.as_tensor(first).float().cpu()


def digits_accuracy(model: Model) -> float:
    """Return the percentage of the 450 digits test images that the model classifies correctly."""
    _, _, test_x, test_y = digits()
    batches = torch.split(torch.from_numpy(test_x), DIGITS_BATCH)
    predicted = torch.cat([_logits(model, batch).argmax(dim=-1) for batch in batches])
    return 100.0 * (predicted == torch.from_numpy(test_y)).double().mean().item()


def byte_lm_bits(model: Model) -> float:
    """Return minus the bits per byte on Python's documentation: 64 windows of 256 bytes, first byte given."""
    windows = torch.from_numpy(byte_windows(python_documentation(), LM_LENGTH, LM_WINDOWS, LM_SEED))
    nats = 0.0
    for batch in torch.split(windows, LM_BATCH):
        logits = _logits(model, batch)[:, :-1]
        nats += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return -nats / math.log(2.0) / (LM_WINDOWS * (LM_LENGTH - 1))
