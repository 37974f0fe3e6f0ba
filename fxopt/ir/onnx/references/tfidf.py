"""TfIdfVectorizer: counts of n-grams."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.foreign import host_data
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators()


def n_grams(pool: list[Any], starts: list[int]) -> list[tuple[Any, ...]]:
    """The n-grams of a pool whose 1-grams, 2-grams, ... begin at `starts`."""
    ends = [*starts[1:], len(pool)]
    return [
        tuple(pool[at : at + size])
        for size, (start, end) in enumerate(zip(starts, ends, strict=True), 1)
        for at in range(start, end - size + 1, size)
    ]


def occurrences(row: list[Any], size: int, max_skip_count: int) -> list[tuple[Any, ...]]:
    """All n-grams of one size whose items lie 1 to `max_skip_count` + 1 places apart; a 1-gram has no distance."""
    distances = range(1, 2 if size == 1 else max_skip_count + 2)
    return [
        tuple(row[at : at + (size - 1) * distance + 1 : distance])
        for distance in distances
        for at in range(len(row) - (size - 1) * distance)
    ]


@operators.reference("TfIdfVectorizer", raw=True)
def tf_idf_vectorizer(
    call: Call,
    x: Any,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: list[int],
    ngram_indexes: list[int],
    pool_int64s: list[int] | None = None,
    pool_strings: list[str] | None = None,
    weights: list[float] | None = None,
) -> Tensor:
    """Per row of x ([C] or [N, C]) the number of times each n-gram of the pool occurs, [max(ngram_indexes) + 1].

    `IDF` counts an n-gram at most once, times its weight; `TFIDF` multiplies the count with the weight.

    Raises:
        InvalidInput: x has another rank, or `mode` is unknown.
    """
    if str(mode) not in ("TF", "IDF", "TFIDF"):
        raise InvalidInput(f"mode {mode!r} given; expected 'TF', 'IDF' or 'TFIDF'")
    array = host_data(x)
    if array.ndim not in (0, 1, 2):
        raise InvalidInput(f"TfIdfVectorizer takes [C] or [N, C]; an array of shape {list(array.shape)} was given")
    grams = n_grams(list(pool_int64s or pool_strings or []), list(ngram_counts))
    known = {gram: index for index, gram in enumerate(grams)}
    scale = np.ones(len(grams)) if str(mode) == "TF" or not weights else np.array(weights, dtype=np.float64)
    rows = array if array.ndim == 2 else array.reshape(1, -1)
    result = np.zeros((len(rows), max(ngram_indexes) + 1))
    for y, row in zip(result, rows.tolist()):
        counts = np.zeros(len(grams))
        for size in range(min_gram_length, max_gram_length + 1):
            for gram in occurrences(row, size, max_skip_count):
                if gram in known:
                    counts[known[gram]] += 1
        np.add.at(y, ngram_indexes, (np.minimum(counts, 1) if str(mode) == "IDF" else counts) * scale)
    shaped = result if array.ndim == 2 else result[0]
    return torch.from_numpy(shaped.astype(np.float32))
