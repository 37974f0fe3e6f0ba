"""The modes a head may have: what it would see in each, its work and its error on calibration samples.

Full and skip, diagonal windows, many diagonals (one per frame), a vertical stripe, sinks with a local window, and lists
of blocks. Source: Chen et al., "Sparse-vDiT" (2025) for the first five; Xiao et al. (2023) for sinks. There the error
is a mean square and the work a count of operations; here the error is relative, behind the head's slice of the output
projection, and the work is the predicted time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fxopt.ir.ops.attention_pattern import BLOCK, Pattern, dense, diagonal, diagonals, nothing, stripes
from fxopt.ir.pattern_work import work_of_slices
from fxopt.ir.sliced_attention import HeadGroup, planned, run_slices, slices
from fxopt.passes.attention_patterns.pricing import Pricing

_PARTS = (32, 16, 8, 4)  # windows, stripes and lists of blocks are these parts of the length
_SINKS = (4, 16)
_IRREGULAR = 1.1  # lists of blocks count as so much more time: they must be clearly better
_LEAST = 1e-12  # error of what leaves anything out
_STEPS = 60  # of the price of an error
_PAIRS = 1 << 23  # of queries and keys that are looked at at once


@dataclass(frozen=True, eq=False)
class Mode:
    """What one head sees; `blocks` is bool [n, n] where only some blocks are."""

    name: str
    pattern: Pattern
    blocks: Tensor | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for modes that see the same."""
        return (self.name, self.pattern, None if self.blocks is None else tuple(self.blocks.flatten().tolist()))

    @property
    def lists(self) -> Tensor | None:
        """The list of blocks as that of one head, bool [1, n, n]."""
        return None if self.blocks is None else self.blocks[None]


@dataclass(frozen=True, eq=False)
class Choice:
    """A mode with its time over that of a dense head, and the noise it makes relative to the layer's output."""

    mode: Mode
    time: float
    error: float


FULL = Mode("full", dense())
SKIP = Mode("skip", nothing())


def fixed_modes(length: int, frame: int | None) -> Iterator[Mode]:
    """The modes that do not depend on data; many diagonals only with the length of a frame."""
    yield SKIP
    windows = [length // part // 2 for part in _PARTS]
    for window in windows:
        yield Mode("diagonal", diagonal(window))
    if frame is not None:
        for window in sorted({0, *(frame // part // 2 for part in _PARTS)}):
            yield Mode("multi-diagonal", diagonals(window, frame))
    for window in windows:
        for sink in _SINKS:
            yield Mode("sink+local", diagonal(window, sink))


def found_modes(looks: Looks) -> Iterator[Mode]:
    """The modes that depend on where a head looks."""
    length, count = len(looks.keys), len(looks.blocks)
    running = torch.cat([looks.keys.new_zeros(1), looks.keys.cumsum(0)])
    for part in _PARTS:
        width = length // part
        mass = running[width:] - running[:-width]
        yield Mode("stripe", stripes(int(mass.argmax()), width))
    for part in _PARTS:
        kept = max(1, count // part)
        if kept < count:
            listed = torch.zeros(count, count, dtype=torch.bool)
            yield Mode("blocks", dense(), listed.scatter_(1, looks.blocks.topk(kept, 1).indices, True))


@dataclass(frozen=True, eq=False)
class Looks:
    """Where a head looks, summed over samples: weights of every key [length], and of pairs of blocks [n, n]."""

    keys: Tensor
    blocks: Tensor


def looks_of(q: Tensor, k: Tensor, scale: float) -> Looks:
    """Where a head looks: q and k are [samples, length, width]; some rows of blocks at a time: all might not fit."""
    samples, length, _ = q.shape
    count = -(-length // BLOCK)
    keys, blocks = torch.zeros(length), torch.zeros(count, count)
    step = max(1, _PAIRS // (samples * length * BLOCK)) * BLOCK
    for start in range(0, length, step):
        weights = torch.softmax(q[:, start : start + step] @ k.transpose(-1, -2) * scale, -1).sum(0)
        keys += weights.sum(0)
        rows = -(-len(weights) // BLOCK)
        padded = F.pad(weights, (0, count * BLOCK - length, 0, rows * BLOCK - len(weights)))
        first = start // BLOCK
        blocks[first : first + rows] = padded.reshape(rows, BLOCK, count, BLOCK).sum((1, 3))
    return Looks(keys, blocks)


def choices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    projection: Tensor | None,
    frame: int | None,
    pricing: Pricing,
) -> list[list[Choice]]:
    """For each head what it could be: `full` first, then modes that take less time.

    Args:
        q, k, v: [samples, heads, length, width].
        projection: [out, heads * width], which takes the heads' results; None: they are taken as they are.
        frame: tokens of one frame.
        pricing: of the backend.
    """
    samples, heads, length, width = q.shape
    every: list[list[Choice]] = []
    signal = torch.zeros(samples, length, width * heads if projection is None else projection.shape[0])
    for head in range(heads):
        own = None if projection is None else projection[:, head * width : (head + 1) * width].float()
        operands = [x[:, head].float() for x in (q, k, v)]
        every.append(_head(operands, scale, own, frame, signal, head, pricing))
    power = float(signal.square().sum())
    return [[row[0], *(_relative(found, power) for found in row[1:])] for row in every]


def _relative(found: Choice, power: float) -> Choice:
    """With its error relative to the layer's output; never 0, since samples do not show everything."""
    error = found.error / power if power else float(found.error > 0)
    return Choice(found.mode, found.time, max(error, _LEAST))


def _head(
    operands: list[Tensor],
    scale: float,
    own: Tensor | None,
    frame: int | None,
    signal: Tensor,
    head: int,
    pricing: Pricing,
) -> list[Choice]:
    """Choices of one head with absolute errors; its result is added to the layer's, `signal`."""
    q, k, v = operands
    _, length, width = q.shape
    exact = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)[:, 0]  # never all pairs
    if own is None:
        signal[:, :, head * width : (head + 1) * width] = exact
    else:
        signal += exact @ own.t()
    found = [Choice(FULL, _time(FULL, pricing, slices(FULL.pattern, length)), 0.0)]
    for mode in (*fixed_modes(length, frame), *found_modes(looks_of(q, k, scale))):
        if mode.blocks is not None and not pricing.lists:
            continue
        listed = mode.blocks is not None  # such plans are for one head, and are not kept
        groups = planned([mode.pattern], length, mode.lists) if listed else slices(mode.pattern, length)
        time = _time(mode, pricing, groups)
        if time >= found[0].time:
            continue
        noise = run_slices(groups, q[:, None], k[:, None], v[:, None], scale)[:, 0] - exact
        noise = noise if own is None else noise @ own.t()
        found.append(Choice(mode, time, float(noise.square().sum())))
    return found


def _time(mode: Mode, pricing: Pricing, groups: Sequence[HeadGroup]) -> float:
    """Over that of a dense head; `groups` are its slices."""
    sliced = pricing.kernel_for(mode.pattern).tile is None
    work = work_of_slices(groups, pricing.length) if sliced else pricing.work(mode.pattern)
    return pricing.over_dense(mode.pattern, work)


def cheapest(every: list[list[Choice]], tolerance: float) -> list[Choice]:
    """One choice per head, with the least time whose errors add up to at most `tolerance`."""
    best = [row[0] for row in every]
    if tolerance <= 0:
        return best
    price = 1e9 / tolerance
    for _ in range(_STEPS):
        taken = [min(row, key=lambda found: _cost(found) + price * found.error) for row in every]
        if sum(found.error for found in taken) <= tolerance and _total(taken) < _total(best):
            best = taken
        price /= 2.5
    return best


def _cost(found: Choice) -> float:
    return found.time * (_IRREGULAR if found.mode.blocks is not None else 1.0)


def _total(taken: list[Choice]) -> float:
    return sum(map(_cost, taken))
