"""Exceptions: each message says what was given, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxoptError(Exception):
    """Base of every error that a user can cause; the command line prints it without a traceback, exit code 2."""


class InvalidModel(FxoptError, ValueError):
    """The model cannot be read, or is not valid."""


class InvalidInput(FxoptError, ValueError):
    """Data (example inputs, calibration, a file) does not fit the model."""


class InvalidOption(FxoptError, ValueError):
    """An option's value is not legal."""


class UnknownName(FxoptError, LookupError):
    """A pass, target, backend, option or node of this name does not exist."""


class OutputError(FxoptError, OSError):
    """The result cannot be written."""


class MissingDependency(FxoptError, ImportError):
    """A library that this step needs is not installed."""


class CaptureError(FxoptError, ValueError):
    """The PyTorch model could not be captured as a graph."""


class NotReady(FxoptError, RuntimeError):
    """The result exists only after the first call, or after `example_inputs` were given."""


class PassError(FxoptError, RuntimeError):
    """A pass raised or broke the graph: `pass X failed after [A, B]`."""


class VerificationError(FxoptError, RuntimeError):
    """A graph is not well formed, or computes something else than before."""


class MissingReference(FxoptError, NotImplementedError):
    """An operator has no torch reference, and no evaluator was given."""


class Unsupported(FxoptError, TypeError):
    """The operation is not available for this model, operator or target."""


class Diverged(FxoptError, ArithmeticError):
    """Training gave a loss or gradient that is no finite number."""


class GraphSyntaxError(FxoptError, ValueError):
    """The text form of a graph does not parse."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for an unknown name, with near names suggested and the known ones listed.

    >>> print(unknown("target", "a10", ["a100", "host"]))
    unknown target 'a10'; did you mean 'a100'? Known: a100, host
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    shown = ", ".join(names[:40]) + (f", ... ({len(names)} in all)" if len(names) > 40 else "")
    return UnknownName(f"unknown {kind} {name!r}{hint} Known: {shown}" if names else f"unknown {kind} {name!r}")
