"""Tree ensembles of ai.onnx.ml: TreeEnsemble (5), TreeEnsembleClassifier and TreeEnsembleRegressor (1, 3, 5).

Where the specification is silent, a classifier whose votes all go to the first of two classes follows ONNX Runtime:
their sum s is the score of the second class, which wins above 0.5 if no weight is negative (scores [1 - s, s]), else
above 0 (scores [-s, s]). What ONNX's evaluators disagree on is refused: other transforms of one score than LOGISTIC,
one label only, and votes that all go to the second class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.errors import InvalidInput
from fxopt.ir.onnx.foreign import Array, host_data
from fxopt.ir.onnx.references.common import first, require
from fxopt.ir.onnx.references.ml_linear import two_scores
from fxopt.ir.onnx.references.ml_scores import as_float, as_rows, labels_of, transform
from fxopt.ir.onnx.registry import Call, Operators
from fxopt.ir.onnx.trees import LEAF, Forest, from_ids

operators = Operators("ai.onnx.ml")

_AGGREGATES = ("AVERAGE", "SUM", "MIN", "MAX")
_TRANSFORMS = ("NONE", "SOFTMAX", "LOGISTIC", "SOFTMAX_ZERO", "PROBIT")  # by number in TreeEnsemble


def _wide(x: Tensor) -> Tensor:
    """x [N, F] in a type in which its comparisons are exact."""
    return as_rows(x if x.is_floating_point() else x.to(torch.float64))


def _numbers(values: Any, as_tensor: Any) -> Array:
    """An attribute that comes as float32 numbers, or as a tensor of doubles."""
    if as_tensor is not None:
        found: Array = host_data(as_tensor).astype(np.float64).reshape(-1)
        return found
    return np.array(values or [], np.float32).astype(np.float64)


def _forest(attributes: dict[str, Any], votes: str, targets: int) -> Forest:
    """The forest of the attributes `nodes_*` and of those that start with `votes` ("class" or "target")."""
    return from_ids(
        attributes["nodes_treeids"],
        attributes["nodes_nodeids"],
        attributes["nodes_modes"],
        attributes["nodes_featureids"],
        _numbers(attributes.get("nodes_values"), attributes.get("nodes_values_as_tensor")),
        attributes["nodes_truenodeids"],
        attributes["nodes_falsenodeids"],
        attributes.get("nodes_missing_value_tracks_true"),
        (
            attributes[f"{votes}_treeids"],
            attributes[f"{votes}_nodeids"],
            attributes[f"{votes}_ids"],
            _numbers(attributes.get(f"{votes}_weights"), attributes.get(f"{votes}_weights_as_tensor")),
        ),
        targets,
    )


def _base(attributes: dict[str, Any], like: Tensor) -> Tensor:
    values = _numbers(attributes.get("base_values"), attributes.get("base_values_as_tensor"))
    return torch.from_numpy(values).to(like.device)


@operators.reference("TreeEnsembleRegressor")
def tree_ensemble_regressor(call: Call, x: Tensor, **attributes: Any) -> Tensor:
    """The values [N, n_targets] of x [N, F] as float32: votes aggregated over trees, plus base values, transformed.

    Raises:
        InvalidInput: an unknown `aggregate_function`.
    """
    how = str(attributes.get("aggregate_function", "SUM"))
    if how not in _AGGREGATES:
        raise InvalidInput(f"aggregate_function {how!r} given; expected one of {', '.join(_AGGREGATES)}")
    scores = _forest(attributes, "target", attributes.get("n_targets", 1)).aggregate(_wide(x), how)
    base = _base(attributes, scores)
    scores = scores + base if base.numel() else scores
    return transform(scores, str(attributes.get("post_transform", "NONE"))).to(torch.float32)


@operators.reference("TreeEnsembleClassifier")
def tree_ensemble_classifier(call: Call, x: Tensor, **attributes: Any) -> Any:
    """The labels [N] and the scores [N, number of classes] of x [N, F]."""
    integers, texts = attributes.get("classlabels_int64s"), attributes.get("classlabels_strings")
    name = str(attributes.get("post_transform", "NONE"))
    classes = len(texts or integers or [])
    forest = _forest(attributes, "class", max(classes, 1 + max(attributes["class_ids"])))
    scores = forest.aggregate(_wide(x), "SUM")
    base = _base(attributes, scores)
    voted = set(attributes["class_ids"])
    require(classes > 1, "a TreeEnsembleClassifier with one label: the specification does not say what its scores are")
    if classes == 2 and len(voted) == 1:
        require(voted == {0} and base.numel() < 2, "two classes of which only the second has votes or base values")
        score = scores[:, 0] + (base[0] if base.numel() else 0)
        positive = bool((forest.weights >= 0).all())
        winner = (score > (0.5 if positive else 0.0)).to(torch.int64)
        result = two_scores(score, name, positive)
    else:
        scores = scores + base if base.numel() else scores
        winner = scores.argmax(1)
        result = transform(scores, name)
    return first(call, labels_of(winner, integers, texts), result.to(torch.float32))


def _split_members(values: Any, count: int) -> tuple[tuple[float, ...], ...]:
    """The sets of BRANCH_MEMBER nodes, each ended by a NaN."""
    sets: list[tuple[float, ...]] = []
    current: list[float] = []
    for value in [] if values is None else host_data(values).reshape(-1).astype(np.float64).tolist():
        if value == value:
            current.append(value)
            continue
        sets.append(tuple(current))
        current = []
    if current:
        sets.append(tuple(current))
    if len(sets) != count:
        raise InvalidInput(f"membership_values holds {len(sets)} sets for {count} BRANCH_MEMBER nodes")
    return tuple(sets)


@operators.reference("TreeEnsemble")
def tree_ensemble(
    call: Call,
    x: Tensor,
    leaf_targetids: list[int],
    leaf_weights: Any,
    nodes_falseleafs: list[int],
    nodes_falsenodeids: list[int],
    nodes_featureids: list[int],
    nodes_modes: Any,
    nodes_splits: Any,
    nodes_trueleafs: list[int],
    nodes_truenodeids: list[int],
    tree_roots: list[int],
    n_targets: int = 1,
    aggregate_function: int = 1,
    post_transform: int = 0,
    membership_values: Any = None,
    nodes_hitrates: Any = None,
    nodes_missing_value_tracks_true: list[int] | None = None,
) -> Tensor:
    """The values [N, n_targets] of x [N, F], in the type of x."""
    modes = host_data(nodes_modes).reshape(-1).astype(np.int64)
    nodes, leaves = len(modes), len(leaf_targetids)
    empty = np.zeros(leaves, np.int64)
    places = np.arange(nodes, nodes + leaves)  # the leaves follow the nodes

    def child(ids: list[int], is_leaf: list[int]) -> Any:
        inner = np.array(ids, np.int64) + nodes * np.array(is_leaf, np.int64)
        return np.concatenate([inner, places])

    forest = Forest(
        np.concatenate([np.array(nodes_featureids, np.int64), empty]),
        np.concatenate([modes, np.full(leaves, LEAF)]),
        np.concatenate([host_data(nodes_splits).reshape(-1).astype(np.float64), empty.astype(np.float64)]),
        child(nodes_truenodeids, nodes_trueleafs),
        child(nodes_falsenodeids, nodes_falseleafs),
        np.concatenate([np.array(nodes_missing_value_tracks_true or [0] * nodes, bool), empty.astype(bool)]),
        np.array(tree_roots, np.int64),
        places,
        np.array(leaf_targetids, np.int64),
        host_data(leaf_weights).reshape(-1).astype(np.float64),
        n_targets,
        _split_members(membership_values, int((modes == 6).sum())),
    )
    scores = forest.aggregate(_wide(x), _AGGREGATES[aggregate_function])
    return transform(scores, _TRANSFORMS[post_transform]).to(as_float(x).dtype if x.dtype != torch.float16 else x.dtype)
