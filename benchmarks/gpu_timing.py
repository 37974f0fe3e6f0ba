"""Time CUDA calls by turns: from a cold cache, and inside a CUDA graph; each beside the error of its result."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_ROUNDS, _CALLS = 7, 5  # each competitor has so many turns of so many calls
_IN_GRAPH = 20
_FLUSHED = 256 << 20  # bytes that are written between calls: more than any second-level cache
Call = Callable[[], Any]


@dataclass
class Competitor:
    """Something that computes the same; `error` is relative (L2) to a float64 result."""

    name: str
    call: Call
    error: float | None = None
    note: str = ""


@dataclass
class Session:
    """What was measured so far, and the time that is left."""

    gpu: str  # "" without one: calls are run once and nothing is timed
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        """Whether the time is used up: what follows is only named."""
        return time.monotonic() - self.begin > self.seconds

    def skip(self, what: str, why: object) -> None:
        """Say what is not measured."""
        text = f"{what}: {type(why).__name__ if isinstance(why, Exception) else ''} {str(why).splitlines()[0][:160]}"
        self.skipped.append(text)
        print(f"skipped {text}", flush=True)

    def compare(
        self, section: str, shape: str, makers: Mapping[str, Callable[[], tuple[Call, Tensor | None]]],
        truth: Tensor | None, base: str, captured: bool = False,
    ) -> None:  # fmt: skip
        """Time competitors against `base`.

        Args:
            makers: name -> a function that returns the call and what it should give in float64, where that is not
                `truth`. A maker or a first call that fails is skipped with the reason.
            captured: whether times inside a CUDA graph are taken too.
        """
        if self.is_over:
            self.skip(f"{section} {shape}", "the time is used up")
            return
        found: list[Competitor] = []
        for name, maker in makers.items():
            try:
                call, own = maker()
                expected = truth if own is None else own
                found.append(Competitor(name, call, relative(call(), expected)))
            except Exception as error:
                self.skip(f"{section} {shape} {name}", error)
        cold = self._timed(found) if self.gpu else {}
        graph = self._captured(found) if self.gpu and captured else {}
        for item in found:
            row: dict[str, Any] = {
                "section": section, "shape": shape, "name": item.name, "error": item.error, "gpu": self.gpu or None,
            }  # fmt: skip
            for kind, times in (("cold", cold), ("graph", graph)):
                if item.name in times:
                    row[f"{kind}_us"] = statistics.median(times[item.name])
                    if base in times:
                        ratios = [b / t for b, t in zip(times[base], times[item.name], strict=True)]
                        row[f"{kind}_ratio"], row[f"{kind}_low"], row[f"{kind}_high"] = (
                            statistics.median(ratios), min(ratios), max(ratios),
                        )  # fmt: skip
            self.rows.append(row)
            print(_line(row), flush=True)

    def _timed(self, found: list[Competitor]) -> dict[str, list[float]]:
        """Microseconds of a call, the cache flushed before it: the median of each turn."""
        scratch = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")
        times: dict[str, list[float]] = {item.name: [] for item in found}
        for turn in range(_ROUNDS):
            for item in found if turn % 2 == 0 else reversed(found):
                events = []
                for _ in range(_CALLS):
                    scratch.zero_()
                    pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                    pair[0].record()
                    item.call()
                    pair[1].record()
                    events.append(pair)
                torch.cuda.synchronize()
                times[item.name].append(statistics.median(1e3 * a.elapsed_time(b) for a, b in events))
        return times

    def _captured(self, found: list[Competitor]) -> dict[str, list[float]]:
        """Microseconds of a call inside a CUDA graph of many: without the host; small operands stay in the cache."""
        graphs = {}
        for item in found:
            try:
                item.call()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for _ in range(_IN_GRAPH):
                        item.call()
                graphs[item.name] = graph
            except Exception as error:
                self.skip(f"CUDA graph of {item.name}", error)
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for turn in range(_ROUNDS):
            for name in graphs if turn % 2 == 0 else reversed(graphs):
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                graphs[name].replay()
                pair[1].record()
                torch.cuda.synchronize()
                times[name].append(1e3 * pair[0].elapsed_time(pair[1]) / _IN_GRAPH)
        return times


def relative(result: Any, truth: Tensor | None) -> float | None:
    """The relative error (L2) of a result, or of its first part where the truth is smaller (some heads)."""
    if truth is None:
        return None
    value = result[0] if isinstance(result, (tuple, list)) else result
    value = value[tuple(slice(size) for size in truth.shape)]
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['section']:9s} {row['shape']:28s} {row['name']:34s}"]
    for kind in ("cold", "graph"):
        if f"{kind}_us" in row:
            ratio = f" x{row[f'{kind}_ratio']:.2f}" if f"{kind}_ratio" in row else ""
            parts.append(f"{kind} {row[f'{kind}_us']:9.1f} us{ratio}")
    if row["error"] is not None:
        parts.append(f"error {row['error']:.1e}")
    return "  ".join(parts)
