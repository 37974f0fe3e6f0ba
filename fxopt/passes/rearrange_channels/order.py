"""In which order channels keep most importance under a pattern of zeros: a greedy order, then swaps.

A `Role` is what a set of channels does in one weight. As its outputs, `size` neighbouring ones share their zeros: what
they keep of an input is relu(sum of their scores - threshold). As its inputs under N:M, the N largest of M neighbours
are kept: with the others given, the channel in a slot adds relu(its score - the N-th largest of the others). So in both
a channel j in slot i is worth  sum(relu(S[j] - T[i])) + a constant of the slot, and a swap is judged by four such sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_SWEEPS = 10
_WORK = 2_000_000_000  # additions of one search, some seconds
_LEAST = 1e-7  # of the whole, that a swap must gain


@dataclass
class Role:
    """Scores [channels, others] in their present order; `kept` of `size` neighbours (0: shared zeros, by threshold)."""

    scores: Tensor
    size: int
    kept: int = 0
    threshold: float = 0.0
    sets: Tensor | None = None  # bool [channels, others]: what each channel would keep alone; of shared zeros
    slots: Tensor = field(init=False)  # T
    worth: Tensor = field(init=False)  # of each slot with its own channel

    def permute(self, order: Tensor) -> None:
        """Put the channels into another order."""
        self.scores = self.scores[order]

    def prepare(self) -> None:
        """Find what the slots are worth."""
        self.slots = torch.empty_like(self.scores)
        self.worth = torch.empty(len(self.scores), dtype=self.scores.dtype)
        for start in range(0, len(self.scores), self.size):
            self.update(start)

    def update(self, start: int) -> None:
        """... of one group."""
        group = self.scores[start : start + self.size]
        if self.kept:
            ranked = group.sort(0, descending=True).values
            limit = ranked[self.kept - 1]
            slots = torch.where(group >= limit, ranked[self.kept], limit)  # the N-th largest of the others
        else:
            slots = self.threshold - (group.sum(0) - group)
        self.slots[start : start + self.size] = slots
        self.worth[start : start + self.size] = (group - slots).clamp_(min=0).sum(1)

    def gains(self, index: int) -> Tensor:
        """What a swap of one channel with each other one gains, without that of the same group: [channels]."""
        there = (self.scores - self.slots[index]).clamp_(min=0).sum(1)
        here = (self.scores[index] - self.slots).clamp_(min=0).sum(1)
        gained = there + here - self.worth[index] - self.worth
        start = index - index % self.size
        gained[start : start + self.size] = 0.0
        return gained

    def swap(self, i: int, j: int) -> None:
        """Exchange two channels."""
        self.scores[[i, j]] = self.scores[[j, i]]
        for start in {i - i % self.size, j - j % self.size}:
            self.update(start)


def best_order(roles: Sequence[Role]) -> Tensor:
    """An order of the channels that keeps much: channel `order[i]` comes to place i.

    The roles are changed: they end in that order.
    """
    count = len(roles[0].scores)
    order = torch.arange(count)
    shared = [role for role in roles if not role.kept and role.size > 1]
    if shared:
        greedy = clustered(shared, shared[0].size)
        if _shared_worth(shared, greedy) > _shared_worth(shared, order):
            order = greedy
    for role in roles:
        role.permute(order)
    return order[swapped(roles)]


def clustered(roles: Sequence[Role], size: int) -> Tensor:
    """Channels from important to unimportant, each with those whose kept sets overlap most with its group's."""
    sets = torch.cat([role.sets.to(torch.float32) for role in roles if role.sets is not None], 1)
    overlap = sets @ sets.t()
    means = torch.stack([role.scores.sum(1) for role in roles]).sum(0)
    free = torch.ones(len(means), dtype=torch.bool)
    order: list[int] = []
    while len(order) < len(means):
        shared = means if len(order) % size == 0 else overlap[order[len(order) // size * size :]].sum(0)
        chosen = int(shared.masked_fill(~free, -1.0).argmax())
        free[chosen] = False
        order.append(chosen)
    return torch.tensor(order)


def swapped(roles: Sequence[Role]) -> Tensor:
    """Swap channels while that gains, and return the order that this makes."""
    count = len(roles[0].scores)
    order = torch.arange(count)
    for role in roles:
        role.prepare()
    whole = sum(float(role.scores.sum()) for role in roles)
    cost = sum(2 * role.scores.numel() for role in roles)
    steps = max(1, _WORK // max(1, cost))
    for _ in range(_SWEEPS):
        changes = 0
        for index in range(count):
            if steps == 0:
                return order
            steps -= 1
            gained = torch.stack([role.gains(index) for role in roles]).sum(0)
            other = int(gained.argmax())
            if gained[other] > _LEAST * whole:
                for role in roles:
                    role.swap(index, other)
                order[[index, other]] = order[[other, index]]
                changes += 1
        if not changes:
            break
    return order


def _shared_worth(roles: Sequence[Role], order: Tensor) -> float:
    found = 0.0
    for role in roles:
        groups = torch.unflatten(role.scores[order], 0, (-1, role.size)).sum(1)
        found += float((groups - role.threshold).clamp_(min=0).sum())
    return found
