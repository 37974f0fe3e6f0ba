"""Settings from the environment; options of a call or of the command line win over them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fxopt.errors import InvalidOption


@dataclass(frozen=True)
class Config:
    """`FXOPT_THREADS` (a number; default: the backend's choice) and `FXOPT_DEBUG` (1: tracebacks)."""

    threads: int | None = None
    debug: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Config:
        """The settings of this process.

        Raises:
            InvalidOption: a variable has a value that is not legal.
        """
        given = os.environ if environment is None else environment
        return cls(_threads(given.get("FXOPT_THREADS", "")), given.get("FXOPT_DEBUG", "") not in ("", "0"))


def _threads(text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InvalidOption(f"FXOPT_THREADS={text}: expected a number of threads, 1 or more")
    return int(text)
