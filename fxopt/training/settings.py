"""What a user may ask of `finetune`, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.errors import InvalidOption, unknown
from fxopt.training.losses import LOSSES
from fxopt.training.masks import MASKS

OptimizerMaker = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]
Schedule = Callable[[int, int], float]
_WARM_UP = 0.05  # share of the steps


def _linear(step: int, total: int) -> float:
    return _warm(step, total) * (total - step) / total


def _cosine(step: int, total: int) -> float:
    return _warm(step, total) * 0.5 * (1.0 + math.cos(math.pi * step / total))


def _warm(step: int, total: int) -> float:
    return min(1.0, (step + 1) / max(1.0, _WARM_UP * total))


SCHEDULES: dict[str, Schedule] = {"constant": lambda step, total: 1.0, "linear": _linear, "cosine": _cosine}


@dataclass(frozen=True)
class Settings:
    """The keywords of `finetune`; None is replaced by what fits the model and the data."""

    loss: str | Callable[[Any, Any], torch.Tensor] | None = "cross-entropy"
    task: float = 1.0
    distill: float | None = None
    squarehead: float | None = None
    temperature: float = 1.0
    blocks: Sequence[str] | None = None
    train: str | None = None
    masks: str = "zeros"
    optimizer: OptimizerMaker | None = None
    learning_rate: float = 1e-3
    schedule: str | Schedule | None = None
    clip: float | None = None
    steps: int | None = None
    epochs: int | None = None
    targets: str | None = None
    checkpoint: Path | None = None
    checkpoint_every: int = 100
    resume: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise unknown("loss", self.loss, LOSSES)
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if self.masks not in MASKS:
            raise unknown("masks", self.masks, MASKS)
        for name in ("task", "distill", "squarehead"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InvalidOption(f"{name}={value}; expected a weight of at least 0")
        for name in ("temperature", "learning_rate", "clip", "steps", "epochs", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidOption(f"{name}={value}; expected more than 0")
        if self.steps is not None and self.epochs is not None:
            raise InvalidOption(f"steps={self.steps} and epochs={self.epochs}: give one of them")
        if self.resume and self.checkpoint is None:
            raise InvalidOption("resume=True needs checkpoint=, the folder of the run that was cut off")

    def total(self, batches: int | None) -> int | None:
        """The number of steps; None when it is known only at the end of the data."""
        if self.steps is not None:
            return self.steps
        return None if batches is None else batches * (self.epochs or 1)

    def rate(self, step: int, total: int | None) -> float:
        """The factor of the learning rate in a step, counted from 0.

        Raises:
            InvalidOption: the schedule needs a number of steps that is not known.
        """
        schedule = self.schedule if self.schedule is not None else ("constant" if total is None else "linear")
        if schedule == "constant":
            return 1.0
        if total is None:
            raise InvalidOption(f"schedule={schedule!r} needs steps=, or data of a known length")
        return (SCHEDULES[schedule] if isinstance(schedule, str) else schedule)(step, total)

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the run that was cut off."""
        names = (
            "loss", "task", "distill", "squarehead", "temperature", "blocks", "train", "masks", "optimizer",
            "learning_rate", "schedule", "clip", "steps", "epochs", "seed",
        )  # fmt: skip
        found = {name: getattr(self, name) for name in names}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        return {
            name: getattr(value, "__qualname__", "a function") if callable(value) else value
            for name, value in plain.items()
        }
