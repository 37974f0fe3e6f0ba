"""Triton's own modules, untyped: kernels import them directly, everything else gets them here, when it needs them."""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any


def module(name: str = "") -> Any:
    """`triton`, or `triton.NAME`."""
    return importlib.import_module(f"triton.{name}" if name else "triton")


@cache
def version() -> str:
    """Of the installed Triton: "3.7.1"."""
    return str(module().__version__)


@cache
def minor() -> tuple[int, int]:
    """(3, 7)."""
    major, small = version().split(".")[:2]
    return int(major), int(small)


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter: decided when the process starts, and for all of it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def build_key() -> str:
    """A digest of the installed Triton build: kernels that one build compiled are used by the same build only."""
    import hashlib

    return hashlib.sha256(str(module("runtime.cache").triton_key()).encode()).hexdigest()[:16]
