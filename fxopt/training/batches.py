"""Batches as users give them, as inputs of a graph and targets, in an order that a resumed run repeats."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxopt.calibration.checks import Warn, as_tensor, check
from fxopt.calibration.rows import by_name, taken
from fxopt.errors import InvalidInput
from fxopt.ir.graph import ValueSpec

_TARGETS = ("labels", "label", "targets", "target")
_MASK = "attention_mask"


@dataclass(frozen=True)
class Batch:
    """One batch: the inputs in the order of the graph's, and the targets (None: the loss needs none)."""

    inputs: list[Tensor]
    targets: Any
    real: Tensor | None  # bool [batch, seq]: positions that are not padding, where an attention mask says so


class Batches:
    """The batches of all epochs, checked against the inputs of a graph.

    Args:
        data: an iterable of (inputs, targets), of tuples with the targets last, or of dicts.
        targets: the key of the targets in dicts; None: the first of "labels", "label", "targets", "target".
        needed: whether a batch must have targets.
        tokens: the first input of integers stands for targets that are not given.
    """

    def __init__(
        self,
        data: Any,
        inputs: Sequence[ValueSpec],
        targets: str | None = None,
        *,
        needed: bool = True,
        tokens: bool = False,
        seed: int = 0,
        say: Warn = warnings.warn,
    ) -> None:
        if isinstance(data, (str, bytes, Mapping, Tensor, np.ndarray)) or not isinstance(data, Iterable):
            raise InvalidInput(
                f"data: expected an iterable of batches (inputs, targets) or dicts, got a {type(data).__name__}; put a "
                "single batch into a list"
            )
        self.data = data
        self.inputs = inputs
        self.targets = targets
        self.needed = needed
        self.tokens = tokens
        self.seed = seed
        self.say: Warn = lambda text: say(str(text).removeprefix("calibration: "))

    @property
    def count(self) -> int | None:
        """Batches of one epoch, where the data say."""
        try:
            return len(self.data) if isinstance(self.data, Sized) else None
        except TypeError:  # a DataLoader of an iterable data set
            return None

    def run(self, steps: int | None, epochs: int, skipped: int = 0) -> Iterator[Batch]:
        """`steps` batches, or those of `epochs`; the first `skipped` are drawn but not given.

        Every epoch begins with random numbers of its own, by which a DataLoader shuffles.

        Raises:
            InvalidInput: there are none, or fewer than asked for, or one does not fit the model.
        """
        drawn, epoch = 0, 0
        while steps is not None or epoch < epochs:
            stream, begin = RandomStream(self.seed, epoch), drawn
            with stream.active():
                items = iter(self.data)
            while True:
                if drawn == steps:
                    return
                try:
                    with stream.active():
                        item = next(items)
                except StopIteration:
                    break
                drawn += 1
                if drawn > skipped:
                    yield self._batch(item, f"batch {drawn - 1}")
            if drawn == begin:
                self._refuse_end(drawn, epoch, steps)
            epoch += 1

    def _refuse_end(self, drawn: int, epoch: int, steps: int | None) -> None:
        if not drawn:
            raise InvalidInput("data: the iterable gave no batches (a generator that was used up before?)")
        wanted = "a second epoch" if steps is None else f"{steps} steps"
        raise InvalidInput(
            f"data: ended after {drawn} batches, and gave none in epoch {epoch + 1}; {wanted} need data that can be "
            "iterated again, such as a list or a DataLoader"
        )

    def _batch(self, item: Any, where: str) -> Batch:
        values, targets = self._parted(item, where)
        given = taken(by_name(values, self.inputs, where), self.inputs, where, self.say)
        named = check(given, self.inputs, where, self.say)
        if targets is None and self.tokens:
            targets = next((value for value in named.values() if not value.is_floating_point()), None)
        if targets is None and self.needed:
            raise InvalidInput(
                f"{where} has no targets; give (inputs, targets), or a dict with one of {', '.join(_TARGETS)} "
                "(targets= names another), or loss=None for distillation alone"
            )
        mask = next((value for name, value in named.items() if name.endswith(_MASK) and value.dim() == 2), None)
        return Batch(list(named.values()), _as_tensors(targets, where), None if mask is None else mask != 0)

    def _parted(self, item: Any, where: str) -> tuple[Any, Any]:
        """Inputs and targets of an item."""
        if isinstance(item, Mapping):
            names = {spec.name for spec in self.inputs}
            if self.targets is not None and self.targets not in item:
                had = ", ".join(map(str, item))
                raise InvalidInput(f"{where} has no {self.targets!r}, which targets= names; it has {had}")
            keys = (self.targets,) if self.targets is not None else _TARGETS
            key = next((name for name in keys if name in item and name not in names), None)
            if key is None and self.targets in names:
                return item, item[self.targets]
            return {name: value for name, value in item.items() if name != key}, None if key is None else item[key]
        values = list(item) if isinstance(item, (tuple, list)) else [item]
        if not self.needed and len(values) == len(self.inputs):
            return item, None
        if len(values) == len(self.inputs) + 1:
            return values[:-1] if len(self.inputs) > 1 else values[0], values[-1]
        if len(values) == 2 and isinstance(values[0], (Mapping, tuple, list)):
            return values[0], values[1]
        if len(values) == len(self.inputs):
            return item, None
        raise InvalidInput(
            f"{where} has {len(values)} values; expected (inputs, targets), the model takes {len(self.inputs)} inputs: "
            f"{', '.join(map(str, self.inputs))}"
        )


def _as_tensors(targets: Any, where: str) -> Any:
    if targets is None or isinstance(targets, Tensor):
        return targets
    if isinstance(targets, Mapping):
        return {key: _as_tensors(value, where) for key, value in targets.items()}
    if isinstance(targets, tuple):
        return tuple(_as_tensors(value, where) for value in targets)
    return as_tensor(targets, f"{where}: targets")


class RandomStream:
    """A stream of random numbers of its own for torch, numpy and `random`, which the surroundings do not see."""

    def __init__(self, *key: int) -> None:
        words = np.random.SeedSequence(key).generate_state(2)
        outside = _states()
        torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(int(words[0]))
        random.seed(int(words[1]))
        self._states = _states()
        _restore(outside)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside."""
        outside = _states()
        _restore(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _restore(outside)


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
