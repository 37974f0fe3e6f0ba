"""Ensembles of decision trees as flat arrays, evaluated for all rows and trees at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fxopt.errors import InvalidModel

Ints = npt.NDArray[np.int64]
MODES = ("BRANCH_LEQ", "BRANCH_LT", "BRANCH_GTE", "BRANCH_GT", "BRANCH_EQ", "BRANCH_NEQ", "BRANCH_MEMBER", "LEAF")
_MEMBER, LEAF = MODES.index("BRANCH_MEMBER"), MODES.index("LEAF")
_COMPARE = (torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne)


@dataclass(frozen=True)
class Forest:
    """Nodes of all trees in one list; a leaf is its own child. `weights` are [votes], each of one node and target."""

    feature: Ints  # [nodes]
    mode: Ints  # [nodes], index into MODES
    threshold: npt.NDArray[np.float64]  # [nodes]
    when_true: Ints  # [nodes]
    when_false: Ints  # [nodes]
    missing_is_true: npt.NDArray[np.bool_]  # [nodes]
    roots: Ints  # [trees]
    vote_node: Ints  # [votes]
    vote_target: Ints  # [votes]
    weights: npt.NDArray[np.float64]  # [votes]
    targets: int
    members: tuple[tuple[float, ...], ...] = ()  # of every BRANCH_MEMBER node, in the order of the nodes

    def depth(self) -> int:
        """The largest number of comparisons on the way to a leaf.

        Raises:
            InvalidModel: a node is among its own descendants.
        """
        level = np.unique(self.roots)
        for depth in range(len(self.feature) + 1):
            level = level[self.mode[level] != LEAF]
            if not level.size:
                return depth
            level = np.unique(np.concatenate([self.when_true[level], self.when_false[level]]))
        raise InvalidModel("a node of a tree ensemble is among its own descendants")

    def leaves(self, x: Tensor) -> Tensor:
        """The leaf [N, trees] that every row of x [N, F] reaches in every tree."""
        device = x.device
        feature, mode, yes, no, missing = (
            torch.from_numpy(np.ascontiguousarray(array)).to(device)
            for array in (self.feature, self.mode, self.when_true, self.when_false, self.missing_is_true)
        )
        threshold = torch.from_numpy(self.threshold).to(device)
        position = torch.from_numpy(self.roots).to(device).expand(x.shape[0], -1)
        used = [int(kind) for kind in np.unique(self.mode) if kind < _MEMBER]
        for _ in range(self.depth()):
            value = x.gather(1, feature[position]).to(torch.float64)
            goes = torch.zeros_like(value, dtype=torch.bool)
            for kind in used:
                goes = goes | ((mode[position] == kind) & _COMPARE[kind](value, threshold[position]))
            goes = goes | self._is_member(value, position)
            goes = torch.where(torch.isnan(value), missing[position], goes)
            position = torch.where(goes, yes[position], no[position])
        return position

    def _is_member(self, value: Tensor, position: Tensor) -> Tensor:
        """Whether the value is in the set of its node, where the node tests that."""
        found = torch.zeros_like(value, dtype=torch.bool)
        for node, members in zip(np.flatnonzero(self.mode == _MEMBER), self.members, strict=True):
            inside = torch.isin(value, torch.tensor(members, dtype=torch.float64, device=value.device))
            found = found | ((position == int(node)) & inside)
        return found

    def votes(self, fill: float, combine: str) -> Tensor:
        """What every node says for every target, [nodes, targets]; `fill` where it says nothing."""
        table = np.full((len(self.feature), self.targets), fill)
        at = (self.vote_node, self.vote_target)
        if combine == "SUM":
            np.add.at(table, at, self.weights)
        else:
            (np.minimum if combine == "MIN" else np.maximum).at(table, at, self.weights)
        return torch.from_numpy(table)

    def aggregate(self, x: Tensor, how: str) -> Tensor:
        """SUM, AVERAGE, MIN or MAX over the trees, [N, targets] in float64; 0 where no tree votes for a target."""
        leaves = self.leaves(x)
        if how in ("SUM", "AVERAGE"):
            table = self.votes(0.0, "SUM").to(x.device)
            total = torch.zeros([x.shape[0], self.targets], dtype=torch.float64, device=x.device)
            for tree in range(len(self.roots)):
                total = total + table[leaves[:, tree]]
            return total / len(self.roots) if how == "AVERAGE" else total
        fill = np.inf if how == "MIN" else -np.inf
        table = self.votes(fill, how).to(x.device)
        best = table[leaves]
        result = best.amin(1) if how == "MIN" else best.amax(1)
        return torch.where(result == fill, torch.zeros_like(result), result)


def from_ids(
    tree_ids: Sequence[int],
    node_ids: Sequence[int],
    modes: Sequence[str],
    features: Sequence[int],
    thresholds: Any,
    true_ids: Sequence[int],
    false_ids: Sequence[int],
    missing: Sequence[int] | None,
    votes: tuple[Sequence[int], Sequence[int], Sequence[int], Any],
    targets: int,
) -> Forest:
    """The forest of TreeEnsembleClassifier and -Regressor, whose nodes are named by (tree id, node id).

    Args:
        votes: tree ids, node ids, targets and weights of the votes.

    Raises:
        InvalidModel: a child, or the node of a vote, does not exist.
    """
    place = {key: index for index, key in enumerate(zip(tree_ids, node_ids, strict=True))}
    kinds = np.array([MODES.index(str(mode)) for mode in modes], np.int64)

    def child(ids: Sequence[int]) -> Ints:
        return np.array(
            [
                index if kind == LEAF else _find(place, tree, node)
                for index, (kind, tree, node) in enumerate(zip(kinds, tree_ids, ids, strict=True))
            ],
            np.int64,
        )

    first: dict[int, int] = {}
    for index, tree in enumerate(tree_ids):
        first.setdefault(tree, index)
    vote_trees, vote_nodes, vote_targets, weights = votes
    return Forest(
        np.array(features, np.int64),
        kinds,
        np.asarray(thresholds, np.float64),
        child(true_ids),
        child(false_ids),
        np.array(missing or [0] * len(kinds), bool),
        np.array(list(first.values()), np.int64),
        np.array([_find(place, *key) for key in zip(vote_trees, vote_nodes, strict=True)], np.int64),
        np.array(vote_targets, np.int64),
        np.asarray(weights, np.float64),
        targets,
    )


def _find(place: dict[tuple[int, int], int], tree: int, node: int) -> int:
    if (tree, node) not in place:
        raise InvalidModel(f"a tree ensemble refers to node {node} of tree {tree}, which does not exist")
    return place[tree, node]
