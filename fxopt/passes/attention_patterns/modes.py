"""The modes a head may have: what it would see in each, its work and its error on calibration samples.

Full and skip, diagonal windows, many diagonals (one per frame), a vertical stripe, sinks with a local window, and lists
of blocks. Source: Chen et al., "Sparse-vDiT" (2025) for the first five; Xiao et al. (2023) for sinks. There the error
is a mean square and the work a count of operations; here the error is relative, behind the head's slice of the output
projection, and the work is what the slices multiply, which is what time was measured to follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.ir.ops.attention_pattern import BLOCK, Pattern, dense, diagonal, diagonals, nothing, seen, stripes
from fxopt.ir.sliced_attention import share

_PARTS = (32, 16, 8, 4)  # windows, stripes and lists of blocks are these parts of the length
_SINKS = (4, 16)
_IRREGULAR = 1.1  # lists of blocks count as so much more work: they must be clearly better
_LEAST = 1e-12  # error of what leaves anything out
_STEPS = 60  # of the price of an error


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

    def sees(self, length: int) -> Tensor:
        """Bool [length, length]."""
        return seen(self.pattern, length, None if self.blocks is None else self.blocks[None])[0]


@dataclass(frozen=True, eq=False)
class Choice:
    """A mode with its share of the dense work, and the noise it makes relative to the layer's output."""

    mode: Mode
    work: float
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


def found_modes(weights: Tensor) -> Iterator[Mode]:
    """The modes that depend on where a head looks: weights [length, length], summed over samples."""
    length = weights.shape[-1]
    running = torch.cat([weights.new_zeros(1), weights.sum(0).cumsum(0)])
    for part in _PARTS:
        width = length // part
        mass = running[width:] - running[:-width]
        yield Mode("stripe", stripes(int(mass.argmax()), width))
    count = -(-length // BLOCK)
    padded = torch.nn.functional.pad(weights, (0, count * BLOCK - length, 0, count * BLOCK - length))
    blocks = padded.reshape(count, BLOCK, count, BLOCK).sum((1, 3))
    for part in _PARTS:
        kept = max(1, count // part)
        if kept < count:
            listed = torch.zeros(count, count, dtype=torch.bool).scatter_(1, blocks.topk(kept, 1).indices, True)
            yield Mode("blocks", dense(), listed)


def choices(
    q: Tensor, k: Tensor, v: Tensor, scale: float, projection: Tensor | None, frame: int | None
) -> list[list[Choice]]:
    """For each head what it could be: `full` first, then modes that are better than it by their work.

    Args:
        q, k, v: [samples, heads, length, width].
        projection: [out, heads * width], which takes the heads' results; None: they are taken as they are.
        frame: tokens of one frame.
    """
    samples, heads, length, width = q.shape
    every: list[list[Choice]] = []
    signal = torch.zeros(samples, length, width * heads if projection is None else projection.shape[0])
    for head in range(heads):
        own = _slice(projection, head, width)
        every.append(_head(q[:, head], k[:, head], v[:, head], scale, own, frame, signal, head))
    power = float(signal.square().sum())
    return [[row[0], *(_relative(found, power) for found in row[1:])] for row in every]


def _relative(found: Choice, power: float) -> Choice:
    """With its error relative to the layer's output; never 0, since samples do not show everything."""
    error = found.error / power if power else float(found.error > 0)
    return Choice(found.mode, found.work, max(error, _LEAST))


def _slice(projection: Tensor | None, head: int, width: int) -> Tensor | None:
    return None if projection is None else projection[:, head * width : (head + 1) * width].float()


def _head(
    q: Tensor, k: Tensor, v: Tensor, scale: float, own: Tensor | None, frame: int | None, signal: Tensor, head: int
) -> list[Choice]:
    """Choices of one head with absolute errors; its result is added to the layer's, `signal`."""
    length, width = q.shape[-2:]
    weights = torch.softmax(q.float() @ k.float().transpose(-1, -2) * scale, -1)
    exact = weights @ v.float()
    if own is None:
        signal[:, :, head * width : (head + 1) * width] = exact
    else:
        signal += exact @ own.t()
    found = [Choice(FULL, 1.0, 0.0)]
    for mode in (*fixed_modes(length, frame), *found_modes(weights.sum(0))):
        work = share(mode.pattern, length, None if mode.blocks is None else mode.blocks[None])
        if work >= 1.0:
            continue
        kept = weights * mode.sees(length)
        total = kept.sum(-1, keepdim=True)
        result = (kept @ v.float()) / total.clamp(min=1e-30)
        noise = result.masked_fill(total <= 0, 0.0) - exact
        noise = noise if own is None else noise @ own.t()
        found.append(Choice(mode, work, float(noise.square().sum())))
    return found


def cheapest(every: list[list[Choice]], tolerance: float) -> list[Choice]:
    """One choice per head, with the least work whose errors add up to at most `tolerance`."""
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
    return found.work * (_IRREGULAR if found.mode.blocks is not None else 1.0)


def _total(taken: list[Choice]) -> float:
    return sum(map(_cost, taken))
