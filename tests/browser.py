"""The headless browser of the benchmarks, for tests."""

from __future__ import annotations

import pytest

from benchmarks.browser import Browser, Server

__all__ = ["Browser", "Server", "browser"]


def browser(seconds: float = 60.0) -> Browser:
    """A browser; skips the test where there is none."""
    try:
        return Browser(seconds)
    except FileNotFoundError as error:
        pytest.skip(str(error))
