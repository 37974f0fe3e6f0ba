"""Calibration data: sample inputs from files, iterables or a random generator, checked against a model's inputs.

Files: an `.npz` holds one array per model input under the input's name, samples along axis 0; an `.npy` is the array of
the only input; a folder holds such files (or one `.npy` per input, named after it). Rows are stacked to batches: of the
input's first dimension where that is fixed, else of `batch_size`. An input of one axis less than its array has no batch
axis: each row is one whole input. A `.jsonl` has one object per line, a `.json` a list of them, or lists by input name.

Iterables give a batch per item: a dict by input name (that of a tokeniser too), a tuple, or the only input. A row
without a batch axis, such as that of a data set of tokens, is a batch of one. `rows` says what is left out of dicts.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fxopt.calibration.checks import Sample, Warn, doubts
from fxopt.calibration.files import from_mapping, from_path
from fxopt.calibration.lookups import check_lookups
from fxopt.calibration.made_up import RANDOM_SAMPLES, random_samples
from fxopt.calibration.rows import batches
from fxopt.errors import InvalidInput, InvalidOption
from fxopt.ir.graph import Graph

__all__ = ["Sample", "load"]


def load(
    source: str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any],
    graph: Graph,
    *,
    batch_size: int = 1,
    samples: int | None = None,
    seed: int = 0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    warn: Warn = warnings.warn,
) -> list[Sample]:
    """The batches that `source` gives.

    Args:
        source: "random"; a file or folder; a dict of arrays whose rows are samples; or an iterable of batches, each a
            dict by input name, a tuple in the order of the inputs, or the only input.
        batch_size: rows per batch, where the model leaves it open.
        samples: at most so many batches (random: so many, default 16).
        input_shapes: sizes of dynamic dimensions for random data.
        warn: called with what the user should know about the data.

    Raises:
        InvalidInput: the data cannot be read or does not fit the model.
    """
    if batch_size < 1 or (samples is not None and samples < 1):
        raise InvalidOption(f"batch size {batch_size} and samples {samples} must be 1 or more")
    if isinstance(source, str) and source == "random":
        return random_samples(graph, samples or RANDOM_SAMPLES, batch_size, seed, input_shapes, warn)
    found = _given(source, graph, batch_size, samples, _once(warn))
    check_lookups(graph, found, "calibration")
    for doubt in doubts(found, graph.inputs):
        warn(doubt)
    return found


def _given(
    source: str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any],
    graph: Graph,
    batch_size: int,
    samples: int | None,
    say: Warn,
) -> list[Sample]:
    """What was given, as batches of the model."""
    if isinstance(source, (str, os.PathLike)):
        return from_path(Path(source), graph.inputs, batch_size, say)[:samples]
    if isinstance(source, Mapping):
        return from_mapping(source, graph.inputs, batch_size, "calibration", say)[:samples]
    if isinstance(source, (torch.Tensor, np.ndarray)) or not isinstance(source, Iterable):
        raise InvalidInput(
            f"calibration: expected a path, 'random', a dict of arrays or an iterable of batches, got a "
            f"{type(source).__name__}; put a single batch into a list"
        )
    items = ((f"calibration batch {index}", item) for index, item in enumerate(source))
    found = list(islice(batches(items, graph.inputs, say), samples))
    if not found:
        raise InvalidInput("calibration: the iterable gave no batches (a generator that was used up before?)")
    return found


def _once(warn: Warn) -> Warn:
    """Every text at its first time only: most concern all batches."""
    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            said.add(text)
            warn(text)

    return say
