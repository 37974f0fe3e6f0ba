"""Patterns of zeros in a weight [out, in], and the marks by which they are kept through later passes.

A pattern is written outputs first: `2:4` (at most 2 of 4 neighbouring inputs of an output), `8x2:4` (the same 2 for 8
neighbouring outputs), `4x1` (whole blocks of 4 outputs and 1 input are zero), `1x1` or `unstructured`.
Sources: Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021), of 2:4; Zhou et al., "Learning N:M
Fine-grained Structured Sparse Neural Networks From Scratch" (2021), of N:M.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.errors import InvalidOption

UNSTRUCTURED = "unstructured"
_TEXT = re.compile(r"(?:(?P<outputs>\d+)x)?(?P<kept>\d+):(?P<of>\d+)|(?P<block>\d+)x1")


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be.

    Attributes:
        outputs: neighbouring outputs that have their zeros at the same inputs.
        kept: of N:M, N; 0: any number of blocks may be zero.
        of: of N:M, M; 1 for blocks.
    """

    outputs: int = 1
    kept: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern that a text like `2:4`, `8x2:4`, `4x1` or `unstructured` describes.

        Raises:
            InvalidOption: it describes none.
        """
        if text == UNSTRUCTURED:
            return cls()
        match = _TEXT.fullmatch(text.replace(" ", ""))
        if match is None:
            raise InvalidOption(
                f"sparsity pattern {text!r}: expected N:M like 2:4, N:M shared by outputs like 8x2:4, blocks of "
                "outputs x inputs like 4x1, or unstructured"
            )
        if match["block"]:
            found = cls(int(match["block"]))
        else:
            found = cls(int(match["outputs"] or 1), int(match["kept"]), int(match["of"]))
            if not 0 < found.kept < found.of:
                raise InvalidOption(f"sparsity pattern {text!r}: {found.kept} of {found.of} leaves no zeros to choose")
        if found.outputs < 1:
            raise InvalidOption(f"sparsity pattern {text!r}: expected at least one output")
        return found

    def __str__(self) -> str:
        if self.kept:
            return f"{self.outputs}x{self.kept}:{self.of}" if self.outputs > 1 else f"{self.kept}:{self.of}"
        return f"{self.outputs}x1"

    @property
    def is_counted(self) -> bool:
        """Whether it says how many are kept (N:M); of blocks any number can be zero."""
        return self.kept > 0

    @property
    def sparsity(self) -> float:
        """The share of zeros of N:M; of blocks it is free, and this is 0."""
        return 1 - self.kept / self.of if self.kept else 0.0

    def refusal(self, out: int, columns: int) -> str:
        """Why a weight [out, columns] cannot have the pattern, or ""."""
        if out % self.outputs:
            return f"{out} outputs do not divide by the {self.outputs} of the pattern {self}"
        if columns % self.of:
            return f"{columns} inputs do not divide by the {self.of} of the pattern {self}"
        return ""

    def shared(self, scores: Tensor) -> Tensor:
        """Scores [out, in] summed over the outputs that share their zeros: [out / outputs, in]."""
        if self.outputs == 1:
            return scores
        return _groups(scores, 0, self.outputs).sum(1)

    def spread(self, groups: Tensor) -> Tensor:
        """[out / outputs, in] -> [out, in]."""
        return groups.repeat_interleave(self.outputs, 0)

    def mask(self, scores: Tensor, sparsity: float, *, per_row: bool = False) -> Tensor:
        """Which weights to keep, bool [out, in]: those of the highest scores.

        Args:
            scores: [out, in], of each weight; those of a block are added.
            sparsity: share of blocks to remove; N:M has its own.
            per_row: blocks compete within their outputs only, not within the whole weight.
        """
        groups = self.shared(scores)
        if self.is_counted:
            runs = _groups(groups, 1, self.of)
            kept = torch.zeros_like(runs, dtype=torch.bool)
            kept.scatter_(-1, runs.topk(self.kept, -1).indices, True)
            return self.spread(kept.flatten(1))
        flat = groups if per_row else groups.reshape(1, -1)
        count = flat.shape[1] - round(flat.shape[1] * sparsity)
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept.scatter_(-1, flat.topk(count, -1).indices, True)
        return self.spread(kept.reshape(groups.shape))

    def occupied(self, weight: Tensor) -> Tensor:
        """Which blocks hold something else than zeros, bool [out / outputs, in]; needs a shape that divides."""
        used = weight != 0
        return used if self.outputs == 1 else _groups(used, 0, self.outputs).any(1)

    def zeros(self, weight: Tensor) -> float:
        """The share of blocks [outputs x 1] of a weight that are zero."""
        used = self.occupied(weight)
        return 1.0 - float(used.double().mean()) if used.numel() else 0.0

    def violation(self, weight: Tensor) -> str:
        """The first place of a weight [out, in] that breaks N:M, in words, or ""."""
        refusal = self.refusal(*weight.shape)
        if refusal or not self.is_counted or not weight.numel():
            return refusal
        counts = _groups(self.occupied(weight), 1, self.of).sum(-1)
        broken = (counts > self.kept).nonzero()
        if not len(broken):
            return ""
        group, run = (int(index) for index in broken[0])
        first = group * self.outputs
        rows = f"output {first}" if self.outputs == 1 else f"outputs {first} to {first + self.outputs - 1}"
        return (
            f"{rows}, inputs {run * self.of} to {run * self.of + self.of - 1}: {int(counts[group, run])} of "
            f"{self.of} are not zero, {self} allows {self.kept}"
        )


_BLOCKS = (4, 8, 16)  # outputs
_SOME, _FEW = 64, 0.1  # outputs that are looked at first; less than this share of zero blocks of four is nothing


def block_shares(weight: Tensor) -> tuple[tuple[str, float], ...]:
    """The shares of zero blocks of a weight [out, in], by their patterns; none where there are few or no blocks.

    Outputs that do not fill a block are left out.
    """
    blocks = [Pattern(size) for size in _BLOCKS if len(weight) >= size]
    if not blocks or not weight.shape[1] or _share(weight[:_SOME], blocks[0]) < _FEW:
        return ()
    found = ((str(pattern), _share(weight, pattern)) for pattern in blocks)
    return tuple((text, share) for text, share in found if share >= _FEW)


def _share(weight: Tensor, pattern: Pattern) -> float:
    return pattern.zeros(weight[: len(weight) // pattern.outputs * pattern.outputs])


def _groups(values: Tensor, axis: int, size: int) -> Tensor:
    """The values [rows, columns] with one axis cut into groups of `size`."""
    rows, columns = values.shape
    return values.reshape((-1, size, columns) if axis == 0 else (rows, -1, size))


@dataclass(frozen=True)
class Mark:
    """What later passes may not lose: `meta["sparsity"]` of a node whose weight was made sparse."""

    pattern: Pattern
    zeros: float  # share of zero blocks when it was made

    @classmethod
    def of(cls, pattern: Pattern, weight: Tensor) -> Mark:
        """The mark of a weight [out, in] that has the pattern."""
        return cls(pattern, pattern.zeros(weight))

    @classmethod
    def parse(cls, text: str) -> Mark:
        """The mark that `str` writes, such as `2:4 0.5`.

        Raises:
            InvalidOption: the text describes none.
        """
        pattern, _, zeros = text.partition(" ")
        try:
            share = float(zeros)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise InvalidOption(f"sparsity mark {text!r}: expected a pattern and its share of zeros, like '2:4 0.5'")
        return cls(Pattern.parse(pattern), share)

    def __str__(self) -> str:
        return f"{self.pattern} {self.zeros!r}"

    def violation(self, weight: Tensor) -> str:
        """Why the weight [out, in] no longer has the pattern, or ""."""
        broken = self.pattern.violation(weight)
        if broken:
            return broken
        left = self.pattern.zeros(weight)
        if left < self.zeros - 1e-9:
            return f"{left:.1%} of its {self.pattern.outputs}x1 blocks are zero, {self.zeros:.1%} were"
        return ""
