"""Linear models of ai.onnx.ml: LinearClassifier, LinearRegressor.

Where the specification is silent, two classes with one score s follow ONNX Runtime: the second class wins where s > 0,
and the scores are [1 - s, s], or with LOGISTIC those of [-s, s]. Other transforms of one score are refused, because
ONNX's evaluators disagree on them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import InvalidModel
from fxopt.ir.onnx.references.common import first, require
from fxopt.ir.onnx.references.ml_scores import as_float, as_rows, labels_of, transform, vector
from fxopt.ir.onnx.registry import Call, Operators

operators = Operators("ai.onnx.ml")


def _scores(x: Tensor, coefficients: list[float], intercepts: list[float] | None, rows: int) -> Tensor:
    """x [N, F] @ coefficients' [F, rows] + intercepts.

    Raises:
        InvalidModel: the number of coefficients does not fit.
    """
    wide = as_rows(as_float(x))
    if len(coefficients) != rows * wide.shape[1]:
        raise InvalidModel(f"{len(coefficients)} coefficients for {rows} scores of {wide.shape[1]} features")
    scores = wide @ vector(coefficients, wide).reshape(rows, -1).T
    return scores + vector(intercepts, wide) if intercepts else scores


def two_scores(score: Tensor, post_transform: str, complement: bool = True) -> Tensor:
    """The transformed scores [N, 2] of two classes of which only the second has one, `score` [N].

    Args:
        complement: without a transform the first class has 1 - score, else -score.
    """
    known = post_transform in ("NONE", "LOGISTIC")
    require(known, f"one score for two classes with {post_transform}: the specification does not say what that is")
    rest = 1 - score if complement and post_transform == "NONE" else -score
    return transform(torch.stack([rest, score], 1), post_transform)


@operators.reference("LinearClassifier")
def linear_classifier(
    call: Call,
    x: Tensor,
    coefficients: list[float],
    intercepts: list[float] | None = None,
    classlabels_ints: list[int] | None = None,
    classlabels_strings: list[str] | None = None,
    multi_class: int = 0,
    post_transform: str = "NONE",
) -> Any:
    """The labels [N] and the scores [N, number of classes] of x [N, F]."""
    classes = len(classlabels_strings or classlabels_ints or [])
    rows = len(intercepts) if intercepts else len(coefficients) // as_rows(x).shape[1]
    raw = _scores(x, coefficients, intercepts, rows)
    winner = raw.argmax(1) if rows > 1 else (raw[:, 0] > 0).to(torch.int64)
    name = str(post_transform)
    scores = two_scores(raw[:, 0], name) if rows == 1 and classes == 2 else transform(raw, name)
    return first(call, labels_of(winner, classlabels_ints, classlabels_strings), scores.to(torch.float32))


@operators.reference("LinearRegressor")
def linear_regressor(
    call: Call,
    x: Tensor,
    coefficients: list[float] | None = None,
    intercepts: list[float] | None = None,
    post_transform: str = "NONE",
    targets: int = 1,
) -> Tensor:
    """The values [N, targets] of x [N, F]; a single target is transformed too, which ONNX Runtime leaves as it is."""
    return transform(_scores(x, coefficients or [], intercepts, targets), str(post_transform)).to(torch.float32)
