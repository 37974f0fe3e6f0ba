"""Progress of what takes longer than two seconds: bars on a terminal, plain lines elsewhere, both on stderr."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_PATIENCE = 2.0  # seconds of silence
_LINE_EVERY = 10.0  # seconds between plain lines of one stage


class ProgressReporter:
    """A context manager to be called with (stage, done, total); total 0 means unknown."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._task: TaskID | None = None
        self._stage = ("", 0, 0)
        self._printed = ("", 0.0)

    def __enter__(self) -> ProgressReporter:
        if self._console.is_terminal:
            self._timer = threading.Timer(_PATIENCE, self._show_bar)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Tell how far a stage is."""
        with self._lock:
            self._stage = (stage, done, total)
            if self._bar is not None:
                self._update(self._bar)
        if not self._console.is_terminal:
            self._line(stage, done, total)

    def _show_bar(self) -> None:
        with self._lock:
            columns = (
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            )  # fmt: skip
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("starting", total=None)
            self._update(self._bar)
            self._bar.start()

    def _update(self, bar: Progress) -> None:
        stage, done, total = self._stage
        if self._task is not None and stage:
            bar.update(self._task, description=stage, completed=done, total=total or None)

    def _line(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        known, when = self._printed
        name = stage.partition(" (")[0]  # figures in brackets change all the time
        if now - self._started < _PATIENCE or (name == known and now - when < _LINE_EVERY):
            return
        self._printed = (name, now)
        print(f"{stage} {done}/{total}" if total > 1 else stage, file=sys.stderr, flush=True)
