"""Support vector machines of ai.onnx.ml: SVMClassifier, SVMRegressor.

Source: LIBSVM (Chang and Lin 2011): one-against-one decision functions, votes, Platt scaling and the pairwise coupling
of Wu, Lin and Weng (2004), second method.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.foreign import Array, host_data
from fxopt.ir.onnx.references.common import first
from fxopt.ir.onnx.references.ml_linear import two_scores
from fxopt.ir.onnx.references.ml_scores import as_float, as_rows, labels_of, transform, vector
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("ai.onnx.ml")

_SMALLEST = 1e-7  # pairwise probabilities stay this far from 0 and 1


def kernel(x: Tensor, vectors: Tensor, kind: str, parameters: list[float] | None) -> Tensor:
    """k(x, v) of every row of x [N, F] and of `vectors` [S, F]; the parameters are gamma, coef0, degree.

    Raises:
        InvalidInput: there is no such kernel.
    """
    gamma, offset, degree = parameters or [0.0, 0.0, 0.0]
    if kind == "RBF":
        return torch.exp(-gamma * (x.unsqueeze(1) - vectors).square().sum(-1))
    product = x @ vectors.T
    if kind == "LINEAR":
        return product
    if kind == "POLY":
        return (gamma * product + offset) ** degree
    if kind == "SIGMOID":
        return torch.tanh(gamma * product + offset)
    raise InvalidInput(f"kernel_type {kind!r} given; expected 'LINEAR', 'POLY', 'RBF' or 'SIGMOID'")


@operators.reference("SVMRegressor")
def svm_regressor(
    call: Call,
    x: Tensor,
    coefficients: list[float] | None = None,
    rho: list[float] | None = None,
    kernel_params: list[float] | None = None,
    kernel_type: str = "LINEAR",
    n_supports: int = 0,
    one_class: int = 0,
    post_transform: str = "NONE",
    support_vectors: list[float] | None = None,
) -> Tensor:
    """The values [N, 1] of x [N, F] as float32; for one class 1 inside and -1 outside."""
    wide = as_rows(as_float(x))
    weights = vector(coefficients, wide)
    offset = rho[0] if rho else 0.0
    features = wide
    if n_supports:
        vectors = vector(support_vectors, wide).reshape(n_supports, -1)
        features = kernel(wide, vectors, str(kernel_type), kernel_params)
    scores = (features @ weights + offset).unsqueeze(1)
    if one_class:
        return torch.where(scores > 0, 1.0, -1.0).to(torch.float32)
    return transform(scores, str(post_transform)).to(torch.float32)


def pairwise_scores(features: Tensor, weights: Tensor, counts: list[int], rho: Tensor) -> Tensor:
    """The decision values [N, pairs] for the pairs of classes (0, 1), (0, 2), ..., (1, 2), ...

    Args:
        features: kernels with the support vectors, [N, S], which are sorted by class.
        weights: [classes - 1, S]; of a vector against the other classes in order.
        counts: the number of support vectors of every class.
    """
    ends = np.cumsum(counts).tolist()
    parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    scores: list[Tensor] = []
    for i, one in enumerate(parts):
        for j in range(i + 1, len(parts)):
            other = parts[j]
            ours = features[:, one] @ weights[j - 1, one]
            theirs = features[:, other] @ weights[i, other]
            scores.append(ours + theirs + rho[len(scores)])
    return torch.stack(scores, 1)


def votes_of(scores: Tensor, classes: int) -> Tensor:
    """The number of pairs [N, classes] that every class wins."""
    votes = torch.zeros([scores.shape[0], classes], dtype=torch.int64, device=scores.device)
    pairs = [(i, j) for i in range(classes) for j in range(i + 1, classes)]
    for index, (i, j) in enumerate(pairs):
        wins = (scores[:, index] > 0).to(torch.int64)
        votes[:, i] += wins
        votes[:, j] += 1 - wins
    return votes


def couple(pairs: Array) -> Array:
    """Class probabilities [classes] from pairwise ones, r[i, j] = P(i | i or j)."""
    classes = len(pairs)
    quadratic = -pairs.T * pairs
    np.fill_diagonal(quadratic, (pairs**2).sum(0) - np.diag(pairs) ** 2)
    p = np.full(classes, 1 / classes)
    for _ in range(max(100, classes)):
        slope = quadratic @ p
        value = p @ slope
        if np.abs(slope - value).max() < 0.005 / classes:
            break
        for t in range(classes):
            step = (value - slope[t]) / quadratic[t, t]
            p[t] += step
            value = (value + step * (step * quadratic[t, t] + 2 * slope[t])) / (1 + step) ** 2
            slope = (slope + step * quadratic[t]) / (1 + step)
            p /= 1 + step
    return p


def probabilities(scores: Array, classes: int, prob_a: list[float], prob_b: list[float]) -> Array:
    """Class probabilities [N, classes] from decision values [N, pairs] by Platt scaling and coupling."""
    platt = 1 / (1 + np.exp(scores * np.array(prob_a) + np.array(prob_b)))
    bounded = np.clip(platt, _SMALLEST, 1 - _SMALLEST)
    upper = np.triu_indices(classes, 1)
    result = np.empty((len(scores), classes))
    for row, values in zip(result, bounded, strict=True):
        pairs = np.zeros((classes, classes))
        pairs[upper] = values
        pairs.T[upper] = 1 - values
        row[:] = couple(pairs)
    return result


@operators.reference("SVMClassifier")
def svm_classifier(
    call: Call,
    x: Tensor,
    coefficients: list[float] | None = None,
    rho: list[float] | None = None,
    classlabels_ints: list[int] | None = None,
    classlabels_strings: list[str] | None = None,
    kernel_params: list[float] | None = None,
    kernel_type: str = "LINEAR",
    post_transform: str = "NONE",
    prob_a: list[float] | None = None,
    prob_b: list[float] | None = None,
    support_vectors: list[float] | None = None,
    vectors_per_class: list[int] | None = None,
) -> Any:
    """The labels [N], and the class probabilities [N, classes] or decision values, of x [N, F]."""
    wide = as_rows(as_float(x))
    classes = max(len(classlabels_strings or classlabels_ints or []), 1)
    name, labels = str(post_transform), (classlabels_ints, classlabels_strings)
    if not vectors_per_class:
        scores = wide @ vector(coefficients, wide).reshape(classes, -1).T + (rho[0] if rho else 0.0)
        winner = scores.argmax(1) if classes > 1 else (scores[:, 0] > 0).to(torch.int64)
    else:
        count = sum(vectors_per_class)
        features = kernel(wide, vector(support_vectors, wide).reshape(count, -1), str(kernel_type), kernel_params)
        weights = vector(coefficients, wide).reshape(classes - 1, count)
        scores = pairwise_scores(features, weights, vectors_per_class, vector(rho, wide))
        winner = votes_of(scores, classes).argmax(1)
        if prob_a and prob_b:
            found = probabilities(host_data(scores.double()), classes, prob_a, prob_b)
            scores = torch.from_numpy(found).to(scores.device)
        elif classes == 2:
            return first(call, labels_of(winner, *labels), two_scores(scores[:, 0], name, False).to(torch.float32))
    return first(call, labels_of(winner, *labels), transform(scores, name).to(torch.float32))
