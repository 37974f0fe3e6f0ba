"""Calibration statistics: one run of the graph over the samples serves every pass.

Memory is bounded: of each observed value ranges and a sample of at most `ROWS` rows (or `ITEMS` whole items of an
image-like value, one of four axes that no linear takes; `SEQUENCES` where a pass wants whole ones of others) are kept,
never the value itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxopt.errors import InvalidInput
from fxopt.ir.graph import Graph
from fxopt.ir.interpreter import Evaluator
from fxopt.ir.views.conv import Conv, convs
from fxopt.ir.views.linear import Linear, linears
from fxopt.passes.histogram import Histogram

_STATE_SECONDS = 5.0  # between two writings of the state
ROWS = 256
ITEMS = 8
SEQUENCES = 2
Progress = Callable[[str, int, int], None]


@dataclass
class Extremes:
    """Smallest and largest element: of all, and of each feature (the last axis; None for image-like values)."""

    minimum: float = float("inf")
    maximum: float = float("-inf")
    channel_minimum: torch.Tensor | None = None
    channel_maximum: torch.Tensor | None = None

    def widen(self, low: float, high: float, channels: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Take one more observation into account."""
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if channels is None:
            return
        if self.channel_minimum is None or self.channel_maximum is None:
            self.channel_minimum, self.channel_maximum = channels
        elif self.channel_minimum.shape == channels[0].shape:
            self.channel_minimum = torch.minimum(self.channel_minimum, channels[0])
            self.channel_maximum = torch.maximum(self.channel_maximum, channels[1])

    def largest(self) -> torch.Tensor:
        """The largest magnitude of each feature."""
        assert self.channel_minimum is not None and self.channel_maximum is not None
        return torch.maximum(-self.channel_minimum, self.channel_maximum)


@dataclass
class ValueStats(Extremes):
    """Statistics of one value over all calibration samples."""

    mean_minimum: float = 0.0  # mean over the samples of the smallest element
    mean_maximum: float = 0.0
    calls: int = 0
    sample: torch.Tensor | None = None  # [rows, features], or [items, C, *spatial]
    sample_half: torch.Tensor | None = None  # of each kept row: 0 or 1, by turns of the calls
    halves: tuple[Extremes, Extremes] = field(default_factory=lambda: (Extremes(), Extremes()))  # of either half
    channel_mean: torch.Tensor | None = None
    histogram: Histogram | None = None  # where a pass asked for it
    _rows: int = field(default=0, repr=False)
    _share: int = field(default=ROWS, repr=False)
    is_rows: bool = False  # features are on the last axis, whatever the number of axes: the input of a linear
    is_whole: bool = False  # a pass asked for whole items
    items: torch.Tensor | None = None  # these: [items, ...]

    def add(self, value: torch.Tensor) -> None:
        """Take one more observation into account."""
        if value.numel() == 0:
            return
        low, high = (bound.item() for bound in torch.aminmax(value))
        if low != low or high != high:
            raise InvalidInput("a calibration sample gives NaN inside the model; leave that sample out")
        channels = self._channels(value)
        self.widen(low, high, channels)
        self.halves[self.calls % 2].widen(low, high, channels)
        self.calls += 1
        self.mean_minimum += (low - self.mean_minimum) / self.calls
        self.mean_maximum += (high - self.mean_maximum) / self.calls
        if self.histogram is not None:
            self.histogram.add(value, low, high)
        self._keep(value)

    def _channels(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Extremes of each feature; their mean is kept."""
        if not value.dim() or self._is_image(value):
            return None
        rows = value.reshape(-1, value.shape[-1]).float()
        mean = rows.mean(0)
        if self.channel_mean is None:
            self.channel_mean = mean
        elif self.channel_mean.shape == mean.shape:
            self.channel_mean = self.channel_mean + (mean - self.channel_mean) * (len(rows) / (self._rows + len(rows)))
        self._rows += len(rows)
        return rows.amin(0), rows.amax(0)

    def _is_image(self, value: torch.Tensor) -> bool:
        return value.dim() >= 4 and not self.is_rows

    def _more_items(self, items: torch.Tensor) -> torch.Tensor:
        """What is kept, with as many more as there is room for."""
        assert self.items is not None
        if len(self.items) >= SEQUENCES or self.items.shape[1:] != items.shape[1:]:
            return self.items
        return torch.cat([self.items, items[: SEQUENCES - len(self.items)]])

    def _keep(self, value: torch.Tensor) -> None:
        if self.is_whole:
            items = value[:SEQUENCES]
            self.items = items.clone() if self.items is None else self._more_items(items)
        if self._is_image(value):
            limit, taken = ITEMS, value[:ITEMS]
        else:
            rows = value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)
            limit = ROWS
            taken = rows[:: max(1, -(-rows.shape[0] // self._share))]
        half = (self.calls - 1) % 2
        if self.sample is None or self.sample_half is None:
            self.sample = taken[:limit].clone()
            self.sample_half = torch.full((len(self.sample),), half)
        elif self.sample.shape[0] < limit and self.sample.shape[1:] == taken.shape[1:]:
            more = taken[: limit - self.sample.shape[0]]
            self.sample = torch.cat([self.sample, more])
            self.sample_half = torch.cat([self.sample_half, torch.full((len(more),), half)])


@dataclass
class Stats:
    """Statistics by fx node name."""

    values: dict[str, ValueStats] = field(default_factory=dict)
    samples: int = 0
    moments: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # of the candidate that is applied now
    notes: list[str] = field(default_factory=list)  # what the user should know, for the ledger
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)  # what several candidates of one view share

    def __getitem__(self, node: fx.Node) -> ValueStats:
        return self.values[_name(node)]

    def key(self, node: fx.Node) -> str:
        """The name under which the value was observed."""
        return _name(node)

    def __contains__(self, node: fx.Node) -> bool:
        found = self.values.get(_name(node))
        return found is not None and found.calls > 0


def _name(node: fx.Node) -> str:
    """The name under which the value was observed, also when a pass has replaced the node since."""
    name: str = node.meta.get("stands_for", node.name)
    return name


def _inputs_of_linears(graph: Graph) -> set[str]:
    """Values that linears take, and no convolution."""
    taken = {view.x.name for view in linears(graph) if isinstance(view, Linear)}
    return taken - {view.x.name for view in convs(graph) if isinstance(view, Conv)}


def collect(
    graph: Graph,
    samples: Sequence[Sequence[torch.Tensor]],
    nodes: Iterable[fx.Node],
    *,
    evaluator: Evaluator | None = None,
    progress: Progress | None = None,
    histograms: Iterable[fx.Node] = (),
    whole: Iterable[fx.Node] = (),
    state: Path | None = None,
) -> Stats:
    """Run the graph on every sample (flat inputs) and keep statistics of `nodes`.

    Args:
        histograms: those of the nodes that get a histogram too.
        whole: those of the nodes of which whole items are kept.
        state: a file from which an earlier run that was cut off goes on, and that is written as this one proceeds.

    Raises:
        InvalidInput: a sample gives NaN, or the state belongs to something else.
        OutputError: the state cannot be written.
    """
    wanted = {node.name for node in nodes}
    share = max(1, ROWS // max(1, len(samples)))
    counted, kept_whole = ({node.name for node in nodes} for nodes in (histograms, whole))
    stats = Stats(
        {name: ValueStats(histogram=Histogram() if name in counted else None, _share=share) for name in wanted}
    )

    def observe(node: fx.Node, value: object) -> None:
        if node.name in wanted and isinstance(value, torch.Tensor) and value.is_floating_point():
            stats.values[node.name].add(value)

    if not wanted:
        return stats
    from fxopt.passes import stats_file  # it imports this file

    key = "" if state is None else stats_file.fingerprint(graph, samples, sorted(wanted), sorted(counted))
    earlier = None if state is None else stats_file.load(state, key)
    if earlier is not None:
        stats.samples, stats.values = earlier
    for name in kept_whole & wanted:
        stats.values[name].is_whole = True
    for name in _inputs_of_linears(graph) & wanted:
        stats.values[name].is_rows = True
    written = time.monotonic()
    for index, sample in enumerate(samples):
        if index < stats.samples:
            continue
        graph.run(sample, evaluator=evaluator, observer=observe)
        stats.samples += 1
        if state is not None and (stats.samples == len(samples) or time.monotonic() - written > _STATE_SECONDS):
            stats_file.save(state, key, stats.samples, stats.values)
            written = time.monotonic()
        if progress is not None:
            progress("calibrating", index + 1, len(samples))
    return stats
