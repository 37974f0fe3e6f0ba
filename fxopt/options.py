"""What a user may ask of `optimize`, checked; names resolved to targets, backends and passes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fxopt.errors import InvalidOption, MissingDependency, unknown

if TYPE_CHECKING:
    from fxopt.backends.base import Backend
    from fxopt.ir.target import Target

OBJECTIVES = ("latency", "size")
_NUMBERS = (int, float, np.floating, np.integer)
_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (  # of options that are not None
    ("budget", _NUMBERS, "a number, or None"),
    ("guard_seconds", _NUMBERS, "a number"),
    ("require_speedup", _NUMBERS, "a number, or None"),
    ("threads", (int, np.integer), "a whole number, or None for all cores"),
    ("backend", (str,), "a name, as `fxopt backends` lists them, or None"),
)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """The keywords of `optimize`, kept for a capture at the first call."""

    target: str | Target
    dynamic_shapes: Any = None
    calibration: Any = None
    evaluate: Callable[[Any], float] | None = None
    budget: float | None = 0.02
    objective: str = "latency"
    passes: Sequence[Any] | None = None
    backend: str | None = None
    include: str | None = None
    exclude: str | None = None
    threads: int | None = None
    force: bool = False
    require_speedup: float | None = None
    require_passes: tuple[str, ...] = ()
    input_shapes: Mapping[str, Sequence[Any]] | None = None
    guard_seconds: float = 10.0
    seed: int = 0
    dump: Path | None = None
    progress: Progress | None = None
    resume: Path | None = None
    custom_ops: bool = False
    buckets: Mapping[str, int | Sequence[int]] | None = None
    weights: str | None = None

    @property
    def of_backend(self) -> dict[str, Any]:
        """What the backend is made with."""
        return {"buckets": self.buckets, "weights": self.weights}

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        for name, kinds, what in _KINDS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
                raise InvalidOption(f"{name}={value!r} is a {type(value).__name__}; expected {what}")
        if self.evaluate is not None and not callable(self.evaluate):
            raise InvalidOption(f"evaluate={self.evaluate!r}; expected a function of a model that returns a number")
        if self.budget is not None and not self.budget >= 0:
            raise InvalidOption(f"budget={self.budget}; expected a number of at least 0, or None")
        if self.threads is not None and self.threads < 1:
            raise InvalidOption(f"threads={self.threads}; expected a number of at least 1, or None for all cores")
        if not self.guard_seconds > 0:
            raise InvalidOption(f"guard_seconds={self.guard_seconds}; expected more than 0")


def resolve_target(target: str | Target, threads: int | None) -> Target:
    """The target of a name; "host" is this machine, on so many threads."""
    from fxopt.ir.target import Target as TargetType

    if isinstance(target, TargetType):
        return target
    if not isinstance(target, str):
        raise InvalidOption(f"target={target!r} is a {type(target).__name__}; expected a name or a Target")
    if target == "host":
        from fxopt.cost_model.host import detect_host

        return detect_host(threads)
    from fxopt.catalog import find_target
    from fxopt.config import Config

    found = find_target(target)
    is_asked = threads is not None and threads > 1 and threads != Config.from_environment().threads
    if is_asked and found.backend == "tvm":
        raise InvalidOption(f"threads={threads}; code for {found.name} runs on one thread: leave it out")
    return found


def resolve_backend(
    name: str | None, target: Target, notes: list[str], given: Mapping[str, Any] | None = None
) -> Backend:
    """The backend of a name or `name{option=value}`, or the target's own.

    It is `eager`, with a note, where this version lacks the target's own, or what that one needs is not installed (code
    for a target cannot be had without its compiler: that is an error).

    Args:
        given: more options of the backend, from arguments of their own (None: not given).

    Raises:
        UnknownName: the backend, an option or its value does not exist.
        InvalidOption: the backend has no such option as `given`.
        MissingDependency: what it needs is not installed.
    """
    from fxopt.catalog import entries, find_backend

    known = entries("backend")
    if name is None and target.backend not in known:
        notes.append(f"backend {target.backend} is not part of this version: decided for {target.name}, run in eager")
        name = "eager"
    from fxopt.passes.base import parse_options

    plain, _, inside = (name or target.backend).partition("{")
    found: Any = find_backend(plain.strip())
    settings = parse_options(inside.strip().removesuffix("}"), name or "", "backend")
    for option in settings:
        if option not in found.options:
            raise unknown(f"option of backend {plain}", option, found.options)
    for option, value in (given or {}).items():
        if value is not None and option not in found.options:
            raise InvalidOption(f"{option} is for backends that compile code, such as tvm; {plain} has none")
    settings.update({option: value for option, value in (given or {}).items() if value is not None})
    try:
        found.require()
    except MissingDependency as error:
        if name is not None or target.is_host or found.is_compiler:
            raise
        notes.append(f"{error}: decided for {target.name}, run in eager")
        return resolve_backend("eager", target, notes)
    backend: Backend = found(**settings)
    backend.target = target
    backend.require()
    return backend


def cores_used(target: Target, backend: type[Backend] | Backend) -> Target:
    """The target with the cores that the backend uses there."""
    if target.is_host or not 0 < backend.cores < target.cores:
        return target
    return replace(target, cores=backend.cores)


def resolve_passes(passes: Sequence[Any] | None) -> list[Any] | None:
    """Passes and their texts as passes; None stays None."""
    if passes is None:
        return None
    if isinstance(passes, str) or not isinstance(passes, Sequence):
        raise InvalidOption(f"passes={passes!r}; expected a list of passes or texts")
    from fxopt.catalog import pass_from_text
    from fxopt.passes.base import Pass

    found = [pass_from_text(item) if isinstance(item, str) else item for item in passes]
    for index, item in enumerate(found):
        if not isinstance(item, Pass):
            raise InvalidOption(f"passes[{index}] is {item!r}; expected a pass or its text")
    return found


def resolve_pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    """A regular expression of the user's, compiled."""
    if text is None:
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise InvalidOption(f"{option}={text!r} is not a regular expression: {error}") from error
